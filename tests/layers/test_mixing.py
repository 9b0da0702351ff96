"""replace_convs on real parts of detectors and on the style of other libraries; its dry run and its refusals."""

import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from dcnv2_d2.layers import DeformConv2d, ModulatedDeformConv2d, replace_convs
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead
from torch import nn

from ..models import MASK, detect, make_model
from ..reference import assert_near


def assert_all_offsets_learn(output, layers):
    sum(t.square().sum() for t in output).backward()
    for layer in layers:
        assert layer.conv_offset.weight.grad.abs().max() > 0, layer.name


def deformable(model):
    return [m for m in model.modules() if isinstance(m, DeformConv2d)]


@pytest.mark.parametrize("modulated", [True, False])
def test_retinanet_head(modulated):
    """Its towers run on every level; the function stays, and every layer learns."""
    cfg = get_cfg()
    head = RetinaNetHead(cfg, [ShapeSpec(channels=16, stride=s) for s in (8, 16)])
    maps = [torch.randn(2, 16, 12, 9), torch.randn(2, 16, 6, 5)]
    expected = head(maps)
    pattern = r"^(cls|bbox)_subnet"
    assert len(replace_convs(head, pattern, modulated=modulated, mask_scale=2.0)) == 8
    actual = head(maps)
    for a, e in zip(sum(actual, []), sum(expected, []), strict=True):
        assert_near(a, e, 1e-5)
    assert_all_offsets_learn(sum(actual, []), deformable(head))


def test_mask_head():
    """It keeps a list of its convolutions beside the modules."""
    shape = ShapeSpec(channels=32, width=14, height=14)
    head = MaskRCNNConvUpsampleHead(shape, num_classes=3, conv_dims=[32, 32, 32], conv_norm="GN")
    x = torch.randn(2, 32, 14, 14)
    expected = head.layers(x)
    assert replace_convs(head, "mask_fcn", mask_scale=2.0) == ["mask_fcn1", "mask_fcn2"]
    assert_near(head.layers(x), expected, 1e-5)
    assert_all_offsets_learn([head.layers(x)], deformable(head))


def test_a_whole_detector():
    """FPN's own 3x3 convolutions and the mask head of a Mask R-CNN whose backbone is deformable already."""
    options = [
        "MODEL.ROI_HEADS.NUM_CLASSES",
        "5",
        "MODEL.ROI_BOX_HEAD.FC_DIM",
        "64",
        "MODEL.ROI_MASK_HEAD.CONV_DIM",
        "16",
    ]
    model = make_model(MASK, *options, "MODEL.RPN.POST_NMS_TOPK_TEST", "30")
    image = torch.rand(3, 64, 96) * 255
    before, expected = len(deformable(model)), detect(model, image)
    names = replace_convs(model, r"fpn_output\d|mask_fcn\d", mask_scale=2.0)
    assert len(names) == 4 + 4 and len(deformable(model)) == before + 8
    actual = detect(model, image)
    assert len(expected) > 10
    assert_near(actual.pred_boxes.tensor, expected.pred_boxes.tensor, 1e-4)
    assert_near(actual.scores, expected.scores, 1e-4)


class ConvNormAct(nn.Module):
    """As timm builds its models: plain nn.Conv2d, called by its module."""

    def __init__(self, inputs, outputs, kernel, stride=1, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return F.silu(self.bn(self.conv(x)))


class InvertedBottleneck(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv_pw = ConvNormAct(channels, 2 * channels, 1)
        self.conv_dw = ConvNormAct(2 * channels, 2 * channels, 5, groups=2 * channels)
        self.conv_pwl = ConvNormAct(2 * channels, channels, 1)

    def forward(self, x):
        return x + self.conv_pwl(self.conv_dw(self.conv_pw(x)))


def timm_style():
    return nn.Sequential(ConvNormAct(3, 8, 3, stride=2), InvertedBottleneck(8), InvertedBottleneck(8)).eval()


@pytest.mark.parametrize("where", [r"\d\.conv_dw\.conv", lambda name, conv: conv.groups == conv.in_channels > 1])
def test_timm_style(where):
    model, x = timm_style(), torch.randn(2, 3, 24, 16)
    expected = model(x)
    assert replace_convs(model, where, mask_scale=2.0) == ["1.conv_dw.conv", "2.conv_dw.conv"]
    assert_near(model(x), expected, 1e-5)
    assert_all_offsets_learn([model(x)], deformable(model))


class Conv2dSame(nn.Conv2d):
    """As in timm's models that came from TensorFlow: it pads by the size of the input."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


def test_convolutions_with_a_forward_of_their_own_are_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), Conv2dSame(4, 4, 3))
    with pytest.raises(ValueError, match="conv must be a plain convolution, got a Conv2dSame, whose own forward"):
        replace_convs(model, "")
    assert not deformable(model), "nothing is replaced if something cannot be"
    assert replace_convs(model, "0") == ["0"]


def test_dry_run(capsys):
    model = torchvision.models.resnet18(weights=None)
    modules = list(model.modules())
    names = replace_convs(model, r"layer4\..*conv", dry_run=True)
    assert list(model.modules()) == modules and not model._load_state_dict_pre_hooks
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "layer4.0.conv1: 3x3 256 -> 512, ModulatedDeformConv2d, +62,235 parameters"
    assert [line.split(":")[0] for line in printed[:-1]] == names
    before = sum(p.numel() for p in model.parameters())
    assert replace_convs(model, r"layer4\..*conv") == names and capsys.readouterr().out == ""
    added = sum(p.numel() for p in model.parameters()) - before
    assert printed[-1] == f"4 convolutions would become deformable, +{added:,} parameters"
    assert replace_convs(model, r"layer4\..*conv", modulated=False, dry_run=True) == []
    assert capsys.readouterr().out == "0 convolutions would become deformable, +0 parameters\n"


def test_dry_run_of_v1(capsys):
    replace_convs(nn.Sequential(nn.Conv2d(4, 8, (3, 5))), "0", modulated=False, offset_groups=2, dry_run=True)
    added = 2 * 2 * 15 * (4 * 15 + 1)
    assert capsys.readouterr().out.startswith(f"0: 3x5 4 -> 8, DeformConv2d, +{added:,} parameters")


@pytest.mark.parametrize(
    "where", ["downsample", lambda name, conv: conv.kernel_size == (1, 1)], ids=["name", "function"]
)
def test_targets_of_1x1_only_are_refused(where):
    model = torchvision.models.resnet18(weights=None)
    sentence = f"got {where!r}, which finds 1x1 ones only: layer2.0.downsample.0, layer3.0.downsample.0"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        replace_convs(model, where)


def test_deformable_targets():
    """A deformable layer by itself is refused; in a model it is passed over."""
    layer = ModulatedDeformConv2d(4, 4, 3)
    with pytest.raises(ValueError, match="conv must be an nn.Conv2d that is not deformable yet, got Modulated"):
        DeformConv2d.from_conv(layer)
    assert replace_convs(nn.Sequential(layer), "0") == []
