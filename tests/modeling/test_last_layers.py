"""Deformable layers counted from the end, their dilation, and the dilation of what predicts their offsets."""

import pytest
import torch
from dcnv2_d2 import add_dcnv2_config
from dcnv2_d2.config import check_config
from dcnv2_d2.layers import DeformConv2d, ModulatedDeformConv2d
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone

from ..reference import assert_near

RESNET = "build_dcnv2_resnet_backbone"


def make_cfg(name=RESNET, **changes):
    cfg = get_cfg()
    add_dcnv2_config(cfg)
    small = {
        "DEVICE": "cpu",
        "BACKBONE.NAME": name,
        "RESNETS.DEPTH": 101,
        "RESNETS.STEM_OUT_CHANNELS": 8,
        "RESNETS.RES2_OUT_CHANNELS": 16,
        "RESNETS.WIDTH_PER_GROUP": 4,
        "RESNETS.RES5_DILATION": 2,
        "RESNETS.OUT_FEATURES": ["res4", "res5"],
    }
    cfg.merge_from_list([x for key, value in {**small, **changes}.items() for x in (f"MODEL.{key}", value)])
    return cfg


def build(name=RESNET, **changes):
    return build_backbone(make_cfg(name, **changes))


def deformable(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, DeformConv2d)}


LAST_SIX = [*(f"res4.{i}.conv2" for i in (20, 21, 22)), *(f"res5.{i}.conv2" for i in (0, 1, 2))]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("name, prefix", [(RESNET, ""), ("build_dcnv2_resnet_dc5_backbone", "bottom_up.")])
def test_so_many_layers_from_the_end(count, name, prefix):
    """Those of Table 1: res5c, res5b-c, res5a-c, and res4b20-22."""
    with torch.device("meta"):
        layers = deformable(build(name, **{"DCNV2.DEFORM_LAST": count, "RESNETS.DEFORM_NUM_GROUPS": 2}))
    assert list(layers) == [prefix + n for n in LAST_SIX[len(LAST_SIX) - count :]]
    assert all(type(m) is DeformConv2d and m.offset_groups == 2 for m in layers.values())
    assert [m.name for m in layers.values()] == LAST_SIX[len(LAST_SIX) - count :]


def test_modulated():
    options = {"DCNV2.DEFORM_LAST": 2, "RESNETS.DEFORM_MODULATED": True, "DCNV2.MASK_SCALE": 2.0}
    with torch.device("meta"):
        layers = deformable(build(**options))
    assert [type(m) for m in layers.values()] == [ModulatedDeformConv2d] * 2
    assert {m.mask_scale for m in layers.values()} == {2.0}


@pytest.mark.parametrize("dilation", [4, 8])
def test_dilation_of_the_last_three(dilation):
    """It equals the convolution with that dilation, and sizes stay."""
    plain, model = build(), build(**{"DCNV2.LAST_DILATION": dilation})
    assert model.load_state_dict(plain.state_dict()).missing_keys == []
    found = {name: m.dilation for name, m in model.named_modules() if getattr(m, "kernel_size", 0) == (3, 3)}
    assert {name for name, d in found.items() if d == (dilation,) * 2} == set(LAST_SIX[3:])
    assert {d for name, d in found.items() if name not in LAST_SIX[3:]} == {(1, 1)}
    x = torch.randn(1, 3, 64, 80)
    plain_out, out = plain(x), model(x)
    assert out["res5"].shape == plain_out["res5"].shape and torch.equal(out["res4"], plain_out["res4"])
    conv = plain.res5[0].conv2
    conv.dilation = conv.padding = (dilation, dilation)
    assert torch.equal(model.res5[0](out["res4"]), plain.res5[0](out["res4"]))


@pytest.mark.parametrize(
    "keys, count", [({"DCNV2.DEFORM_LAST": 1}, 1), ({"RESNETS.DEFORM_ON_PER_STAGE": [False, False, False, True]}, 3)]
)
def test_dilation_and_deformation_together(keys, count):
    layers = deformable(build(**{"DCNV2.LAST_DILATION": 4, **keys}))
    assert len(layers) == count
    for layer in layers.values():
        assert layer.dilation == layer.conv_offset.dilation == layer.padding == layer.conv_offset.padding == (4, 4)


@pytest.mark.parametrize(
    "keys", [{"DCNV2.DEFORM_LAST": 3}, {"RESNETS.DEFORM_ON_PER_STAGE": [False, False, False, True]}]
)
def test_undilated_prediction(keys):
    x = torch.randn(1, 3, 64, 80)
    expected = build()
    model = build(**keys, **{"DCNV2.OFFSET_DILATION": False})
    model.load_state_dict(expected.state_dict(), strict=False)
    layers = deformable(model)
    assert list(layers) == LAST_SIX[3:]
    for layer in layers.values():
        assert layer.dilation == (2, 2) and layer.conv_offset.dilation == layer.conv_offset.padding == (1, 1)
    assert_near(model(x)["res5"], expected(x)["res5"], 1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"DCNV2.DEFORM_LAST": -1}, "DEFORM_LAST must not be negative, got -1"),
        ({"DCNV2.DEFORM_LAST": 34}, "DEFORM_LAST = 34 changes 34 layers, but the backbone has 33"),
        ({"DCNV2.LAST_DILATION": -2}, "LAST_DILATION must not be negative, got -2"),
        ({"DCNV2.DEFORM_LAST": 31}, "DEFORM_LAST = 31 reaches res2, which .*FREEZE_AT = 2 freezes; .* at most 1"),
        (
            {"DCNV2.DEFORM_LAST": 3, "RESNETS.DEFORM_ON_PER_STAGE": [False, False, False, True]},
            "DEFORM_LAST must be 0 beside MODEL.RESNETS.DEFORM_ON_PER_STAGE .*, got 3",
        ),
        (
            {"DCNV2.LAST_DILATION": 4, "RESNETS.RES5_DILATION": 1, "RESNETS.STRIDE_IN_1X1": False},
            r"stride of 1 .*\(2, 2\)",
        ),
    ],
)
def test_errors(changes, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize("key", ["DEFORM_LAST", "LAST_DILATION"])
def test_detectron2s_own_builders_are_refused(key):
    with pytest.raises(ValueError, match=r"NAME must be build_dcnv2_resnet_backbone for .* got build_resnet_backbone"):
        check_config(make_cfg("build_resnet_backbone", **{f"DCNV2.{key}": 3}))
