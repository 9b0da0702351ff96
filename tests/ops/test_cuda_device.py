"""What only a GPU can show: large tensors, several devices, streams, deterministic mode. Skipped without one."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which cuBLAS refuses deterministic mode

import pytest
import torch
from dcnv2_d2.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool
from torch.nn import functional as F

from ..devices import DEVICES
from ..reference import TOLERANCE, assert_all_near, assert_near, deform_conv2d_inputs
from ..reference import deform_conv2d as definition
from ..reference import run as run_both
from ..reference_pool import deform_roi_pool_inputs

if "cuda" not in DEVICES:
    pytest.skip("no GPU, or dcnv2_d2 was built without CUDA", allow_module_level=True)
OPERATORS = ("deform_conv2d", "deform_roi_pool", "deform_ps_roi_pool")


def needs_memory(gib):
    if torch.cuda.get_device_properties(0).total_memory < gib * 2**30:
        pytest.skip(f"the GPU has less than {gib} GiB")


def call(name, device):
    """(function of no arguments that runs an operator on given leaves, the leaves)"""
    if name == "deform_conv2d":
        tensors, geometry = deform_conv2d_inputs(c=32, dtype=torch.float32, device=device)
        leaves = {k: t.requires_grad_() for k, t in tensors.items()}
        return lambda: deform_conv2d(**leaves, **geometry), leaves
    tensors, geometry = deform_roi_pool_inputs(c=32, dtype=torch.float32, device=device)
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    operator = deform_roi_pool if name == "deform_roi_pool" else deform_ps_roi_pool
    return lambda: operator(**leaves, **geometry), leaves


# Large tensors.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deform_conv2d_of_several_tiles(dtype):
    """The columns take 8 (float32) or 4 workspaces, the last one in part: every gradient is that of the CPU."""
    tensors, geometry = deform_conv2d_inputs(c=64, o=8, h=330, w=331, dtype=dtype, offset_dtype=torch.float32)
    grad = torch.randn(2, 8, 330, 331).to(dtype)
    expected = run_both(deform_conv2d, tensors, geometry, grad)
    actual = run_both(deform_conv2d, {k: t.cuda() for k, t in tensors.items()}, geometry, grad.cuda())
    # The gradient of the weight is a sum over 218,460 positions.
    assert_all_near({k: t.cpu() for k, t in actual.items()}, expected, 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fused_deform_conv2d_of_a_layer_has_no_columns(monkeypatch, dtype):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("a GPU without the instructions")
    tensors, geometry = deform_conv2d_inputs(c=256, o=256, h=50, w=84, dtype=dtype, offset_dtype=torch.float32)
    tensors = {k: t.cuda() for k, t in tensors.items()}
    tensors["input"] = tensors["input"].contiguous(memory_format=torch.channels_last)
    monkeypatch.delenv("DCNV2_FUSED", raising=False)
    expected = deform_conv2d(**tensors, **geometry)
    monkeypatch.setenv("DCNV2_FUSED", "1")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    actual = deform_conv2d(**tensors, **geometry)
    # The output, and the weights in another order.
    assert torch.cuda.max_memory_allocated() - before < 1.5 * (actual.nbytes + tensors["weight"].nbytes)
    assert_near(actual, expected, TOLERANCE[dtype])


# More than 2**31 elements.


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_deform_conv2d_of_more_than_2_31_elements(memory_format):
    needs_memory(64)
    n, c, h, w = 65, 64, 512, 1024  # 2.18e9 elements in the input
    x = torch.empty(n, c, h, w, dtype=torch.bfloat16, device="cuda", memory_format=memory_format).normal_()
    weight = torch.randn(1, c, 3, 3, device="cuda").bfloat16()
    tensors = {"offset": torch.randn(n, 18, h, w, device="cuda"), "mask": torch.rand(n, 9, h, w, device="cuda")}
    x.requires_grad_()
    out = deform_conv2d(x, tensors["offset"], weight, padding=1, mask=tensors["mask"])
    out[-1].sum().backward()
    last = {k: t[-1:, ..., -16:, -24:].contiguous() for k, t in tensors.items()}
    corner = x.detach()[-1:, ..., -48:, -64:].clone().requires_grad_()
    # The last image's far corner, as a picture of its own: its first rows and columns see another border.
    padded = {k: F.pad(t, (40, 0, 32, 0)) for k, t in last.items()}
    expected = definition(corner, padded["offset"], weight, padding=1, mask=padded["mask"])
    assert_near(out[-1:, ..., -16:, -24:], expected[..., -16:, -24:], 1e-2)
    assert x.grad[:-1].count_nonzero() == 0 and x.grad[-1].count_nonzero() > 0.9 * x.grad[-1].numel()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_deform_roi_pool_of_more_than_2_31_elements(memory_format):
    needs_memory(64)
    k, c, bins = 45000, 1024, 7  # 2.26e9 elements in the result
    x = torch.randn(1, c, 20, 30, device="cuda").bfloat16().contiguous(memory_format=memory_format).requires_grad_()
    corner = torch.rand(k, 2, device="cuda") * 10
    size = torch.rand(k, 2, device="cuda") * 10 + 1
    boxes = torch.cat([torch.zeros(k, 1, device="cuda"), corner, corner + size], 1)
    offset = torch.randn(k, 2, bins, bins, device="cuda", requires_grad=True)
    out = deform_roi_pool(x, boxes, offset, bins, sampling_ratio=2)
    alone = deform_roi_pool(x, boxes[-3:], offset[-3:], bins, sampling_ratio=2)
    assert torch.equal(out[-3:], alone)
    gradients = []
    for pooled in (out[-3:], alone):
        gradients.append(torch.autograd.grad(pooled.float().square().sum(), [x, offset]))
    for actual, expected in zip(*gradients, strict=True):
        assert_near(actual, expected, 1e-2)


# Devices, streams, determinism.


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", OPERATORS)
def test_runs_on_the_device_of_its_tensors(name):
    results = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(0)
        with torch.cuda.device(0):
            run, leaves = call(name, device)
            out = run()
            out.sum().backward()
        assert out.device == torch.device(device)
        results.append([out, *(t.grad for t in leaves.values())])
    for actual, expected in zip(*results, strict=True):
        assert_near(actual.cpu(), expected.cpu(), 1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_errors_of_a_second_device():
    tensors, geometry = deform_conv2d_inputs(dtype=torch.float32, device="cuda:0")
    with pytest.raises(ValueError, match="offset must be on the device of input .*cuda:0.*cuda:1"):
        deform_conv2d(**{**tensors, "offset": tensors["offset"].to("cuda:1")}, **geometry)


@pytest.mark.parametrize("name", OPERATORS)
def test_runs_on_the_current_stream(name):
    run, leaves = call(name, "cuda")
    expected = run().detach()
    original = leaves["input"].detach().clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        leaves["input"].zero_()
        torch.cuda._sleep(200_000_000)  # a kernel on another stream would not wait for what follows
        leaves["input"].copy_(original)
        out = run()
    torch.cuda.current_stream().wait_stream(stream)
    assert_near(out, expected, 1e-6)


@pytest.mark.parametrize("name", OPERATORS)
def test_deterministic_mode_refuses_what_is_summed_by_atomics(name):
    run, leaves = call(name, "cuda")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match=f"{name}_backward_cuda does not have a deterministic implementation"):
            run().sum().backward()
        if name != "deform_ps_roi_pool":  # without the gradient of the input nothing is
            leaves["input"].requires_grad_(False)
            others = [t for k, t in leaves.items() if k != "input"]
            first, second = (torch.autograd.grad(run().square().sum(), others) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", OPERATORS[1:])
def test_boxes_of_no_image_give_zeros(name):
    tensors, geometry = deform_roi_pool_inputs(c=8, k=4, dtype=torch.float32, device="cuda")
    geometry["boxes"][:3, 0] = torch.tensor([-1.0, 2.0, float("nan")])
    operator = deform_roi_pool if name == "deform_roi_pool" else deform_ps_roi_pool
    out = operator(**tensors, **geometry)
    assert out[:3].count_nonzero() == 0 and out[3].count_nonzero() > 0


@pytest.mark.parametrize("name", OPERATORS)
def test_captured_in_a_graph(name):
    """Nothing in the forward pass waits for the GPU or reads from it."""
    run, leaves = call(name, "cuda")
    with torch.no_grad():
        expected = run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        leaves["input"].mul_(2)
        if name == "deform_conv2d":
            leaves["bias"].mul_(2)
        graph.replay()
    assert_near(out, 2 * expected, 1e-5)
