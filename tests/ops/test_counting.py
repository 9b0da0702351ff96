"""What the operators count as: torch.utils.flop_counter, fvcore and with it Detectron2's analysis."""

import dcnv2_d2  # noqa: F401  registers with fvcore
import pytest
import torch
from dcnv2_d2 import ops
from dcnv2_d2.layers import ModulatedDeformConv2d
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..reference import deform_conv2d_inputs
from ..reference_pool import deform_roi_pool_inputs
from ..reference_ps_pool import deform_ps_roi_pool_inputs

PIXELS = 2 * 6 * 7  # of the result of CONV, by hand
CONV = {"n": 2, "c": 8, "o": 12, "h": 11, "w": 13, "stride": 2, "groups": 2, "offset_groups": 4}
PRODUCT, SAMPLES = PIXELS * 12 * 4 * 9, 4 * PIXELS * 9 * 8
POOLED = 4 * 6 * 8 * 15 * 4  # four neighbours, boxes, channels, bins, samples


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_convolution():
    tensors, geometry = deform_conv2d_inputs(**CONV, bias=False)
    assert counted(lambda: ops.deform_conv2d(**tensors, **geometry)) == 2 * (PRODUCT + SAMPLES)


@pytest.mark.parametrize(
    "wanted, expected",
    [
        (["input"], PRODUCT + SAMPLES),
        (["offset"], PRODUCT + SAMPLES),
        (["offset", "mask"], PRODUCT + SAMPLES),
        (["weight"], PRODUCT + SAMPLES),
        (["input", "offset", "weight", "mask"], 2 * PRODUCT + 3 * SAMPLES),
    ],
)
def test_gradients_of_a_convolution(wanted, expected):
    tensors, geometry = deform_conv2d_inputs(**CONV, bias=False)
    for name in wanted:
        tensors[name].requires_grad_()
    out = ops.deform_conv2d(**tensors, **geometry)
    assert counted(lambda: out.backward(torch.ones_like(out))) == 2 * expected


@pytest.mark.parametrize("sampling_ratio", [2, -1])
def test_poolings(sampling_ratio):
    tensors, geometry = deform_roi_pool_inputs(sampling_ratio=sampling_ratio)
    out = []
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    assert counted(lambda: out.append(ops.deform_roi_pool(**leaves, **geometry))) == 2 * POOLED
    assert counted(lambda: out[0].backward(torch.ones_like(out[0]))) == 4 * POOLED
    tensors, geometry = deform_ps_roi_pool_inputs(c=8, group_size=2, sampling_ratio=2)
    assert counted(lambda: ops.deform_ps_roi_pool(**tensors, **geometry)) == 2 * POOLED


class Model(nn.Module):
    """The operators as Detectron2's analysis meets them: in a traced model."""

    def __init__(self):
        super().__init__()
        self.conv = ModulatedDeformConv2d(8, 12, 3, stride=2, padding=1, groups=2, offset_groups=4, bias=False)

    def forward(self, x, boxes):
        x = self.conv(x)
        return ops.deform_roi_pool(x, boxes, None, 3, 1.0, 2), ops.deform_ps_roi_pool(x, boxes, None, 3, 1.0, 3)


def detectron2_analysis(*args):
    # Detectron2 0.6 looks for Caffe2, which PyTorch had until 2.4.
    return pytest.importorskip("detectron2.utils.analysis", exc_type=ImportError).FlopCountAnalysis(*args)


@pytest.mark.parametrize("make", [FlopCountAnalysis, detectron2_analysis], ids=["fvcore", "Detectron2"])
def test_fvcore_and_detectron2(make):
    boxes = torch.tensor([[0, 0, 0, 5, 5], [1, 1, 1, 4, 4.0]])
    analysis = make(Model(), (torch.randn(2, 8, 11, 13), boxes))
    operators = analysis.by_operator()
    assert operators["deform_conv2d"] == PRODUCT + SAMPLES
    assert operators["deform_roi_pool"] == 4 * 2 * 12 * 9 * 4
    assert operators["deform_ps_roi_pool"] == 4 * 2 * 12 * 9 * 9
    assert not [name for name in analysis.unsupported_ops() if "dcnv2" in name]
