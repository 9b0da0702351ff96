"""Deformable position-sensitive RoI pooling, of R-FCN and of models trained elsewhere."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

from .deform_roi_pool import boxes_with_batch_index


def deform_ps_roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    offset: Tensor | None,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 4,
    gamma: float = 0.1,
    group_size: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Deformable position-sensitive RoI pooling (Deformable ConvNets v1, section 2.2), with a mask modulated as in v2.

    It is the authors' own operator, DeformablePSROIPooling, and what mmdetection had until 2020: models trained with
    those need it. It is not RoIAlign; new models are better served by deform_roi_pool.

    Convention: box coordinates are rounded to whole pixels of the image, halves away from zero, and the far pixel is
    included: at a scale of 1/16, a box with x1 = 16.4 and x2 = 63.5 reaches from 16/16 - 0.5 = 0.5 to
    (64 + 1)/16 - 0.5 = 3.5625 pixels of the map. A side has at least 0.1 pixels. Samples lie at i/S of a bin, i = 0 to
    S - 1: the first in its near corner. A sample more than half a pixel beyond the centre of the outermost pixel is
    left out, one less far beyond is clamped to it, and a bin is the mean of the samples not left out, or 0 without any.
    A NaN or infinite position is left out.

    A bin moves by gamma times the size of the RoI times its offset, x first, as in deform_roi_pool. The parts of the
    offset, Qh x Qw, may be coarser than the bins: bin (ph, pw) takes part (ph * Qh // Ph, pw * Qw // Pw). Offsets may
    differ by class: of C' pooled channels, channel c takes those of class c * classes // C'. With a group size G, bin
    (ph, pw) of channel c is pooled from channel (c * G + ph * G // Ph) * G + pw * G // Pw of the input. The derivative
    by the offset is the true one: 0 for a sample left out, and in a direction in which it was clamped.

    Coordinates and sums are in float32 (float64 for a float64 input), and the result is rounded once. On the CPU equal
    inputs give equal bits, at any number of threads. On a GPU the gradients vary in the last bits.
    A box of no image gives zeros there. Derivatives are of any order, reverse and forward;
    boxes have none.

    Args:
        input (Tensor[N, C, H, W]): float64, float32, bfloat16 or float16, contiguous or channels_last; the result has
            its dtype and layout.
        boxes (Tensor[K, 5] or list of Tensor[L, 4]): (batch index, x1, y1, x2, y2), or (x1, y1, x2, y2) per image, in
            image pixels, of any floating dtype.
        offset (Tensor[K, 2 * classes, Qh, Qw]): class by class x of all parts, then y, in units of gamma times the
            RoI's size; or None (the authors' no_trans).
        output_size: (Ph, Pw), or one number for both.
        spatial_scale: pixels of the map per image pixel.
        sampling_ratio: S, samples of a bin in each direction (the authors' sample_per_part).
        gamma: see above (the authors' trans_std).
        group_size: G, whose square divides C.
        mask (Tensor[K, 1, Ph, Pw]): the modulation, a factor of each bin; or None.

    Returns:
        Tensor[K, C / G**2, Ph, Pw]

    Raises:
        ValueError: a shape, device, size or scale does not fit, or, on the CPU, a batch index is not one of input's.
        TypeError: a dtype does not fit.
    """
    boxes = boxes_with_batch_index("deform_ps_roi_pool", input, boxes)
    return torch.ops.dcnv2_d2.deform_ps_roi_pool.default(
        input, boxes, offset, mask, list(_pair(output_size)), spatial_scale, sampling_ratio, gamma, group_size
    )
