"""The registered backbones: real Detectron2 ResNets with converted stages."""

import pytest
import torch
from dcnv2_d2 import add_dcnv2_config
from dcnv2_d2.layers import DeformConv2d, ModulatedDeformConv2d
from dcnv2_d2.modeling.backbone import (
    build_resnet_aspp_backbone,
    build_resnet_dc5_backbone,
    build_small_resnet_dc5_backbone,
)
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone

from ..reference import assert_near

STAGES = ["res2", "res3", "res4", "res5"]
C5, C4_C5, C3_C5 = ([stage >= first for stage in range(2, 6)] for first in (5, 4, 3))
RESNET, FPN = "build_dcnv2_resnet_backbone", "build_dcnv2_resnet_fpn_backbone"
RETINANET = "build_dcnv2_retinanet_resnet_fpn_backbone"
DC5, SMALL = "build_dcnv2_resnet_dc5_backbone", "build_dcnv2_small_resnet_dc5_backbone"
ASPP = "build_dcnv2_resnet_aspp_backbone"
R18 = {"RESNETS.DEPTH": 18, "RESNETS.RES2_OUT_CHANNELS": 64}
R50 = {"RESNETS.DEPTH": 50}
R50_IN_3X3 = {"RESNETS.DEPTH": 50, "RESNETS.STRIDE_IN_1X1": False, "RESNETS.RES5_DILATION": 2}
# ResNeXt-50 with all groups, a quarter of the width
X50 = {"RESNETS.DEPTH": 50, "RESNETS.NUM_GROUPS": 32, "RESNETS.WIDTH_PER_GROUP": 2, "RESNETS.RES2_OUT_CHANNELS": 64}
X50["RESNETS.STRIDE_IN_1X1"] = False
TINY = {"RESNETS.STEM_OUT_CHANNELS": 8, "RESNETS.RES2_OUT_CHANNELS": 8}


def make_cfg(name=RESNET, deform=C3_C5, **changes):
    cfg = get_cfg()
    add_dcnv2_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.RESNETS.OUT_FEATURES = STAGES
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = deform
    cfg.MODEL.RESNETS.DEFORM_MODULATED = True
    cfg.MODEL.FPN.IN_FEATURES = STAGES
    cfg.merge_from_list([item for key, value in changes.items() for item in (f"MODEL.{key}", value)])
    cfg.freeze()
    return cfg


def build(*args, **changes):
    return build_backbone(make_cfg(*args, **changes))


def build_plain(name=RESNET, **changes):
    cfg = make_cfg(name, [False] * 4, **changes)
    builders = {
        SMALL: build_small_resnet_dc5_backbone,
        DC5: build_resnet_dc5_backbone,
        ASPP: build_resnet_aspp_backbone,
    }
    builder = builders.get(name) or BACKBONE_REGISTRY.get(name.replace("dcnv2_", ""))
    return builder(cfg, ShapeSpec(channels=3))


def layers(model, kind=DeformConv2d):
    return {name: m for name, m in model.named_modules() if isinstance(m, kind)}


@pytest.mark.parametrize("name", [RESNET, FPN, RETINANET, DC5, ASPP, SMALL])
def test_registered(name):
    assert BACKBONE_REGISTRY.get(name).__name__ == name


@pytest.mark.parametrize(
    "name, changes",
    [
        (RESNET, R18),
        (RESNET, R50),
        (RESNET, R50_IN_3X3),
        (RESNET, X50),
        (FPN, R18),
        (RETINANET, R18),
        (DC5, R50_IN_3X3),
        (ASPP, {**R50_IN_3X3, "DCNV2.DC5_CHANNELS": 64}),
        (SMALL, TINY),
    ],
    ids=["R18", "R50", "R50-dilated", "X50", "FPN", "RetinaNet", "DC5", "ASPP", "small"],
)
def test_conversion_changes_nothing_but_adds_offsets(name, changes):
    plain = build_plain(name, **changes)
    torch.manual_seed(0)
    weights = {k: v + 0.02 * torch.rand_like(v) for k, v in plain.state_dict().items() if v.is_floating_point()}
    plain.load_state_dict(weights, strict=False)
    torch.manual_seed(7)
    model = build(name, **changes, **{"DCNV2.MASK_SCALE": 2.0})
    torch.manual_seed(7)
    fresh = build_plain(name, **changes).state_dict()
    state = model.state_dict()
    added = {f"{layer}.conv_offset.{kind}" for layer in layers(model) for kind in ("weight", "bias")}
    assert state.keys() - fresh.keys() == added
    assert all(torch.equal(state[k], v) for k, v in fresh.items())

    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(result.missing_keys) == added and not result.unexpected_keys
    x = torch.randn(1, 3, 64, 96).double()
    expected, actual = plain.double().eval()(x), model.double().eval()(x)
    assert actual.keys() == expected.keys()
    for feature in expected:
        assert_near(actual[feature], expected[feature], 1e-9, feature)


@pytest.mark.parametrize(
    "depth, deform, freeze_at, count",
    [
        (50, C5, 2, 3),
        (50, C4_C5, 2, 9),
        (50, C3_C5, 2, 13),
        (50, [True] * 4, 1, 16),
        (50, [False, True, False, False], 0, 4),
        (50, [False] * 4, 2, 0),
        (101, C3_C5, 2, 30),
        (18, C3_C5, 2, 12),
        (18, [True] * 4, 0, 16),
    ],
)
def test_number_of_layers(depth, deform, freeze_at, count):
    sizes = R18 if depth == 18 else {"RESNETS.DEPTH": depth}
    with torch.device("meta"):
        model = build(deform=deform, **sizes, **{"BACKBONE.FREEZE_AT": freeze_at})
    found = layers(model, ModulatedDeformConv2d)
    assert len(found) == len(layers(model)) == count
    assert {name.split(".")[0] for name in found} == {s for s, on in zip(STAGES, deform, strict=True) if on}
    if depth > 18:
        assert all(name.endswith(".conv2") for name in found)


@pytest.mark.parametrize("name", [RESNET, FPN, RETINANET])
def test_layers_are_named_by_their_place_in_the_resnet(name):
    names = {layer.name for layer in layers(build(name, **R50)).values()}
    assert names == {f"{s}.{i}.conv2" for s, n in (("res3", 4), ("res4", 6), ("res5", 3)) for i in range(n)}


@pytest.mark.parametrize("modulated, per_tap", [(True, 3), (False, 2)])
@pytest.mark.parametrize("groups", [1, 4])
def test_config_keys(modulated, per_tap, groups):
    changes = {"RESNETS.DEFORM_MODULATED": modulated, "RESNETS.DEFORM_NUM_GROUPS": groups, "DCNV2.MASK_SCALE": 1.5}
    with torch.device("meta"):
        found = layers(build(**R50_IN_3X3, **changes))
    assert len(found) == 13
    for name, layer in found.items():
        assert type(layer) is (ModulatedDeformConv2d if modulated else DeformConv2d)
        assert layer.offset_groups == groups and layer.conv_offset.out_channels == per_tap * 9 * groups
        assert getattr(layer, "mask_scale", 1.5) == 1.5
        assert layer.conv_offset.dilation == layer.dilation == ((2, 2) if name.startswith("res5") else (1, 1))


def test_default_of_modulation_and_groups_is_detectron2s():
    cfg = get_cfg()
    before = cfg.MODEL.RESNETS.clone()
    add_dcnv2_config(cfg)
    assert before == cfg.MODEL.RESNETS and not before.DEFORM_MODULATED and before.DEFORM_NUM_GROUPS == 1
    assert cfg.MODEL.DCNV2.MASK_SCALE == 1.0 and cfg.MODEL.DCNV2.OFFSET_LR_FACTOR == 0.1


@pytest.mark.parametrize("freeze_at", [2, 3])
def test_frozen_stages_stay_frozen(freeze_at):
    deform = C3_C5 if freeze_at == 2 else C4_C5
    model = build(deform=deform, **R18, **{"BACKBONE.FREEZE_AT": freeze_at})
    trainable = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(STAGES[freeze_at - 1 :])
    assert all(p.requires_grad for layer in layers(model).values() for p in layer.parameters())


@pytest.mark.parametrize(
    "deform, changes, words",
    [
        ([True] * 4, {"BACKBONE.FREEZE_AT": 2}, ["res2", "FREEZE_AT = 2", "at most 1"]),
        (C4_C5, {"BACKBONE.FREEZE_AT": 5}, ["res4", "FREEZE_AT = 5", "at most 3"]),
        ([True, True, True], {}, ["DEFORM_ON_PER_STAGE", "4 values", "[True, True, True]"]),
        ([False] * 5, {}, ["DEFORM_ON_PER_STAGE", "4 values"]),
        (C5, {"RESNETS.OUT_FEATURES": ["res4"]}, ["res5", "OUT_FEATURES", "['res4']"]),
        (C3_C5, {"RESNETS.DEFORM_NUM_GROUPS": 3}, ["offset_groups", "got 3"]),
        (C3_C5, {"DCNV2.MASK_SCALE": 0.0}, ["mask_scale", "got 0.0"]),
    ],
)
def test_errors(deform, changes, words):
    with torch.device("meta"), pytest.raises(ValueError) as error:
        build(deform=deform, **{**R18, **changes})
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("name", [RESNET, FPN, SMALL])
def test_no_stage_is_told(name, caplog):
    sentence = f"MODEL.BACKBONE.NAME is {name}, but MODEL.RESNETS.DEFORM_ON_PER_STAGE chooses no stage"
    changes = TINY if name == SMALL else R18
    with torch.device("meta"):
        build(name, [False] * 4, **changes)
        assert [sentence in r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [True]
        caplog.clear()
        build(name, C5, **changes)
        build(name, [False] * 4, **changes, **{"DCNV2.CONVS": ["res5"]})
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize("name", [RESNET, FPN, RETINANET])
def test_config_is_not_modified(name):
    cfg = make_cfg(name, **R18)
    before = cfg.dump()
    build_backbone(cfg)
    assert cfg.dump() == before and cfg.is_frozen()


@pytest.mark.parametrize(
    "name, in_features, levels", [(RETINANET, STAGES[1:], range(3, 8)), (FPN, STAGES, range(2, 7))]
)
def test_pyramid(name, in_features, levels):
    model = build(name, **R18, **{"FPN.IN_FEATURES": in_features, "FPN.OUT_CHANNELS": 16})
    out = model(torch.randn(2, 3, 128, 256))
    assert {k: tuple(v.shape) for k, v in out.items()} == {f"p{i}": (2, 16, 128 // 2**i, 256 // 2**i) for i in levels}
    assert {k: s.stride for k, s in model.output_shape().items()} == {f"p{i}": 2**i for i in levels}


def test_dc5_keeps_stride_16_and_reduces_res5():
    model = build(DC5, **R50_IN_3X3, **{"RESNETS.OUT_FEATURES": ["res4", "res5"]})
    out = model(torch.randn(1, 3, 64, 96))
    assert {k: tuple(v.shape) for k, v in out.items()} == {"res4": (1, 1024, 4, 6), "res5": (1, 256, 4, 6)}
    assert {k: (s.channels, s.stride) for k, s in model.output_shape().items()} == {
        "res4": (1024, 16),
        "res5": (256, 16),
    }


def test_aspp_samples_with_the_dilations_of_deeplab_v3():
    changes = {"RESNETS.OUT_FEATURES": ["res5"], "DCNV2.DC5_CHANNELS": 32, "SEM_SEG_HEAD.NORM": "BN"}
    model = build(ASPP, **R50_IN_3X3, **changes)
    assert [conv.dilation[0] for conv in list(model.reduce.convs)[:4]] == [1, 6, 12, 18]
    assert not layers(model.reduce) and model.size_divisibility == 16
    (out,) = model(torch.randn(2, 3, 64, 96)).values()
    assert out.shape == (2, 32, 4, 6) and (out >= 0).all()
    assert model.output_shape()["res5"].channels == 32 and model.output_shape()["res5"].stride == 16


def test_small_resnet():
    model = build(SMALL, **TINY, **{"BACKBONE.FREEZE_AT": 0, "DCNV2.DC5_CHANNELS": 6})
    out = model(torch.randn(1, 3, 64, 96))
    shapes = {"res2": (1, 8, 16, 24), "res3": (1, 16, 8, 12), "res4": (1, 32, 8, 12), "res5": (1, 6, 8, 12)}
    assert {k: tuple(v.shape) for k, v in out.items()} == shapes
    assert {k: (s.channels, s.stride) for k, s in model.output_shape().items()} == {
        k: (shape[1], 64 // shape[2]) for k, shape in shapes.items()
    }
    assert len(layers(model)) == 12
