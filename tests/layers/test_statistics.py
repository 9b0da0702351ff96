"""What deformable layers write into Detectron2's event storage, and when they warn."""

import logging
import math

import pytest
import torch
from dcnv2_d2.layers import DeformConv2d, ModulatedDeformConv2d
from detectron2.utils.events import EventStorage
from torch import nn


def make(cls, offset=0.0, logit=0.0, **kwargs):
    """A 3x3 layer that predicts these offsets, given for (dy, dx), and these logits everywhere."""
    layer = cls(4, 4, 3, padding=1, **kwargs)
    layer.name = "res3.0.conv2"
    taps = 9 * layer.offset_groups
    with torch.no_grad():
        layer.conv_offset.bias[: 2 * taps] = torch.as_tensor(offset).expand(taps, 2).flatten()
        layer.conv_offset.bias[2 * taps :] = logit
    return layer


def image(height=32, width=40):
    return torch.randn(2, 4, height, width)


@pytest.mark.parametrize("offset_groups", [1, 2])
@pytest.mark.parametrize("cls", [DeformConv2d, ModulatedDeformConv2d])
def test_values(cls, offset_groups):
    layer = make(cls, offset=(1.0, -3.0), logit=math.log(3), offset_groups=offset_groups)
    expected = {"res3.0.conv2/offset_mean": (2.0, 0), "res3.0.conv2/offset_max": (3.0, 0)}
    if cls is ModulatedDeformConv2d:
        layer.mask_scale = 2.0
        expected["res3.0.conv2/mask_mean"] = (1.5, 0)
    with EventStorage() as storage:
        layer(image())
    assert storage.latest() == {name: (pytest.approx(value), at) for name, (value, at) in expected.items()}
    assert not any(storage.smoothing_hints().values())


def test_every_twentieth_iteration():
    layer = make(ModulatedDeformConv2d)
    written = []
    with EventStorage() as storage:
        for iteration in range(42):
            nn.init.constant_(layer.conv_offset.bias, iteration / 100)
            layer(image(3, 3))
            value = storage.latest()["res3.0.conv2/offset_mean"]
            if value not in written:
                written.append(value)
            storage.step()
    assert written == [(pytest.approx(iteration / 100), iteration) for iteration in (0, 20, 40)]


@pytest.mark.parametrize("cls", [DeformConv2d, ModulatedDeformConv2d])
def test_name_of_a_layer_that_was_given_none(cls):
    with EventStorage() as storage:
        cls(4, 4, 3)(image())
    assert f"{cls.__name__}/offset_mean" in storage.latest()


def test_nothing_in_eval_mode():
    with EventStorage() as storage:
        make(ModulatedDeformConv2d).eval()(image())
    assert storage.latest() == {}


def test_the_output_does_not_depend_on_a_storage():
    layer, x = make(ModulatedDeformConv2d, offset=(0.3, 0.4)), image()
    with EventStorage():
        inside = layer(x)
    assert torch.equal(layer(x), inside) and inside.requires_grad


@pytest.mark.parametrize("cls", [DeformConv2d, ModulatedDeformConv2d])
@pytest.mark.parametrize(
    "offset, warns",
    [(100.0, True), (-100.0, True), (8.25, True), (8.0, False), ((0.0, 15.0), False), ((0.0, 17.0), True)]
    + [(math.nan, True), (math.inf, True)],
)
def test_runaway_offsets(offset, warns, cls, caplog):
    layer = make(cls, offset)
    with EventStorage(), caplog.at_level(logging.WARNING, "dcnv2_d2"):
        layer(image(32, 40))  # a quarter of the shorter side: 8 pixels
    assert len(caplog.records) == warns
    for record in caplog.records:
        message = record.getMessage()
        assert "res3.0.conv2" in message and "above 8.0" in message and "MODEL.DCNV2.OFFSET_LR_FACTOR" in message
