"""Effective dilation of hand-set filters, and which filters belong to which objects."""

import math

import pytest
import torch
from dcnv2_d2.analysis import effective_dilation
from dcnv2_d2.analysis.dilation import CLASSES, filter_dilation
from dcnv2_d2.analysis.sampling import SamplingRecord
from dcnv2_d2.layers import DeformConv2d, ModulatedDeformConv2d
from detectron2.structures import BoxMode
from torch import nn

from .detectors import Detector


def stretched(vertical=1.0, horizontal=1.0, kernel=(3, 3), cls=ModulatedDeformConv2d, **kwargs):
    """A layer whose samples are so many times as far from its centre as a regular one's."""
    layer = cls(3, 3, kernel, padding=tuple(k // 2 for k in kernel), **kwargs)
    ys, xs = torch.meshgrid(*(torch.arange(k) - k // 2 for k in kernel), indexing="ij")
    offset = torch.stack([(vertical - 1) * ys, (horizontal - 1) * xs], dim=-1).flatten()
    layer.conv_offset.bias.data[: offset.numel()] = offset
    return layer


def record(boxes=(), size=(32, 48), original=None, crowd=()):
    annotations = [{"bbox": list(b), "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": int(b in crowd)} for b in boxes]
    height, width = original or size
    return {"image": torch.rand(3, *size) * 255, "height": height, "width": width, "annotations": annotations}


@pytest.mark.parametrize(
    "layer, expected",
    [
        (stretched(), 1),
        (stretched(2.5, 2.5), 2.5),
        (stretched(2, 1), 1.5),  # six neighbours above each other at 2, six beside each other at 1
        (stretched(1, 3, kernel=(1, 5)), 3),
        (stretched(3, 2, kernel=(2, 5)), (5 * 3 + 8 * 2) / 13),
        (stretched(cls=DeformConv2d), 1),
    ],
)
def test_a_stretched_filter(layer, expected):
    table = effective_dilation(Detector(layer), [record()])
    assert table.mean[0, 3].item() == pytest.approx(expected, abs=1e-5)
    assert table.std[0, 3].item() == pytest.approx(0, abs=1e-3)
    assert table.count[0, :3].tolist() == [0, 0, 0] and table.count[0, 3] > 0


def test_dilated_layers_and_their_names():
    layers = DeformConv2d(3, 3, 3, 1, 2, 2), nn.ReLU(), ModulatedDeformConv2d(3, 3, 3, 2, 4, 4)
    table = effective_dilation(Detector(*layers), [record()])
    assert table.layers == ["0", "2"]
    assert table.mean[:, 3].tolist() == [2, 4]


def test_a_bent_filter():
    position = torch.randn(18, 2, 2, 4)  # two offset groups
    found = filter_dilation(SamplingRecord("", position, torch.ones(18, 2, 4), (9, 9), (3, 3)))
    for g, y, x in ((0, 0, 0), (1, 1, 3), (0, 1, 2)):
        points = [position[9 * g + k, :, y, x].tolist() for k in range(9)]
        pairs = [(i, i + 1) for i in range(9) if i % 3 < 2] + [(i, i + 3) for i in range(6)]
        expected = sum(math.dist(points[i], points[j]) for i, j in pairs) / 12
        assert found[g, y, x].item() == pytest.approx(expected, rel=1e-5)


def test_counts_of_boxes():
    # Pixels with their middle in a box of 10 x 8, 20 x 20 and 30 x 28, the small one in the large one.
    boxes = [(2, 1, 12, 9), (0, 0, 30, 28), (28, 10, 48, 30)]
    table = effective_dilation(Detector(stretched()), [record(boxes)], areas=(100, 500))
    counts = {
        "small": 80,
        "medium": 400,
        "large": 30 * 28 - 80 - 2 * 18,
        "background": 32 * 48 - 30 * 28 - 400 + 2 * 18,
    }
    assert dict(zip(CLASSES, table.count[0].tolist(), strict=True)) == counts


def test_bounds_are_of_the_original_image_and_belong_to_the_smaller_class():
    # The image was made half as large: 20 x 20 original pixels are 10 x 10 filters.
    boxes = [(0, 0, 20, 20), (40, 0, 60.5, 20)]
    table = effective_dilation(Detector(stretched()), [record(boxes, original=(64, 96))], areas=(400, 1000))
    assert table.count[0].tolist() == [100, 100, 0, 32 * 48 - 200]


def test_strides_and_padding():
    pool = nn.AvgPool2d(1, stride=4)
    model = Detector(pool, stretched(), divisibility=32)
    table = effective_dilation(model, [record([(8, 8, 24, 16)], size=(24, 40))], areas=(1000, 2000))
    # Filters at whole multiples of 4: columns 8, 12, 16, 20 and rows 8, 12. The map is 8 x 16 with the padding's.
    assert table.count[0].tolist() == [8, 0, 0, 6 * 10 - 8]


def test_crowds_and_images_without_objects():
    box = (0, 0, 10, 10)
    table = effective_dilation(Detector(stretched()), [record([box], crowd=[box]), record()])
    assert table.count[0].tolist() == [0, 0, 0, 2 * 32 * 48]
    assert "nan" not in str(table)


def test_mean_and_deviation_over_images():
    layer = stretched()
    layer.conv_offset.weight.data[2 * 4 + 1] = 0  # the centre stays
    nn.init.normal_(layer.conv_offset.weight, std=1e-3)
    inputs = [record([(4, 4, 20, 20)]), record([(9, 2, 40, 30)], size=(40, 44))]
    table = effective_dilation(Detector(layer), inputs, areas=(300, 10000))
    single = [effective_dilation(Detector(layer), [i], areas=(300, 10000)) for i in inputs]
    assert (table.count == single[0].count + single[1].count).all() and (table.std[0, [0, 1, 3]] > 0).all()
    a, b = (t.count[0, 3] * t.mean[0, 3] for t in single)
    assert table.mean[0, 3].item() == pytest.approx(((a + b) / table.count[0, 3]).item())
    second = [t.count[0, 3] * (t.std[0, 3] ** 2 + t.mean[0, 3] ** 2) for t in single]
    variance = (second[0] + second[1]) / table.count[0, 3] - table.mean[0, 3] ** 2
    assert table.std[0, 3].item() == pytest.approx(variance.sqrt().item(), rel=1e-6)


def test_markdown():
    table = effective_dilation(Detector(stretched(2, 2)), [record([(0, 0, 10, 10)])])
    header, _, row = str(table).splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["layer", *CLASSES]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["0", "2.00 ± 0.00", "", "", "2.00 ± 0.00"]


@pytest.mark.parametrize("inputs, layer", [([record()], nn.Conv2d(3, 3, 3)), ([], stretched())])
def test_nothing_to_measure(inputs, layer):
    with pytest.raises(ValueError, match="must have deformable layers in its backbone and inputs at least one image"):
        effective_dilation(Detector(layer), inputs)
