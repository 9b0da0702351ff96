"""The saliency region where it is known, and what it promises everywhere."""

from functools import partial

import pytest
import torch
from dcnv2_d2.analysis import BackboneNode, saliency_region
from torch import nn

from .detectors import Detector

FILL = torch.full((3, 1, 1), 110.0)


def only(rows, columns):
    """A response that depends on a rectangle alone: its pixels."""
    return lambda images: images[:, :, rows, columns].flatten(1)


def picture(height=64, width=96):
    """Far enough from FILL everywhere."""
    return 200 + 50 * torch.rand(3, height, width)


def recomputed(respond, image, region):
    with torch.no_grad():
        masked = torch.where(region.mask, image, FILL)
        whole, part = (respond(i[None]) for i in (image, masked))
    return ((part - whole).norm() / whole.norm()).item()


@pytest.mark.parametrize("cell, levels, batch_size", [(4, 4, 16), (8, 2, 5), (4, 1, 64), (2, 5, 1)])
def test_a_known_square(cell, levels, batch_size):
    image, respond = picture(), only(slice(24, 40), slice(56, 72))
    # The finest cells, of 2x2 pixels, are 1/8 of the square's norm, and less of the norm of its difference to FILL.
    region = saliency_region(respond, image, FILL, cell=cell, levels=levels, batch_size=batch_size, bound=0.02)
    expected = torch.zeros(64, 96, dtype=torch.bool)
    expected[24:40, 56:72] = True
    assert torch.equal(region.mask, expected)
    assert region.error == recomputed(respond, image, region) == 0
    assert region.area == pytest.approx(16 * 16 / (64 * 96)) and (region.cell, region.bound) == (cell, 0.02)


def test_a_square_between_cells():
    image, respond = picture(), only(slice(22, 42), slice(56, 73))
    region = saliency_region(respond, image, FILL, cell=4, bound=1e-3)
    expected = torch.zeros(64, 96, dtype=torch.bool)
    expected[20:44, 56:76] = True  # every cell that it touches
    assert torch.equal(region.mask, expected)


@pytest.mark.parametrize("size", [(61, 90), (33, 128), (17, 17)])
def test_cells_cut_by_the_border(size):
    image, respond = picture(*size), only(slice(-9, None), slice(-6, None))
    region = saliency_region(respond, image, FILL, cell=4, bound=1e-3)
    assert region.mask.shape == size
    ys, xs = region.mask.nonzero().T
    assert ys.min() == (size[0] - 9) // 4 * 4 and xs.min() == (size[1] - 6) // 4 * 4
    assert ys.max() == size[0] - 1 and xs.max() == size[1] - 1
    assert region.mask[ys.min() :, xs.min() :].all()


@pytest.mark.parametrize("bound", [0.02, 0.1, 0.3, 0.6])
def test_of_independent_cells_it_is_the_smallest(bound):
    # Every cell is 4x4 pixels of a difference of its own to FILL, so the squared errors add up: the smallest region
    # leaves out the cells of least difference.
    difference = torch.rand(8, 12) ** 2 * 100 + 1
    image = (110 + difference.repeat_interleave(4, 0).repeat_interleave(4, 1)).expand(3, -1, -1)

    def respond(images):
        return (images - 110).flatten(1)

    region = saliency_region(respond, image, FILL, bound=bound, cell=4, levels=1)
    squares = difference.double().square().flatten().sort().values
    masked = int(((squares.cumsum(0) / squares.sum()).sqrt() < bound).sum())
    assert 0 < masked < 96
    kept = region.mask[::4, ::4]
    assert 96 - masked <= kept.sum() <= 96 - masked + 1  # one more where the margin for rounding decides
    assert difference[kept].min() > difference[~kept].max()


@pytest.mark.parametrize("bound", [0.05, 0.1, 0.4])
@pytest.mark.parametrize("batch_size", [7, 16])
def test_the_error_is_below_the_bound(bound, batch_size):
    model = Detector(nn.Conv2d(3, 16, 7, 2, 3), nn.ReLU(), nn.Conv2d(16, 16, 7, 2, 3), nn.ReLU(), std=100)
    image, respond = picture(64, 72), partial(BackboneNode(20, 40).respond, model)
    region = saliency_region(respond, image, FILL, bound=bound, cell=4, levels=3, batch_size=batch_size)
    assert region.error == pytest.approx(recomputed(respond, image, region), abs=1e-6)
    assert 0 < region.error < bound and 0 < region.area < 1
    again = saliency_region(respond, image, FILL, bound=bound, cell=4, levels=3, batch_size=batch_size)
    assert torch.equal(again.mask, region.mask) and again.error == region.error


def test_a_convolution_s_region_is_in_its_receptive_field():
    conv = nn.Conv2d(3, 8, 9, 1, 4)
    image = picture(48, 48)
    region = saliency_region(partial(BackboneNode(20, 28).respond, Detector(conv)), image, FILL, cell=4)
    ys, xs = region.mask.nonzero().T
    assert (
        ys.min() >= 24 and ys.max() < 36 and xs.min() >= 16 and xs.max() < 28
    )  # the cells of rows 24-32, columns 16-24


def test_a_response_that_sees_nothing():
    region = saliency_region(lambda images: images.new_ones(len(images), 4), picture(), FILL)
    assert not region.mask.any() and region.area == region.error == 0


def test_evaluations_and_batches():
    sizes = []

    def respond(images):
        sizes.append(len(images))
        assert not torch.is_grad_enabled()
        return images[:, :, 20:30, 20:30].flatten(1)

    region = saliency_region(respond, picture(), FILL, batch_size=7)
    assert region.evaluations == sum(sizes) and max(sizes) == 7


def test_the_default_cell_follows_the_size():
    respond = only(slice(0, 16), slice(0, 16))
    assert [saliency_region(respond, picture(s, 2 * s), FILL).cell for s in (16, 64, 128)] == [1, 2, 4]


def test_progress(capsys):
    respond, image = only(slice(0, 16), slice(0, 16)), picture()
    saliency_region(respond, image, FILL)
    assert not capsys.readouterr().err
    saliency_region(respond, image, FILL, progress=True)
    assert "left, cells of 2 px" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, expected",
    [
        ({"bound": 0.0}, "bound must be between 0 and 1, got 0.0"),
        ({"bound": 1.0}, "bound must be between 0 and 1, got 1.0"),
        ({"cell": 0}, "cell must be at least 1, got 0"),
        ({"levels": 0}, "levels must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(option, expected):
    with pytest.raises(ValueError, match=f"saliency_region: {expected}"):
        saliency_region(only(slice(0, 9), slice(0, 9)), picture(), FILL, **option)


def test_a_silent_node():
    with pytest.raises(ValueError, match="take another node"):
        saliency_region(lambda images: images.new_zeros(len(images), 2), picture(), FILL)
