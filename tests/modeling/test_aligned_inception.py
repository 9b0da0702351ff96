"""Aligned-Inception-ResNet: its size, its geometry, and its conversion."""

import pytest
import torch
import torch.nn.functional as F
from dcnv2_d2 import add_dcnv2_config
from dcnv2_d2.layers import DeformConv2d, ModulatedDeformConv2d
from dcnv2_d2.modeling.aligned_inception import AlignedInceptionBlock
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone

from ..reference import assert_near

PLAIN, DC5 = "build_dcnv2_aligned_inception_resnet_backbone", "build_dcnv2_aligned_inception_resnet_dc5_backbone"
SMALL = {"RESNETS.STEM_OUT_CHANNELS": 8, "RESNETS.RES2_OUT_CHANNELS": 16}
ALL = ["res2", "res3", "res4", "res5"]


def build(name=PLAIN, **changes):
    cfg = get_cfg()
    add_dcnv2_config(cfg)
    changes = {"DEVICE": "cpu", "BACKBONE.NAME": name, **changes}
    cfg.merge_from_list([x for key, value in changes.items() for x in (f"MODEL.{key}", value)])
    return build_backbone(cfg)


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_parameters_are_those_of_the_appendix():
    """64.38 M with batch norm, 64.25 M without, with the classifier of 1000 classes."""
    with torch.device("meta"):
        options = {"RESNETS.OUT_FEATURES": ["res5"], "BACKBONE.FREEZE_AT": 0}
        with_norm, without = (build(**options, **{"RESNETS.NORM": norm}) for norm in ("BN", "FrozenBN"))
    classifier = 2048 * 1000 + 1000
    assert round((count(with_norm) + classifier) / 1e6, 2) == 64.38
    assert round((count(without) + classifier) / 1e6, 2) == 64.25


@pytest.mark.parametrize("stride, dilation, in_channels", [(1, 1, 16), (2, 1, 24), (1, 2, 24)])
def test_block_equals_the_definition(stride, dilation, in_channels):
    block = AlignedInceptionBlock(in_channels, 16, stride=stride, dilation=dilation, norm="BN").double().eval()
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for value in (module.weight.data, module.running_var):
                value.uniform_(0.5, 1.5)
            for value in (module.bias.data, module.running_mean):
                value.normal_()
    w = {name: p for name, p in block.state_dict().items() if p.dim() == 4}
    assert {name: tuple(p.shape[:2]) for name, p in w.items()} == {
        "branch1_conv1.weight": (4, in_channels),
        "branch1_conv2.weight": (4, 4),
        "branch2_conv1.weight": (2, in_channels),
        "branch2_conv2.weight": (2, 2),
        "branch2_conv3.weight": (2, 2),
        "conv.weight": (16, 6),
        **({} if in_channels == 16 else {"shortcut.weight": (16, in_channels)}),
    }
    x = torch.randn(2, in_channels, 11, 14).double()

    def conv(x, name, step=1):
        size = w[f"{name}.weight"].shape[-1]
        return F.conv2d(x, w[f"{name}.weight"], None, step, dilation * (size // 2), dilation)

    norms = {name: m for name, m in block.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    a = conv(norms["branch1_conv1.norm"](conv(x, "branch1_conv1")).relu(), "branch1_conv2", stride)
    b = norms["branch2_conv1.norm"](conv(x, "branch2_conv1")).relu()
    b = conv(norms["branch2_conv2.norm"](conv(b, "branch2_conv2", stride)).relu(), "branch2_conv3")
    out = norms["conv.norm"](conv(norms["norm"](torch.cat([a, b], 1)).relu(), "conv"))
    shortcut = x if in_channels == 16 else norms["shortcut.norm"](conv(x, "shortcut", stride))
    expected = (out + shortcut).relu()
    assert expected.shape[-2:] == ((6, 7) if stride == 2 else (11, 14))
    assert_near(block(x), expected, 1e-12)


@pytest.mark.parametrize("dilation, last", [(1, 32), (2, 16)])
def test_strides_and_dilation(dilation, last):
    model = build(**SMALL, **{"RESNETS.RES5_DILATION": dilation, "RESNETS.OUT_FEATURES": ALL})
    shapes = model.output_shape()
    strides = {"res2": 4, "res3": 8, "res4": 16, "res5": last}
    assert {name: s.stride for name, s in shapes.items()} == strides
    out = model(torch.randn(1, 3, 64, 96))
    assert {n: tuple(x.shape) for n, x in out.items()} == {
        n: (1, 16 * 2**i, 64 // s, 96 // s) for i, (n, s) in enumerate(strides.items())
    }
    assert [len(getattr(model, stage)) for stage in ALL] == [3, 4, 23, 3]
    found = {
        m.dilation for n, m in model.named_modules() if n.startswith("res5") and getattr(m, "kernel_size", 0) == (3, 3)
    }
    assert found == {(dilation, dilation)}


def test_deformable_by_the_keys_of_the_resnets():
    """A chosen stage has three deformable layers a block; a new one changes nothing."""
    options = {**SMALL, "RESNETS.OUT_FEATURES": ["res4", "res5"], "RESNETS.RES5_DILATION": 2}
    plain = build(**options)
    c5 = {"RESNETS.DEFORM_ON_PER_STAGE": [False, False, False, True], "RESNETS.DEFORM_NUM_GROUPS": 2}
    model = build(**options, **c5)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, DeformConv2d)}
    kinds = ("branch1_conv2", "branch2_conv2", "branch2_conv3")
    assert list(layers) == [f"res5.{block}.{kind}" for block in range(3) for kind in kinds]
    assert all(type(m) is DeformConv2d and m.offset_groups == 2 and m.name == name for name, m in layers.items())
    assert model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []
    x = torch.randn(1, 3, 64, 96)
    for name, expected in plain(x).items():
        assert_near(model(x)[name], expected, 1e-4)
    last = build(**options, **{"DCNV2.DEFORM_LAST": 4, "RESNETS.DEFORM_MODULATED": True})
    names = [name for name, m in last.named_modules() if isinstance(m, ModulatedDeformConv2d)]
    assert names == ["res5.1.branch2_conv3", *(f"res5.2.{kind}" for kind in kinds)]


def test_reduced_and_frozen():
    model = build(DC5, **SMALL, **{"DCNV2.DC5_CHANNELS": 6, "RESNETS.OUT_FEATURES": ["res4", "res5"]})
    assert model.output_shape()["res5"].channels == 6
    assert model(torch.randn(1, 3, 64, 64))["res5"].shape[1] == 6
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad and "bottom_up" in name}
    assert trained == {"res3", "res4", "res5"}
    norm = model.bottom_up.res4[0].norm
    assert isinstance(norm, FrozenBatchNorm2d)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"RESNETS.RES5_DILATION": 4}, "RES5_DILATION must be 1 or 2, got 4"),
        ({"RESNETS.RES2_OUT_CHANNELS": 20}, "out_channels must be a multiple of 8, got 20"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build(**{**SMALL, **changes})
