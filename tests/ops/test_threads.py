"""On the CPU, equal inputs give equal bits for every number of threads."""

import pytest
import torch
from dcnv2_d2.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool

DTYPES = [torch.float32, torch.bfloat16]
FORMATS = [torch.contiguous_format, torch.channels_last]


def conv_inputs(n, c, h, w, outputs, groups, offset_groups):
    return {
        "input": torch.randn(n, c, h, w),
        "offset": 2 * torch.randn(n, 18 * offset_groups, h, w),
        "weight": torch.randn(outputs, c // groups, 3, 3),
        "bias": torch.randn(outputs),
        "mask": torch.rand(n, 9 * offset_groups, h, w),
    }


def box_inputs(n, c, k, bins, parts, classes, size=(25, 37)):
    corner, extent = 150 * torch.rand(k, 2), 20 + 150 * torch.rand(k, 2)
    return {
        "input": torch.randn(n, c, *size),
        "boxes": torch.cat([torch.randint(n, (k, 1)), corner, corner + extent], 1),
        "offset": torch.randn(k, 2 * classes, parts, parts),
        "mask": torch.rand(k, 1, bins, bins),
    }


def conv(tensors):
    return deform_conv2d(
        tensors["input"], tensors["offset"], tensors["weight"], tensors["bias"], 1, 1, 1, tensors["mask"]
    )


def pool(bins, ratio):
    return lambda t: deform_roi_pool(t["input"], t["boxes"], t["offset"], bins, 1 / 8, ratio, mask=t["mask"])


def ps_pool(bins, group_size):
    return lambda t: deform_ps_roi_pool(
        t["input"], t["boxes"], t["offset"], bins, 1 / 8, 3, group_size=group_size, mask=t["mask"]
    )


CASES = {
    "conv": (conv, lambda: conv_inputs(1, 70, 24, 31, 40, 1, 1)),
    "conv, groups, images": (conv, lambda: conv_inputs(3, 48, 17, 13, 24, 2, 4)),
    "conv, offset groups, one image": (conv, lambda: conv_inputs(1, 96, 40, 33, 64, 1, 3)),
    "pool": (pool(7, 2), lambda: box_inputs(1, 150, 90, 7, 7, 1)),
    "pool, images, adaptive": (pool(3, -1), lambda: box_inputs(3, 41, 60, 3, 3, 1)),
    # Sums over many blocks with so few elements that a reduction would be split over the blocks
    "pool, one bin": (pool(1, 2), lambda: box_inputs(1, 3000, 1, 1, 1, 1, (40, 44))),
    "pool, narrow blocks": (pool(2, 2), lambda: box_inputs(1, 40, 12, 2, 2, 1, (400, 310))),
    "ps pool": (ps_pool(6, 1), lambda: box_inputs(2, 140, 50, 6, 6, 1)),
    "ps pool, groups, classes": (ps_pool(4, 2), lambda: box_inputs(3, 4 * 63, 50, 4, 2, 7)),
}


def run(operator, tensors, grad=None):
    """The result and, for a `grad` of it, the gradients."""
    leaves = {k: v.detach().clone(memory_format=torch.preserve_format) for k, v in tensors.items()}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != "boxes")
    output = operator(leaves)
    if grad is None:
        return output.detach()
    return [output.detach(), *torch.autograd.grad(output, [v for v in leaves.values() if v.requires_grad], grad)]


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_bits_do_not_depend_on_the_number_of_threads(case, dtype, memory_format):
    operator, make = CASES[case]
    torch.manual_seed(0)
    tensors = {k: v if k == "boxes" else v.to(dtype) for k, v in make().items()}
    tensors["input"] = tensors["input"].contiguous(memory_format=memory_format)
    grad = torch.randn_like(run(operator, tensors))
    threads, results = torch.get_num_threads(), {}
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results[count] = run(operator, tensors, grad)
    finally:
        torch.set_num_threads(threads)
    assert all(t.any() for t in results[1])
    for count in (2, 3, 7):
        for name, one, other in zip(
            ["output", *(k for k in tensors if k != "boxes")], results[1], results[count], strict=True
        ):
            assert torch.equal(one, other), (count, name)
