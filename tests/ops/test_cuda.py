"""The CUDA kernels against the CPU operators: on a GPU, and without one compiled as C++ for an emulated one.

The emulated GPU (emulated_cuda.h) shows that indices, barriers, warp operations and arithmetic are right. It shows
nothing of speed, of races between blocks, of cuBLAS or of what nvcc makes of the sources.
"""

import itertools
import math
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from dcnv2_d2 import ops  # noqa: F401  the CPU operators
from torch.nn.modules.utils import _pair
from torch.utils import cpp_extension

from ..reference import TOLERANCE, assert_near, deform_conv2d_inputs
from ..reference_pool import deform_roi_pool_inputs

CSRC = Path(__file__).parents[2] / "csrc"
NAN, INF = math.nan, math.inf
FORMATS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]  # float16 takes the way of bfloat16
# So that small inputs come to several tiles, to several chunks of samples and to several blocks a box.
SMALLER = {
    "kWorkspace = 32 << 20": "kWorkspace = 6000",
    "kBins = 49 *": "kBins = 20 *",
    "kTaps = 9;": "kTaps = 4;",
}


def translate(text):
    text, launches = re.subn(r"(\w+_kernel<[^;]*?>)<<<([^;]*?), stream>>>\(", r"emulated::launch(\2, \1)(", text)
    assert launches == text.count("C10_CUDA_KERNEL_LAUNCH_CHECK()")
    text = re.sub(r"#include <c10/cuda/\w+\.h>", '#include "emulated_cuda.h"', text)
    text = re.sub(
        r"extern __shared__ __align__\(16\) unsigned char memory\[\]", "void* memory = emulated::dynamic_memory", text
    )
    return text.replace("TORCH_LIBRARY_IMPL(dcnv2_d2, CUDA, m)", "TORCH_LIBRARY_IMPL(dcnv2_d2_emulated, CPU, m)")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The operators, compiled for the emulated GPU."""
    if not (shutil.which("g++") and shutil.which("ninja")):
        pytest.skip("no g++ or no ninja")
    folder = tmp_path_factory.mktemp("emulated")
    (folder / "cuda").mkdir()
    seen = set()
    for source in sorted((CSRC / "cuda").iterdir()):
        text = translate(source.read_text())
        for old, new in SMALLER.items():
            if old in text:
                seen.add(old)
                text = text.replace(old, new)
        (folder / "cuda" / source.name).write_text(text)
    assert seen == set(SMALLER)
    shutil.copy(Path(__file__).with_name("emulated_matrix_unit.h"), folder / "cuda" / "matrix_unit.h")
    schemas = (CSRC / "library.cpp").read_text()
    schemas = schemas.replace("TORCH_LIBRARY(dcnv2_d2, m)", "TORCH_LIBRARY(dcnv2_d2_emulated, m)")
    schemas = re.sub(r"m\.set_python_module\(.*?\);", "", schemas)
    kernels = [f'#include "cuda/{source.name}"\n' for source in sorted((CSRC / "cuda").glob("*.cu"))]
    (folder / "all.cpp").write_text("".join([*kernels, schemas]))  # in one: torch's headers take most of the time
    cpp_extension.load(
        "dcnv2_d2_emulated", [str(folder / "all.cpp")], extra_cflags=["-O1", "-Wno-unknown-pragmas"],
        extra_include_paths=[str(folder), str(Path(__file__).parent), str(CSRC)], build_directory=str(folder),
        is_python_module=False,
    )  # fmt: skip
    return torch.ops.dcnv2_d2_emulated


def on_gpu(tensor):
    """With its strides and the offset into its storage, which .cuda() drops."""
    storage = torch.empty(tensor.untyped_storage().nbytes() // tensor.itemsize, dtype=tensor.dtype, device="cuda")
    return storage.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()).copy_(tensor)


@pytest.fixture
def run(device, request):
    """run(name, arguments): an operator on the GPU, or on the emulated one; tensors come and go on the CPU."""
    if device == "cpu":
        emulated = request.getfixturevalue("emulated")
        return lambda name, arguments: getattr(emulated, name)(*arguments)

    def run_on_gpu(name, arguments):
        moved = [on_gpu(a) if torch.is_tensor(a) else a for a in arguments]
        result = getattr(torch.ops.dcnv2_d2, name)(*moved)
        return result.cpu() if torch.is_tensor(result) else tuple(r.cpu() for r in result)

    return run_on_gpu


def run_on_cpu(name, arguments):
    return getattr(torch.ops.dcnv2_d2, name)(*arguments)


@pytest.fixture(autouse=True)
def fill_new_memory():
    """Fills what the kernels do not write with NaN; the warnings say that the GPU's own order of summation varies."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.use_deterministic_algorithms(False)


def compare(run, name, arguments, memory_format, grad_format=None, wanted=None, no_image=None):
    """Output and gradients. Of boxes `no_image` (a mask), which the CPU refuses, the result and the gradients are 0."""
    convolution = name == "deform_conv2d"
    arguments[0] = arguments[0].contiguous(memory_format=memory_format)
    accepted = list(arguments)
    if no_image is not None:
        accepted[1] = accepted[1].clone()
        accepted[1][no_image, 0] = 0

    def backward(run, grad, arguments):
        rest = arguments[:3] + arguments[4:] if convolution else arguments  # without the bias
        return run(f"{name}_backward", [grad, *rest, wanted or [True] * (4 if convolution else 3)])

    actual, expected = run(name, arguments), run_on_cpu(name, accepted)
    grad = torch.randn(expected.shape).to(expected).contiguous(memory_format=grad_format or memory_format)
    accepted_grad = grad.clone()
    if no_image is not None:
        expected[no_image] = accepted_grad[no_image] = 0
    actual = [actual, *backward(run, grad, arguments)]
    expected = [expected, *backward(run_on_cpu, accepted_grad, accepted)]
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a.dtype, a.shape) == (e.dtype, e.shape), i
        assert not e.numel() or a.stride() == e.stride(), i
        assert torch.equal(a.isnan(), e.isnan()), i
        assert_near(a.nan_to_num(), e.nan_to_num(), 4 * TOLERANCE[grad.dtype], f"{name}, result {i}")


def offset_dtype(dtype):
    return torch.float32 if dtype.itemsize == 2 else dtype


# deform_conv2d


def conv_arguments(tensors, geometry):
    names = ("input", "offset", "weight", "bias", "mask")
    return [*(tensors[k] for k in names), *(list(_pair(geometry[k])) for k in ("stride", "padding", "dilation"))]


UNEQUAL = {"kernel": (3, 5), "stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)}
CONVOLUTIONS = [
    {"c": 40, "o": 10, "groups": 5, "bias": False, "h": 6, "w": 5},
    {"c": 12, "o": 6, "groups": 3, "offset_groups": 2, **UNEQUAL},
    {"n": 1, "c": 64, "o": 4, "groups": 2, "offset_groups": 4, "h": 6, "w": 5},
    {"n": 0},
    {"n": 1, "c": 3, "h": 5, "w": 4, "o": 1, "kernel": 1, "padding": 0},
    {"n": 1, "c": 272, "h": 3, "w": 5, "o": 3, "mask": False, "bias": False},
    {"n": 3, "c": 24, "h": 15, "w": 9, "o": 5, "offset_groups": 3, "stride": 2, "mask": False},
]


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONVOLUTIONS, ids=str)
def test_deform_conv2d(run, config, dtype, memory_format):
    tensors, geometry = deform_conv2d_inputs(**config, dtype=dtype, offset_dtype=offset_dtype(dtype))
    compare(run, "deform_conv2d", conv_arguments(tensors, geometry), memory_format)


def test_deform_conv2d_gives_what_is_wanted(run):
    arguments = conv_arguments(*deform_conv2d_inputs(n=1, c=16, h=6, w=7, dtype=torch.float32))
    for wanted in itertools.product([True, False], repeat=4):
        compare(run, "deform_conv2d", arguments, torch.contiguous_format, wanted=list(wanted))


# The fused kernel: channels that are, and are not, what it takes.
FUSED = [
    {"c": 32, "o": 8, "h": 6, "w": 5},
    {"n": 1, "c": 64, "o": 136, "h": 9, "w": 8, "offset_groups": 2, "mask": False},
    {"n": 1, "c": 96, "o": 24, "groups": 3, "h": 9, "w": 13, "bias": False, **UNEQUAL},
    {"n": 1, "c": 128, "o": 400, "groups": 2, "offset_groups": 1, "h": 5, "w": 4, "kernel": 1, "padding": 0},
    {"n": 1, "c": 192, "o": 792, "groups": 3, "offset_groups": 2, "h": 3, "w": 4, "kernel": 1, "padding": 0},
    {"n": 0, "c": 32, "o": 8},
    {"c": 40, "o": 8, "h": 6, "w": 5},
]


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", FUSED, ids=str)
def test_fused_deform_conv2d(run, monkeypatch, config, dtype, memory_format):
    monkeypatch.setenv("DCNV2_FUSED", "1")
    tensors, geometry = deform_conv2d_inputs(**config, dtype=dtype, offset_dtype=torch.float32)
    compare(run, "deform_conv2d", conv_arguments(tensors, geometry), memory_format)


@pytest.mark.parametrize(
    "config, fused, columns",
    [
        ({"dtype": torch.bfloat16}, None, True),
        ({"dtype": torch.bfloat16}, "0", True),
        ({"dtype": torch.bfloat16}, "1", False),
        ({"dtype": torch.float32}, "1", True),
        ({"dtype": torch.bfloat16, "offset_groups": 4}, "1", True),
        ({"dtype": torch.bfloat16, "groups": 4}, "1", True),
        ({"dtype": torch.bfloat16, "o": 12}, "1", True),
    ],
    ids=str,
)
def test_fused_deform_conv2d_is_taken_where_wanted_and_possible(run, monkeypatch, device, config, fused, columns):
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("a GPU without the instructions")
    monkeypatch.delenv("DCNV2_FUSED", raising=False)
    if fused:
        monkeypatch.setenv("DCNV2_FUSED", fused)
    arguments = conv_arguments(*deform_conv2d_inputs(n=1, c=64, h=5, w=4, offset_dtype=torch.float32, **config))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run("deform_conv2d", arguments)
    assert columns == any(event.name == "aten::baddbmm_" for event in profile.events())


@pytest.mark.parametrize(
    "dtype, fused", [*((dtype, "0") for dtype in DTYPES), (torch.float16, "1"), (torch.bfloat16, "1")], ids=str
)
def test_deform_conv2d_awkward_values(run, monkeypatch, dtype, fused):
    monkeypatch.setenv("DCNV2_FUSED", fused)
    config = {"n": 1, "c": 64, "h": 7, "w": 9, "offset_groups": 2, "dtype": dtype, "offset_dtype": offset_dtype(dtype)}

    def fresh():
        return deform_conv2d_inputs(**config)

    tensors, geometry = fresh()
    tensors["offset"].view(-1)[::3] = torch.tensor([NAN, INF, -INF, 1e20, -1e20, -1, 3, 0]).repeat(95)[:756]
    compare(run, "deform_conv2d", conv_arguments(tensors, geometry), torch.channels_last)
    tensors, geometry = fresh()
    tensors["input"].view(-1)[::7] = INF
    tensors["offset"].round_()
    compare(run, "deform_conv2d", conv_arguments(tensors, geometry), torch.channels_last)
    tensors, geometry = fresh()
    tensors["mask"].view(-1)[::17] = NAN
    tensors["mask"].view(-1)[1::31] = INF
    compare(run, "deform_conv2d", conv_arguments(tensors, geometry), torch.channels_last)
    tensors, geometry = fresh()  # channel vectors that do not begin at a multiple of 16 bytes
    nhwc = torch.empty(tensors["input"].numel() + 3, dtype=dtype)[3:].view(1, 7, 9, 64)
    tensors["input"] = nhwc.permute(0, 3, 1, 2).copy_(tensors["input"])
    compare(run, "deform_conv2d", conv_arguments(tensors, geometry), torch.channels_last)
    for name in ("weight", "bias"):  # nor weights, which are taken as they are where there is one tap
        tensors, geometry = deform_conv2d_inputs(**config, kernel=1, padding=0)
        tensors[name] = torch.cat([torch.zeros(3, dtype=dtype), tensors[name].flatten()])[3:].view_as(tensors[name])
        compare(run, "deform_conv2d", conv_arguments(tensors, geometry), torch.channels_last)


# deform_roi_pool, deform_ps_roi_pool


def pool_arguments(tensors, geometry):
    sizes = [list(_pair(geometry["output_size"])), *(geometry[k] for k in ("spatial_scale", "sampling_ratio", "gamma"))]
    return [tensors["input"], geometry["boxes"], tensors["offset"], tensors["mask"], *sizes]


POOLINGS = [
    {"c": 16},
    {"c": 136, "k": 3, "mask": False},
    {"c": 264, "k": 2, "output_size": (2, 3)},
    {"c": 1, "offset": False},
    {"k": 0},
    {"n": 1, "k": 1, "c": 5, "h": 21, "w": 23, "output_size": 1},
    {"n": 1, "k": 3, "h": 40, "w": 37, "output_size": 2, "spatial_scale": 1.0, "sampling_ratio": -1},
    {"k": 3, "sampling_ratio": 7, "gamma": -0.3, "offset": False, "mask": False},
]


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", POOLINGS, ids=str)
def test_deform_roi_pool(run, config, dtype, memory_format):
    tensors, geometry = deform_roi_pool_inputs(
        **config, dtype=dtype, boxes_dtype=torch.float32, offset_dtype=offset_dtype(dtype)
    )
    compare(run, "deform_roi_pool", pool_arguments(tensors, geometry), memory_format)


def test_deform_roi_pool_gives_what_is_wanted(run):
    arguments = pool_arguments(*deform_roi_pool_inputs(c=16, dtype=torch.float32))
    for wanted in itertools.product([True, False], repeat=3):
        compare(run, "deform_roi_pool", arguments, *FORMATS, wanted=list(wanted))


@pytest.mark.parametrize("sampling_ratio", [2, -1, 17])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_deform_roi_pool_awkward_values(run, memory_format, sampling_ratio):
    boxes = [
        *[(0, NAN, NAN, NAN, NAN), (1, 2, 3, INF, 9), (0, 20, 20, 3, 4), (0, 5, 5, 5, 5), (1, -5000, -3, 5000, 20)],
        *[(0, 1e20, 1e20, 1e20, 1e20), (-1, 1, 1, 9, 9), (2, 1, 1, 9, 9), (NAN, 1, 1, 9, 9), (1e30, 1, 1, 9, 9)],
    ]
    tensors, geometry = deform_roi_pool_inputs(
        c=16, boxes=boxes, margin=0, sampling_ratio=sampling_ratio, dtype=torch.float32
    )
    no_image = torch.arange(10) > 5
    compare(run, "deform_roi_pool", pool_arguments(tensors, geometry), memory_format, no_image=no_image)
    tensors["offset"][:6].view(-1)[::7] = tensors["mask"][:6].view(-1)[::5] = NAN  # not where the CPU has another box
    tensors["offset"][:6].view(-1)[3::11] = INF
    compare(run, "deform_roi_pool", pool_arguments(tensors, geometry), memory_format, no_image=no_image)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "channels, groups, bins, classes, parts, sampling_ratio",
    [(8, 1, (3, 5), 1, (3, 5), 2), (4, 2, (4, 3), 0, None, 4), (16, 1, (3, 3), 2, (2, 2), 3),
     (6, 3, (7, 7), 3, (4, 5), 4), (32, 1, (2, 2), 4, (3, 1), 1),
     (24, 2, (3, 2), 1, (1, 1), 5)],
)  # fmt: skip
def test_deform_ps_roi_pool(run, channels, groups, bins, classes, parts, sampling_ratio, dtype, memory_format):
    input = torch.randn(2, channels * groups**2, 11, 13).to(dtype)
    boxes = torch.cat([torch.randint(2, (3, 1)), torch.rand(3, 2) * 20 - 3, torch.rand(3, 2) * 30 + 3], 1)
    offset = torch.randn(3, 2 * classes, *parts) * 2 if classes else None
    mask = torch.rand(3, 1, *bins)
    arguments = [input, boxes, offset, mask, list(bins), 0.5, sampling_ratio, 0.1, groups]
    compare(run, "deform_ps_roi_pool", arguments, memory_format)
