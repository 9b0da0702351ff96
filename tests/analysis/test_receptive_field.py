"""The effective receptive field against the analytic one of plain stacks."""

from functools import partial

import pytest
import torch
from dcnv2_d2.analysis import BackboneNode, effective_receptive_field
from torch import nn

from .detectors import REGULAR, Detector, real

H, W = 20, 26


def positive(*geometry):
    conv = nn.Conv2d(*geometry, bias=False)
    nn.init.uniform_(conv.weight, 0.1, 1.0)
    return conv


def analytic(convs, cell, size):
    """Walks down from one cell of the last map, tap by tap: how much each pixel's intensity counts in each output."""
    reach = {cell: torch.eye(convs[-1].out_channels, dtype=torch.float64)}  # position -> [outputs, channels]
    for conv in reversed(convs):
        below = {}
        weight = conv.weight.detach().double()
        for (y, x), factor in reach.items():
            for i in range(conv.kernel_size[0]):
                for j in range(conv.kernel_size[1]):
                    at = (
                        y * conv.stride[0] - conv.padding[0] + i * conv.dilation[0],
                        x * conv.stride[1] - conv.padding[1] + j * conv.dilation[1],
                    )
                    below[at] = below.get(at, 0) + factor @ weight[:, :, i, j]
        # What lies outside a map was padded there and leads nowhere.
        size_here = size[len(size) - 1 - convs[::-1].index(conv) - 1]
        reach = {(y, x): f for (y, x), f in below.items() if 0 <= y < size_here[0] and 0 <= x < size_here[1]}
    field = torch.zeros(len(next(iter(reach.values()))), *size[0], dtype=torch.float64)
    for (y, x), factor in reach.items():
        field[:, y, x] = factor.sum(dim=1)  # all colours
    return field


STACKS = {
    "3x3": ([(3, 1, 3, 1, 1)], (9, 7)),
    "3x5, unequal padding": ([(3, 2, (3, 5), 1, (1, 0))], (8, 11)),
    "three of 3x3": ([(3, 4, 3, 1, 1), (4, 2, 3, 1, 1), (2, 1, 3, 1, 1)], (9, 12)),
    "strides": ([(3, 4, 3, 2, 1), (4, 3, 3, 1, 1), (3, 1, 5, 2, 2)], (8, 16)),
    "dilation": ([(3, 4, 3, 1, 1), (4, 2, 3, 1, 3, 3)], (10, 13)),
    "at the border": ([(3, 4, 3, 1, 1), (4, 1, 3, 1, 1), (1, 2, 3, 1, 1)], (0, 25)),
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("std", [1.0, 50.0])
def test_equals_the_analytic_one(name, std):
    geometries, (y, x) = STACKS[name]
    convs = [positive(*geometry) for geometry in geometries]
    detector, image = Detector(*convs, std=std), torch.rand(3, H, W) + 1
    field = effective_receptive_field(partial(BackboneNode(x, y).respond, detector), image)

    sizes, maps = [(H, W)], image[None] / std
    for conv in convs:
        maps = conv(maps)
        sizes.append(tuple(maps.shape[-2:]))
    stride = [round(a / b) for a, b in zip(sizes[0], sizes[-1], strict=True)]
    cell = tuple(round(v / s) for v, s in zip((y, x), stride, strict=True))
    response = maps[0, :, cell[0], cell[1]].detach().double()
    expected = (response / response.norm()) @ analytic(convs, cell, sizes).flatten(1) / std
    assert (expected == 0).any() and (expected > 0).sum() > 8
    torch.testing.assert_close(field.double().flatten(), expected, rtol=1e-5, atol=1e-7)


def test_colours_are_changed_together():
    conv = nn.Conv2d(3, 1, 1, bias=False)
    conv.weight.data = torch.tensor([3.0, -1.0, -1.5]).reshape(1, 3, 1, 1)
    field = effective_receptive_field(partial(BackboneNode(5, 3).respond, Detector(conv)), torch.ones(3, H, W))
    expected = torch.zeros(H, W)
    expected[3, 5] = 0.5
    torch.testing.assert_close(field, expected)


def test_of_a_real_detector_by_differences():
    model, image = real("mask_rcnn_small_mdconv_c3-c5").double(), torch.rand(3, 64, 64) * 255

    def respond(images):  # in float64, for steps small enough to stay between the kinks
        return BackboneNode(20, 40).respond(model, images.double())

    field = effective_receptive_field(respond, image)
    for y, x in ((40, 20), (36, 23), (44, 15)):
        step = torch.zeros(3, 64, 64, dtype=torch.float64)
        step[:, y, x] = 1e-6
        with torch.no_grad():
            above, below = respond(torch.stack([image + step, image - step])).norm(dim=1)
        assert field[y, x].item() == pytest.approx((above - below).abs().item() / 2e-6, rel=1e-3)


@pytest.mark.parametrize("opts", [(), REGULAR])
def test_leaves_no_gradients_behind(opts):
    model, image = real("mask_rcnn_small_mdconv_c3-c5", *opts), torch.rand(3, 64, 64) * 255
    with torch.no_grad():  # a caller's own must not matter
        field = effective_receptive_field(partial(BackboneNode(20, 40).respond, model), image)
    assert field.shape == (64, 64) and field.isfinite().all() and field.max() > 0 and not field.requires_grad
    assert not image.requires_grad and all(p.grad is None for p in model.parameters())


def test_a_silent_node():
    conv = nn.Conv2d(3, 2, 3, 1, 1)
    nn.init.zeros_(conv.weight), nn.init.zeros_(conv.bias)
    with pytest.raises(ValueError, match="take another node"):
        effective_receptive_field(partial(BackboneNode(5, 3).respond, Detector(conv)), torch.ones(3, H, W))
