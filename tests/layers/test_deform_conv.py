"""The layers: what they compute and what they take over from a convolution."""

import copy
import math

import pytest
import torch
import torchvision
from dcnv2_d2.layers import DeformConv2d, ModulatedDeformConv2d
from detectron2.layers import Conv2d
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn import functional as F

from ..reference import TOLERANCE, assert_near

CLASSES = [DeformConv2d, ModulatedDeformConv2d]
GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 3), "dilation": (2, 1), "groups": 2, "offset_groups": 3},
    {"kernel_size": (2, 3), "stride": (1, 3), "dilation": (1, 2), "bias": False, "offset_groups": 4},
    {"kernel_size": 1, "stride": 2, "groups": 4},
]


def make(cls, geometry, dtype=torch.float64, device="cpu", predict=None, **kwargs):
    """A layer from 12 to 8 channels; with `predict` its offsets have about that many pixels."""
    layer = cls(12, 8, **geometry, **kwargs).to(device, dtype)
    if predict:
        for p in layer.conv_offset.parameters():
            nn.init.normal_(p, std=predict / math.sqrt(layer.conv_offset.weight[0].numel()))
    return layer


def image(n=2, dtype=torch.float64, device="cpu"):
    return torch.randn(n, 12, 11, 14, dtype=dtype, device=device)


def geometry_of(conv):
    return {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mask_scale", [None, 0.5, 1.0, 2.0], ids="mask_scale={}".format)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_fresh_layer_is_the_convolution_times_half_of_mask_scale(geometry, mask_scale, dtype, device):
    cls, factor, kwargs = DeformConv2d, 1, {}
    if mask_scale is not None:
        cls, factor, kwargs = ModulatedDeformConv2d, mask_scale / 2, {"mask_scale": mask_scale}
    layer, x = make(cls, geometry, dtype, device, **kwargs), image(dtype=dtype, device=device)
    weight, bias = (None if p is None else p.double() for p in (layer.weight, layer.bias))
    expected = F.conv2d(x.double(), weight * factor, bias, groups=layer.groups, **geometry_of(layer))
    assert_near(layer(x), expected, TOLERANCE[dtype])


def test_mask_scale_is_one_by_default():
    assert ModulatedDeformConv2d(4, 4, 3).predict(torch.zeros(1, 4, 3, 3))[1].unique().tolist() == [0.5]
    conv = nn.Conv2d(4, 4, 3)
    assert ModulatedDeformConv2d.from_conv(conv).predict(torch.zeros(1, 4, 3, 3))[1].unique().tolist() == [0.5]


@pytest.mark.parametrize("cls, per_tap", [(DeformConv2d, 2), (ModulatedDeformConv2d, 3)])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_prediction_convolution(geometry, cls, per_tap):
    layer = cls(12, 8, **geometry)
    conv, taps = layer.conv_offset, math.prod(layer.kernel_size)
    assert (conv.in_channels, conv.out_channels) == (12, per_tap * geometry.get("offset_groups", 1) * taps)
    assert conv.kernel_size == layer.kernel_size and geometry_of(conv) == geometry_of(layer) and conv.groups == 1
    assert not conv.weight.any() and not conv.bias.any()


@pytest.mark.parametrize("cls", CLASSES)
def test_a_fresh_layer_learns_to_bend(cls, device):
    layer = make(cls, GEOMETRIES[1], device=device)
    layer(image(device=device)).square().sum().backward()
    assert all(grad.any() for grad in gradients(layer).values())


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_predict_and_forward_match_torchvision(geometry, cls, device):
    kwargs = {"mask_scale": 1.5} if cls is ModulatedDeformConv2d else {}
    layer, x = make(cls, geometry, device=device, predict=3, **kwargs), image(device=device)
    offset, mask = layer.predict(x)
    by_hand = copy.deepcopy(layer)
    prediction = by_hand.conv_offset(x)
    split = 2 * layer.offset_groups * math.prod(layer.kernel_size)
    expected_mask = None
    if cls is ModulatedDeformConv2d:
        expected_mask = 1.5 * torch.sigmoid(prediction[:, split:])
        assert_near(mask, expected_mask, 1e-12)
    else:
        assert mask is None
    assert torch.equal(offset, prediction[:, :split]) and offset.abs().max() > 2
    expected = torchvision.ops.deform_conv2d(
        x, prediction[:, :split], by_hand.weight, by_hand.bias, **geometry_of(layer), mask=expected_mask
    )
    actual = layer(x)
    assert_near(actual, expected, 1e-12)
    actual.square().sum().backward()
    expected.square().sum().backward()
    for name, grad in gradients(by_hand).items():
        assert_near(gradients(layer)[name], grad, 1e-11, name)


@pytest.mark.parametrize("activation", [F.relu, nn.Sigmoid(), None])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, None])
@pytest.mark.parametrize("cls", CLASSES)
def test_norm_then_activation(cls, norm, activation):
    norm = norm(8).double() if norm else None
    if norm:
        nn.init.constant_(norm.bias, -0.5)
    layer = make(cls, GEOMETRIES[0], norm=norm, activation=activation, predict=1).eval()
    bare, x = copy.deepcopy(layer), image()
    bare.norm = bare.activation = None
    expected = bare(x)
    for step in (norm, activation):
        expected = step(expected) if step else expected
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls, kwargs", [(DeformConv2d, {}), (ModulatedDeformConv2d, {"mask_scale": 2.0})])
@pytest.mark.parametrize("bias", [True, False])
def test_from_conv_takes_over(bias, cls, kwargs, training, device):
    norm, activation = nn.BatchNorm2d(8), nn.LeakyReLU()
    conv = Conv2d(12, 8, (3, 5), (2, 1), (1, 3), (2, 1), 4, bias, norm=norm, activation=activation)
    conv = conv.to(device, torch.float64).train(training)
    x = image(device=device)
    expected = copy.deepcopy(conv)(x)
    layer = cls.from_conv(conv, offset_groups=2, **kwargs)
    assert type(layer) is cls and layer.groups == 4 and layer.offset_groups == 2
    assert layer.weight is conv.weight and layer.bias is conv.bias
    assert layer.norm is norm and layer.activation is activation
    assert geometry_of(layer) == geometry_of(conv) and layer.kernel_size == conv.kernel_size
    assert {m.training for m in layer.modules()} == {training}
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert_near(layer(x), expected, 1e-12)


def test_from_conv_keeps_a_frozen_norm_frozen():
    conv = Conv2d(4, 4, 3, norm=nn.BatchNorm2d(4))
    conv.norm.eval()
    layer = ModulatedDeformConv2d.from_conv(conv)
    assert layer.training and not layer.norm.training


def test_from_conv_of_a_frozen_or_meta_or_half_convolution():
    frozen = DeformConv2d.from_conv(nn.Conv2d(4, 4, 3).requires_grad_(False))
    trainable = {name for name, p in frozen.named_parameters() if p.requires_grad}
    assert trainable == {"conv_offset.weight", "conv_offset.bias"}
    assert DeformConv2d.from_conv(nn.Conv2d(4, 4, 3, device="meta")).conv_offset.weight.is_meta
    assert DeformConv2d.from_conv(nn.Conv2d(4, 4, 3).bfloat16()).conv_offset.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "conv, kwargs, words",
    [
        (lambda: nn.ConvTranspose2d(4, 4, 3), {}, ["conv", "nn.Conv2d", "ConvTranspose2d"]),
        (lambda: nn.Conv3d(4, 4, 3), {}, ["conv", "nn.Conv2d", "Conv3d"]),
        (lambda: nn.Linear(4, 4), {}, ["conv", "nn.Conv2d", "Linear"]),
        (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), {}, ["padding_mode", "reflect"]),
        (lambda: nn.Conv2d(4, 4, (3, 2), padding="same"), {}, ["padding", "same", "(3, 2)"]),
        (lambda: DeformConv2d(4, 4, 3), {}, ["deformable", "DeformConv2d"]),
        (lambda: ModulatedDeformConv2d(4, 4, 3), {}, ["deformable", "ModulatedDeformConv2d"]),
        (lambda: nn.Conv2d(4, 4, 3), {"offset_groups": 3}, ["offset_groups", "4", "got 3"]),
        (lambda: nn.Conv2d(4, 4, 3), {"offset_groups": 8}, ["offset_groups", "4", "got 8"]),
        (lambda: nn.Conv2d(4, 4, 3), {"offset_groups": 0}, ["offset_groups", "got 0"]),
        (lambda: nn.Conv2d(4, 4, 3), {"offset_groups": -2}, ["offset_groups", "got -2"]),
    ],
)
def test_from_conv_errors(conv, kwargs, words, cls):
    with pytest.raises(ValueError) as error:
        cls.from_conv(conv(), **kwargs)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("mask_scale", [0, -1.0, math.nan])
def test_mask_scale_error(mask_scale):
    with pytest.raises(ValueError, match=f"mask_scale must be above 0, got {mask_scale}"):
        ModulatedDeformConv2d(4, 4, 3, mask_scale=mask_scale)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("geometry", GEOMETRIES[:2])
def test_empty_batch(geometry, cls, training, device):
    layer = make(cls, geometry, device=device).train(training)
    x = image(0, device=device).requires_grad_()
    with EventStorage() as storage:
        out = layer(x)
    assert out.shape == (0, *layer(image(1, device=device)).shape[1:])
    out.sum().backward()
    assert x.grad.shape == x.shape
    # Distributed training waits for every parameter's gradient.
    assert all(grad is not None and not grad.any() for grad in gradients(layer).values())
    assert not storage.latest()


@pytest.mark.parametrize("cls", CLASSES)
def test_autocast(cls, device):
    layer = make(cls, GEOMETRIES[1], torch.float32, device, predict=0.5)
    x = image(dtype=torch.float32, device=device)
    expected = layer(x)
    expected.sum().backward()
    grads = gradients(layer)
    layer.zero_grad()
    with torch.autocast(device, torch.bfloat16):
        actual = layer(x)
    assert actual.dtype == torch.bfloat16
    assert_near(actual, expected, 0.03)
    actual.sum().backward()
    for name, grad in gradients(layer).items():
        assert grad.dtype == torch.float32
        # Not assert_near: the derivative by a position jumps where a rounded position crosses a pixel.
        assert F.cosine_similarity(grad.flatten(), grads[name].flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", CLASSES)
def test_compiles_in_one_graph(cls, training, device):
    norm = nn.BatchNorm2d(8)
    layer = make(cls, GEOMETRIES[1], device=device, predict=1, norm=norm, activation=F.relu).train(training)
    x = image(device=device)
    twin = copy.deepcopy(layer)
    torch.compiler.reset()
    with EventStorage():  # in a training loop the statistics must not break the graph
        actual = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    expected = twin(x)
    assert_near(actual, expected, 1e-12)
    actual.square().sum().backward()
    expected.square().sum().backward()
    for name, grad in gradients(twin).items():
        assert_near(gradients(layer)[name], grad, 1e-11, name)
