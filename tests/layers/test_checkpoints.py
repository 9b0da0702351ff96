"""Copies and checkpoints of deformable layers, and the names that other people's checkpoints use."""

import copy
import io

import pytest
import torch
from dcnv2_d2.layers import DeformConv2d, ModulatedDeformConv2d, replace_convs
from detectron2.layers import Conv2d
from torch import nn
from torch.nn import functional as F

CLASSES = [DeformConv2d, ModulatedDeformConv2d]


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file])
@pytest.mark.parametrize("cls", CLASSES)
def test_copies(cls, copied):
    layer = cls(4, 8, 3, padding=1, offset_groups=2, norm=nn.BatchNorm2d(8), activation=F.relu)
    layer.name = "res3.0.conv2"
    nn.init.normal_(layer.conv_offset.weight)
    other, x = copied(layer), torch.randn(2, 4, 9, 12)
    assert repr(other) == repr(layer) and other.name == layer.name
    assert torch.equal(other(x), layer(x))
    nn.init.zeros_(other.weight)
    assert layer.weight.all()


@pytest.mark.parametrize("cls", CLASSES)
def test_state_dict_names(cls):
    own = {"weight", "conv_offset.weight", "conv_offset.bias"}
    assert set(cls(4, 4, 3, bias=False).state_dict()) == own
    assert set(cls(4, 4, 3).state_dict()) == own | {"bias"}
    converted = cls.from_conv(Conv2d(4, 4, 3, norm=nn.GroupNorm(2, 4)))
    assert set(converted.state_dict()) == own | {"bias", "norm.weight", "norm.bias"}


def converted_model(modulated=True):
    inner = nn.Sequential()
    inner.add_module("conv1", nn.Conv2d(4, 4, 3))
    inner.add_module("conv2", nn.Conv2d(4, 4, 3))
    model = nn.Sequential(nn.Conv2d(2, 4, 3), inner)  # 0, 1.conv1, 1.conv2
    replace_convs(model, r"^0|conv2", modulated=modulated)
    return model


SPELLINGS = {
    "mmcv": ".conv_offset.",
    "old mmcv": ".conv_offset_mask.",
    "Detectron2": "_offset.",
}


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, through_a_file], ids=["itself", "deepcopy", "saved"])
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_loads_every_spelling(spelling, modulated, copied):
    model = copied(converted_model(modulated))
    expected = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    given = {name.replace(".conv_offset.", spelling): value for name, value in expected.items()}
    names = list(given)
    model.load_state_dict(given, strict=True)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert list(given) == names  # the caller's dictionary
    assert model.state_dict().keys() == expected.keys()


@pytest.mark.parametrize("cls", CLASSES)
def test_a_layer_of_its_own_loads_conv_offset_mask(cls):
    layer = cls(4, 4, 3)
    expected = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
    layer.load_state_dict({name.replace("conv_offset", "conv_offset_mask"): v for name, v in expected.items()})
    assert all(torch.equal(value, expected[name]) for name, value in layer.state_dict().items())


def test_what_does_not_fit_is_still_reported():
    model = converted_model()
    given = model.state_dict()
    given["1.conv1_offset.weight"] = given["1.conv3_offset.weight"] = given.pop("1.conv2.conv_offset.weight")
    result = model.load_state_dict(given, strict=False)
    assert result.missing_keys == ["1.conv2.conv_offset.weight"]
    assert sorted(result.unexpected_keys) == ["1.conv1_offset.weight", "1.conv3_offset.weight"]
