"""replace_convs on models of other people."""

import re

import pytest
import torch
import torchvision
from dcnv2_d2.analysis import record_sampling
from dcnv2_d2.layers import DeformConv2d, ModulatedDeformConv2d, replace_convs
from detectron2.modeling.backbone import FPN, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem
from torch import nn

from ..reference import assert_near


def resnet18():
    return torchvision.models.resnet18(weights=None).double().eval()


def deformable(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, DeformConv2d)}


STRIDE_2 = ["conv1", "layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1"]  # without the 1x1 shortcuts
LAYER_3_AND_4 = [f"layer{stage}.{block}.conv2" for stage in (3, 4) for block in (0, 1)]
CHOICES = [
    (r"layer[34]\..*conv2", LAYER_3_AND_4),
    (r"^conv1$", ["conv1"]),
    (lambda name, conv: conv.stride == (2, 2), STRIDE_2),
    (lambda name, conv: "layer4" in name and conv.in_channels == 256, ["layer4.0.conv1"]),
]


@pytest.mark.parametrize("where, names", CHOICES)
def test_chosen_names_and_nothing_else(where, names):
    model = resnet18()
    before, modules = dict(model.named_parameters()), dict(model.named_modules())
    assert replace_convs(model, where) == names
    assert list(deformable(model)) == names
    assert {name for name, layer in deformable(model).items() if layer.name == name} == set(names)
    after = dict(model.named_parameters())
    added = {f"{name}.conv_offset.{kind}" for name in names for kind in ("weight", "bias")}
    assert after.keys() - before.keys() == added
    assert all(after[name] is p for name, p in before.items())
    now = dict(model.named_modules())
    assert {name for name, m in modules.items() if now[name] is not m} == set(names)


@pytest.mark.parametrize("modulated, mask_scale", [(True, 2.0), (False, 1.0)])
def test_function_of_the_model_is_kept(modulated, mask_scale):
    model, x = resnet18(), torch.randn(2, 3, 45, 64, dtype=torch.float64)
    expected = model(x)
    names = replace_convs(model, "", modulated=modulated, mask_scale=mask_scale)
    assert len(names) == 17
    assert_near(model(x), expected, 1e-10)


@pytest.mark.parametrize("offset_groups", [1, 4])
@pytest.mark.parametrize("modulated, cls, per_tap", [(True, ModulatedDeformConv2d, 3), (False, DeformConv2d, 2)])
def test_options(modulated, cls, per_tap, offset_groups):
    model = resnet18()
    replace_convs(model, "layer4", modulated=modulated, offset_groups=offset_groups, mask_scale=1.5)
    layers = deformable(model).values()
    assert len(layers) == 4
    for layer in layers:
        assert type(layer) is cls
        assert layer.conv_offset.out_channels == per_tap * 9 * layer.offset_groups == per_tap * 9 * offset_groups
        if modulated:
            assert layer.mask_scale == 1.5


def test_twice_is_once():
    model = resnet18()
    replace_convs(model, "layer4")
    layers, names = deformable(model), list(model.state_dict())
    assert replace_convs(model, "layer4", modulated=False, offset_groups=2) == []
    assert replace_convs(model, lambda name, conv: "layer4" in name) == []
    assert deformable(model) == layers and list(model.state_dict()) == names
    # A wider choice adds what is missing.
    assert replace_convs(model, r"layer[34]\.1") == ["layer3.1.conv1", "layer3.1.conv2"]
    assert deformable(model).items() >= layers.items()


def test_prediction_convolutions_are_never_chosen():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), DeformConv2d(4, 4, 3))
    asked = []
    assert replace_convs(model, lambda name, conv: asked.append(name) or True) == ["0"]
    assert replace_convs(model, lambda name, conv: asked.append(name) or True) == []
    assert asked == ["0", "1", "0", "1"]
    with pytest.raises(ValueError, match="conv_offset"):
        replace_convs(model, "conv_offset")


def test_only_1x1_is_passed_over():
    kernels = [1, (1, 3), (3, 1), 2, (1, 1)]
    model = nn.Sequential(
        *(nn.Conv2d(4, 4, kernel) for kernel in kernels), nn.ConvTranspose2d(4, 4, 3), nn.Linear(4, 4)
    )
    assert replace_convs(model, "") == ["1", "2", "3"]


@pytest.mark.parametrize("where", [r"layer9\.conv2", "downsample", lambda name, conv: False], ids=str)
def test_nothing_chosen(where):
    model = resnet18()
    with pytest.raises(ValueError, match=f"where .*got {re.escape(repr(where))}"):
        replace_convs(model, where)
    assert not deformable(model)


def test_convolutions_that_cannot_be_converted():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))
    with pytest.raises(ValueError, match="circular"):
        replace_convs(model, "1")
    with pytest.raises(ValueError, match="offset_groups must divide in_channels .4., got 3"):
        replace_convs(model, "0", offset_groups=3)
    assert not deformable(model)


def test_a_convolution_by_itself_has_no_place_to_be_replaced():
    conv = nn.Conv2d(4, 4, 3)
    with pytest.raises(ValueError):
        replace_convs(conv, "")
    assert not list(conv.children())


def test_a_convolution_in_two_places_becomes_one_layer():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    replace_convs(model, "")
    assert isinstance(model[0], ModulatedDeformConv2d) and model[2] is model[0]


def test_detectron2_fpn():
    stem = BasicStem(3, 8, norm="BN")
    stages = [
        ResNet.make_stage(BasicBlock, 1, stride_per_block=[1], in_channels=8, out_channels=8),
        ResNet.make_stage(BasicBlock, 1, stride_per_block=[2], in_channels=8, out_channels=16),
    ]
    model = FPN(ResNet(stem, stages, out_features=["res2", "res3"]), ["res2", "res3"], 8).eval()
    x = torch.randn(1, 3, 32, 64)
    expected = model(x)
    names = ["fpn_output2", "fpn_output3"]
    assert replace_convs(model, "fpn_", mask_scale=2.0) == names  # the lateral ones are 1x1
    with record_sampling(model) as records:
        actual = model(x)
    assert {name: actual[name].shape for name in actual} == {name: expected[name].shape for name in expected}
    for name in expected:
        assert_near(actual[name], expected[name], 1e-5, name)
    assert sorted(record.name for record in records) == names, "the FPN must run the new layers"


def test_root_of_a_sequential():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1)).double()
    x = torch.randn(2, 3, 9, 12, dtype=torch.float64)
    expected = model(x)
    assert replace_convs(model, "", mask_scale=2.0) == ["0", "2"]
    assert [type(m).__name__ for m in model] == ["ModulatedDeformConv2d", "ReLU", "ModulatedDeformConv2d"]
    assert_near(model(x), expected, 1e-12)
