"""Deformable RoI pooling, v1 and modulated."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair


def deform_roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    offset: Tensor | None,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    gamma: float = 0.1,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Modulated deformable RoI pooling (Deformable ConvNets v2, Eq. 2); without a mask, the one of v1.

    .. math:: y(k) = \frac{\Delta m_k}{n_k} \sum_{j=1}^{n_k} x(p_{kj} + \Delta p_k)

    Without offset and mask it is torchvision.ops.roi_align(aligned=True), and mmcv's deform_roi_pool without a mask.

    Convention: a bin moves by gamma times the size of the RoI times its offset, x first. For gamma 0.1 and an RoI of
    80 x 40 pixels of the map, offset[k, 0] = 1 moves the bin 8 pixels to the right, offset[k, 1] = 1 moves it 4 down.
    This is the opposite order of deform_conv2d, as in every published implementation. The number of samples of a bin is
    fixed: those that fall outside the map count as 0. The derivative by the offset is the true one: 0 for a sample
    outside, and in a direction in which it was clamped at the border.

    Coordinates and sums are in float32 (float64 for a float64 input), and the result is rounded once. On the CPU equal
    inputs give equal bits, at any number of threads. On a GPU the gradient of the input varies in the last bits.
    A box of no image gives zeros there. Derivatives are of any order, reverse and forward;
    boxes have none.

    Args:
        input (Tensor[N, C, H, W]): float64, float32, bfloat16 or float16, contiguous or channels_last; the result has
            its dtype and layout.
        boxes (Tensor[K, 5] or list of Tensor[L, 4]): (batch index, x1, y1, x2, y2), or (x1, y1, x2, y2) per image, in
            image pixels, of any floating dtype.
        offset (Tensor[K, 2, Ph, Pw]): x of all bins, then y, in units of gamma times the RoI's size; or None.
        output_size: (Ph, Pw), or one number for both.
        spatial_scale: pixels of the map per image pixel.
        sampling_ratio: samples of a bin in each direction; 0 or less: one per pixel, as in roi_align.
        gamma: see above; the paper's 0.1.
        mask (Tensor[K, 1, Ph, Pw]): the modulation, a factor of each bin; or None.

    Returns:
        Tensor[K, C, Ph, Pw]

    Raises:
        ValueError: a shape, device, size or scale does not fit, or, on the CPU, a batch index is not one of input's.
        TypeError: a dtype does not fit.
    """
    boxes = boxes_with_batch_index("deform_roi_pool", input, boxes)
    return torch.ops.dcnv2_d2.deform_roi_pool.default(
        input, boxes, offset, mask, list(_pair(output_size)), spatial_scale, sampling_ratio, gamma
    )


def boxes_with_batch_index(function: str, input: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
    """A list of Tensor[L, 4], one per image, as Tensor[K, 5]; a tensor as it is."""
    if isinstance(boxes, Tensor):
        return boxes
    for b in boxes if isinstance(boxes, (list, tuple)) else [boxes]:
        if not isinstance(b, Tensor):
            hint = "; pass its .tensor" if hasattr(b, "tensor") else ""
            raise TypeError(
                f"{function}: boxes must be a tensor [K, 5] or a list of tensors [L, 4], got {type(b).__name__}{hint}"
            )
    if len(boxes) != input.shape[0]:
        raise ValueError(f"{function}: boxes must have one tensor per image ({input.shape[0]}), got {len(boxes)}")
    for b in boxes:
        if b.dim() != 2 or b.shape[1] != 4:
            raise ValueError(f"{function}: boxes must be a list of tensors [L, 4], got one of {list(b.shape)}")
    if not boxes:
        return input.new_zeros((0, 5))
    return torch.cat([torch.cat([b.new_full((len(b), 1), i), b], dim=1) for i, b in enumerate(boxes)])
