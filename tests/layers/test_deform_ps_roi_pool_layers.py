"""Position-sensitive pooling layers: their convolutions, what they predict, and what they refuse."""

import pytest
import torch
from dcnv2_d2.layers import DeformPSRoIPool, PSRoIPool
from detectron2.utils.events import EventStorage

from ..reference import assert_near
from ..reference_ps_pool import deform_ps_roi_pool as defined

BOXES = torch.tensor([[0, 3, 5, 130, 90], [1, -20, 17, 60, 200], [1, 40.5, 33.25, 47, 38], [0, 70, 8, 71, 150.5]])
GEOMETRY = {"bins": 3, "spatial_scale": 1 / 8, "sampling_ratio": 2}


def features():
    return torch.randn(2, 5, 21, 17, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def make(channels, classes, gamma=0.1, reach=0.5):
    layer = DeformPSRoIPool(5, channels, **GEOMETRY, gamma=gamma, classes=classes)
    for parameter in layer.parameters():
        parameter.normal_(0, reach)
    return layer


@pytest.mark.parametrize("channels, classes", [(4, 4), (4, 1), (6, 3)])
def test_equals_the_definition_class_by_class(channels, classes):
    """Channel c has maps c * 9 to c * 9 + 8; class l has maps 2 * l * 9 on of x, then 9 of y."""
    layer = make(channels, classes, gamma=0.3).double()
    x = features().double()
    maps, offset_maps = (
        torch.nn.functional.conv2d(x, conv.weight, conv.bias) for conv in (layer.conv, layer.conv_offset)
    )
    pool = {"output_size": 3, "spatial_scale": 1 / 8, "sampling_ratio": 2, "group_size": 3}
    expected = []
    for c in range(channels):
        owner = c * classes // channels
        axes = [offset_maps[:, (2 * owner + axis) * 9 :][:, :9] for axis in (0, 1)]
        offset = torch.cat([defined(axis, BOXES, None, **pool) for axis in axes], dim=1)
        expected.append(defined(maps[:, c * 9 :][:, :9], BOXES, offset, gamma=0.3, **pool))
    out = layer(x, BOXES.double())
    assert out.shape == (4, channels, 3, 3)
    assert_near(out, torch.cat(expected, dim=1), 1e-12)
    moved = layer.predict(x, BOXES.double())
    assert moved.shape == (4, 2 * classes, 3, 3) and moved.abs().max() > 0.1


def test_new_layer_is_the_plain_one():
    torch.manual_seed(1)
    plain, layer = PSRoIPool(5, 4, **GEOMETRY), DeformPSRoIPool(5, 4, **GEOMETRY, classes=2)
    result = layer.load_state_dict(plain.state_dict(), strict=False)
    assert result.missing_keys == ["conv_offset.weight", "conv_offset.bias"] and not result.unexpected_keys
    assert plain.predict(features(), BOXES) is None
    assert torch.equal(layer(features(), BOXES), plain(features(), BOXES))


def test_every_parameter_learns_without_and_with_boxes():
    layer = make(4, 2)
    for boxes, moves in ((BOXES, True), (BOXES[:0], False)):
        out = layer(features(), boxes)
        assert out.shape == (len(boxes), 4, 3, 3)
        grads = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
        assert all(grad.isfinite().all() and bool(grad.any()) == moves for grad in grads)


def test_lists_of_boxes_and_half_precision():
    layer = make(4, 4)
    per_image = [BOXES[BOXES[:, 0] == i, 1:] for i in (0, 1)]
    order = BOXES[:, 0].argsort(stable=True)
    assert torch.equal(layer(features(), per_image), layer(features(), BOXES[order]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(features(), BOXES)
    assert half.dtype == torch.bfloat16
    assert_near(half.float(), layer(features(), BOXES), 0.2)


def test_statistics():
    layer = make(4, 4)
    layer.name = "here"
    with EventStorage() as storage:
        layer(features(), BOXES)
        expected = 0.1 * layer.eval().predict(features(), BOXES).abs().mean().item()
        assert storage.latest()["here/offset_mean"][0] == pytest.approx(expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"classes": 3}, r"classes must divide out_channels \(4\), got 3"),
        ({"classes": 0}, r"classes must divide out_channels \(4\), got 0"),
        ({"bins": 0}, "bins must be above 0, got 0"),
        ({"sampling_ratio": -1}, "sampling_ratio must be above 0, got -1"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        DeformPSRoIPool(5, 4, **{**GEOMETRY, **changes})
