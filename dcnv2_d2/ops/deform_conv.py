"""Deformable convolution, v1 and modulated."""

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Modulated deformable convolution (Deformable ConvNets v2, Eq. 1); without a mask, the one of v1.

    .. math:: y(p) = \sum_k w_k \cdot x(p + p_k + \Delta p_k) \cdot \Delta m_k

    A drop-in for torchvision.ops.deform_conv2d. The number of groups and of offset groups follow from the shapes.

    Convention: offsets come as (dy, dx) pairs, tap by tap in row-major order, offset group by offset group. For a 3x3
    kernel, channels 2 and 3 of the offset move tap (0, 1): with dy = 1 and dx = 0 there, output pixel (5, 7) at
    stride 1 and padding 1 reads the input at (5 - 1 + 0 + 1, 7 - 1 + 1 + 0) = (5, 7) instead of (4, 7). Values between
    pixels are interpolated bilinearly, a neighbour outside the map counting as 0. A sample at y <= -1 or y >= H (or x)
    is 0, and so is its derivative by the position. A NaN or infinite position is outside.

    Coordinates, interpolation and sums are in float32 (float64 for a float64 input). In a half type the samples may be
    rounded to it before they are multiplied with the weight, as PyTorch's own products do.
    On the CPU equal inputs give equal bits, at any number of threads. On a GPU the gradient of the input varies in the
    last bits. Derivatives are of any order, reverse and forward.

    Args:
        input (Tensor[N, C, H, W]): float64, float32, bfloat16 or float16, contiguous or channels_last; the result has
            its dtype and layout.
        offset (Tensor[N, 2*G*kh*kw, Ho, Wo]): (dy, dx) pairs in input pixels, of any floating dtype; G offset groups.
        weight (Tensor[O, C / groups, kh, kw]): of the input's dtype.
        bias (Tensor[O]): of the input's dtype.
        stride, padding, dilation: one number or a pair (vertical, horizontal), in input pixels.
        mask (Tensor[N, G*kh*kw, Ho, Wo]): the modulation, a factor of each sample, of any floating dtype.

    Returns:
        Tensor[N, O, Ho, Wo]

    Raises:
        ValueError: a shape, device, stride, padding or dilation does not fit.
        TypeError: a dtype does not fit.
    """
    if offset is None:
        raise ValueError("deform_conv2d: offset must be a tensor, got None; torch.nn.functional.conv2d needs no offset")
    return torch.ops.dcnv2_d2.deform_conv2d.default(
        input, offset, weight, bias, mask, list(_pair(stride)), list(_pair(padding)), list(_pair(dilation))
    )
