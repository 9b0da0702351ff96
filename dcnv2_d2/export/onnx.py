"""Our operators in terms of ONNX's, for torch.onnx."""

from collections.abc import Callable

import numpy as np
import torch
from onnxscript import ir
from onnxscript import opset19 as op

from . import nms  # noqa: F401  registers batched_nms


def _constant(array):
    return op.Constant(value=ir.tensor(array))


def _deform_conv2d(input, offset, weight, bias, mask, stride, padding, dilation):
    out_channels, in_channels, *kernel = weight.shape
    return op.DeformConv(
        input,
        weight,
        offset,
        bias,
        mask,
        kernel_shape=kernel,
        strides=stride,
        pads=[*padding, *padding],
        dilations=dilation,
        group=input.shape[1] // in_channels,
        offset_group=offset.shape[1] // (2 * kernel[0] * kernel[1]),
    )


def _deform_roi_pool(input, boxes, offset, mask, output_size, spatial_scale, sampling_ratio, gamma):
    """For each bin a RoiAlign of one bin, where the offset moves it: it samples as the operator does."""
    (bins_h, bins_w), channels = output_size, input.shape[1]
    image, corner, end = (op.Slice(boxes, [a], [b], [1]) for a, b in ((0, 1), (1, 3), (3, 5)))
    # All as [K, 2, Ph, Pw], x before y.
    corner, size = (op.Reshape(t, [-1, 2, 1, 1]) for t in (corner, op.Sub(end, corner)))
    grid = np.meshgrid(np.arange(bins_w) / bins_w, np.arange(bins_h) / bins_h)
    start = op.Add(corner, op.Mul(size, _constant(np.float32(grid)[None])))
    if offset is not None:
        start = op.Add(start, op.Mul(size, op.Mul(offset, gamma)))
    # RoiAlign takes as many samples as a bin has pixels, rounded up: a whole number must not come out above itself.
    margin = 1.0 if sampling_ratio > 0 else 1.0 - 1e-5
    extent = op.Mul(size, _constant(np.float32([margin / bins_w, margin / bins_h]).reshape(1, 2, 1, 1)))
    bins = op.Transpose(op.Concat(start, op.Add(start, extent), axis=1), perm=[0, 2, 3, 1])
    images = op.Cast(op.Expand(image, [1, bins_h * bins_w]), to=ir.DataType.INT64)
    pooled = op.RoiAlign(
        input,
        op.Reshape(bins, [-1, 4]),
        op.Reshape(images, [-1]),
        coordinate_transformation_mode="half_pixel",
        output_height=1,
        output_width=1,
        sampling_ratio=max(sampling_ratio, 0),
        spatial_scale=spatial_scale,
    )
    pooled = op.Transpose(op.Reshape(pooled, [-1, bins_h, bins_w, channels]), perm=[0, 3, 1, 2])
    return pooled if mask is None else op.Mul(pooled, mask)


def _batched_nms(boxes, scores, classes, num_classes, iou_threshold):
    """NonMaxSuppression takes a score for each class and box; those of other classes are below the threshold."""
    own = op.Equal(op.Unsqueeze(classes, [0]), _constant(np.arange(num_classes)[:, None]))
    table = op.Where(own, op.Unsqueeze(scores, [0]), _constant(np.float32(-3.4e38)))
    selected = op.NonMaxSuppression(
        op.Unsqueeze(boxes, [0]),
        op.Unsqueeze(table, [0]),
        _constant(np.int64([2**62])),
        _constant(np.float32([iou_threshold])),
        _constant(np.float32([-3.3e38])),
    )
    kept = op.Reshape(op.Slice(selected, [2], [3], [1]), [-1])
    _, order = op.TopK(op.Gather(scores, kept), op.Shape(kept))
    return op.Gather(kept, order)


TRANSLATIONS: dict[Callable, Callable] = {
    torch.ops.dcnv2_d2.deform_conv2d.default: _deform_conv2d,
    torch.ops.dcnv2_d2.deform_roi_pool.default: _deform_roi_pool,
    torch.ops.dcnv2_d2.batched_nms.default: _batched_nms,
}
