"""What the CPU kernels promise beyond their values: every instruction set, only what is wanted, the weight's layout."""

import itertools
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ops = torch.ops.dcnv2_d2


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has several instruction sets")
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_lesser_instruction_sets_agree_with_the_definition(capability):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "conv"]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    fuzz = Path(__file__).with_name("test_fuzz.py")
    run = subprocess.run([*command, str(fuzz)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:]


def backward_call(dtype, layout, channels=72, groups=1, offset_groups=1):
    """Two images, of which the second has strips of its own; several chunks of channels and of taps."""
    torch.manual_seed(0)
    input = torch.randn(2, channels, 40, 31).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(34, channels // groups, 5, 3).to(dtype).contiguous(memory_format=layout)
    offset = 3 * torch.randn(2, 30 * offset_groups, 40, 31)
    mask = torch.rand(2, 15 * offset_groups, 40, 31)
    grad = torch.randn(2, 34, 40, 31).to(dtype)
    return grad, input, offset, weight, mask, [1, 1], [2, 1], [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_gradient_is_the_same_whichever_others_are_wanted(dtype):
    call = backward_call(dtype, torch.contiguous_format)
    everything = ops.deform_conv2d_backward(*call, [True] * 4)
    for wanted in itertools.product([False, True], repeat=4):
        for gradient, expected, asked in zip(
            ops.deform_conv2d_backward(*call, list(wanted)), everything, wanted, strict=True
        ):
            assert gradient.numel() == (expected.numel() if asked else 0)
            if asked:
                assert torch.equal(gradient, expected), wanted


@pytest.mark.parametrize("groups, offset_groups", [(1, 1), (2, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_channels_last_changes_neither_values_nor_the_layout_of_the_gradients(dtype, groups, offset_groups):
    results = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        call = backward_call(dtype, layout, groups=groups, offset_groups=offset_groups)
        results[layout] = ops.deform_conv2d_backward(*call, [True] * 4)
        assert results[layout][0].is_contiguous(memory_format=layout)
        assert results[layout][2].is_contiguous(memory_format=layout)
    for a, b in zip(*results.values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("groups, offset_groups", [(1, 1), (2, 4)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_bits_do_not_depend_on_the_number_of_threads(dtype, layout, groups, offset_groups):
    grad, input, offset, weight, mask, *geometry = call = backward_call(dtype, layout, 72, groups, offset_groups)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            output = ops.deform_conv2d(input, offset, weight, None, mask, *geometry)
            results.append([output, *ops.deform_conv2d_backward(*call, [True] * 4)])
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_geometry_that_no_position_can_hold(name):
    geometry = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], name: [1, 2**30]}
    with pytest.raises(ValueError, match=r"stride, padding and dilation must be below 2\*\*30"):
        ops.deform_conv2d(torch.zeros(1, 1, 4, 4), torch.zeros(1, 18, 4, 4), torch.zeros(1, 1, 3, 3), None, None,
                          *geometry.values())  # fmt: skip
