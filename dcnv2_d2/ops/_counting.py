"""What the operators cost, for torch.utils.flop_counter and for fvcore, on which Detectron2's analysis is built.

One multiplication and addition for each weight and channel, and four for each sample and channel. fvcore counts such a
pair as one operation, PyTorch as two. An adaptive grid of samples (sampling_ratio of 0 or less) is counted as 2 x 2.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from . import _extension  # noqa: F401  without which there are no operators

_ops = torch.ops.dcnv2_d2


def _conv(input, weight, output):
    """(of the product, of the samples), from shapes"""
    pixels, taps = output[0] * math.prod(output[2:]), math.prod(weight[2:])
    return pixels * math.prod(weight), 4 * pixels * taps * input[1]


def _pool(output, sampling_ratio):
    return 4 * math.prod(output) * (sampling_ratio**2 if sampling_ratio > 0 else 4)


@register_flop_formula(_ops.deform_conv2d)
def _(input, offset, weight, *args, out_shape, **kwargs):
    return 2 * sum(_conv(input, weight, out_shape))


@register_flop_formula(_ops.deform_conv2d_backward)
def _(grad, input, offset, weight, mask, stride, padding, dilation, wanted, **kwargs):
    product, samples = _conv(input, weight, grad)
    of_input, of_offset, of_weight, of_mask = wanted
    products = (of_input or of_offset or of_mask) + of_weight
    return 2 * (products * product + (of_input + of_weight + (of_offset or of_mask)) * samples)


@register_flop_formula([_ops.deform_roi_pool, _ops.deform_ps_roi_pool])
def _(input, boxes, offset, mask, output_size, spatial_scale, sampling_ratio, *args, out_shape, **kwargs):
    return 2 * _pool(out_shape, sampling_ratio)


@register_flop_formula([_ops.deform_roi_pool_backward, _ops.deform_ps_roi_pool_backward])
def _(grad, input, boxes, offset, mask, output_size, spatial_scale, sampling_ratio, *args, **kwargs):
    of_input, of_offset, of_mask = args[-1]
    return 2 * (of_input + (of_offset or of_mask)) * _pool(grad, sampling_ratio)


def register_with_fvcore():
    """For every FlopCountAnalysis made from now on, Detectron2's among them."""
    from fvcore.nn.flop_count import _DEFAULT_SUPPORTED_OPS
    from fvcore.nn.jit_handles import get_shape

    def conv(inputs, outputs):
        return sum(_conv(get_shape(inputs[0]), get_shape(inputs[2]), get_shape(outputs[0])))

    def pool(inputs, outputs):
        return _pool(get_shape(outputs[0]), inputs[6].toIValue())

    handles = {"deform_conv2d": conv, "deform_roi_pool": pool, "deform_ps_roi_pool": pool}
    _DEFAULT_SUPPORTED_OPS.update({f"dcnv2_d2::{name}": handle for name, handle in handles.items()})
