"""The numbers of dcnv2_d2.ops.deform_ps_roi_pool: against the float64 definition, roi_align and hand tables."""

import math
import random

import pytest
import torch
from dcnv2_d2.ops import deform_ps_roi_pool

from ..reference import TOLERANCE, assert_all_near, assert_near, run
from ..reference_ps_pool import (
    check,
    deform_ps_roi_pool_inputs,
    offset_differences,
    random_grad,
    round_away,
    sampling_points,
    shifted_roi_align,
)
from ..reference_ps_pool import deform_ps_roi_pool as definition

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FORMATS = [torch.contiguous_format, torch.channels_last]
CHOICES = {
    "n": [1, 2, 3],
    "c": [6, 12, 18],
    "size": [(11, 13), (7, 20), (16, 9)],
    "output_size": [1, 3, 7, (3, 5), (4, 1)],
    "spatial_scale": [0.9, 0.37, 1 / 16],
    "sampling_ratio": [1, 2, 3, 4],
    "gamma": [0.1, 0.5, -0.3],
    "group_size": [1, 1, 2, 3, 7],
    "classes": [1, 2, 3, 6],
    "parts": [None, 1, 2, (2, 3)],
    "offset": [True, True, True, False],
    "mask": [True, True, False],
}


def sample(count, seed):
    """`count` configurations in which each choice of each argument appears about equally often."""
    rng = random.Random(seed)
    columns = {}
    for name, values in CHOICES.items():
        columns[name] = (values * count)[:count]
        rng.shuffle(columns[name])
    configs = [{name: columns[name][i] for name in columns} for i in range(count)]
    return [dict(zip("hw", config.pop("size"), strict=True), **config) for config in configs]


def describe(config):
    return "-".join(f"{k}{v:.4g}" if isinstance(v, float) else f"{k}{v}" for k, v in config.items()).replace(" ", "")


# The definition against torchvision's roi_align, where that can express it, and the operator against both.


@pytest.mark.parametrize("op", [definition, deform_ps_roi_pool], ids=["definition", "operator"])
@pytest.mark.parametrize("config", sample(12, seed=1), ids=describe)
def test_inside_the_map_it_is_roi_align_of_shifted_boxes(config, op, device):
    config = {**config, "h": 24, "w": 31, "gamma": 0.1, "inside": True, "k": 3}
    tensors, geometry = deform_ps_roi_pool_inputs(**config, device=device)
    grad = random_grad(tensors, geometry)
    actual, expected = run(op, tensors, geometry, grad), run(shifted_roi_align, tensors, geometry, grad)
    actual.pop("offset", None), expected.pop("offset", None)
    assert_all_near(actual, expected, 1e-10)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", sample(20, seed=2), ids=describe)
def test_matches_definition(config, dtype, memory_format, device):
    tensors, geometry = deform_ps_roi_pool_inputs(**config, k=4, dtype=dtype, boxes_dtype=torch.float32, device=device)
    tensors["input"] = tensors["input"].contiguous(memory_format=memory_format)
    check(deform_ps_roi_pool, tensors, geometry)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        {"c": 1, "output_size": (5, 3)},
        {"c": 17, "group_size": 2},
        {"c": 70, "classes": 2, "n": 3},
        {"c": 7, "classes": 7, "group_size": 3, "output_size": 3, "k": 2},  # R-FCN: a class a channel
        {"c": 100, "classes": 4, "k": 3},  # a class across the blocks of channels that threads own
        {"c": 513, "k": 2, "output_size": 2},
        {"h": 1, "w": 1},
        {"h": 1, "w": 9},
        {"h": 9, "w": 1},
        {"h": 2, "w": 2, "reach": 1.0},
        {"n": 5, "k": 40, "h": 6, "w": 5, "output_size": 3},  # the boxes overlap: many samples add to each pixel
        {"h": 40, "w": 53, "n": 1, "output_size": 14, "parts": 7, "k": 2, "sampling_ratio": 2},
        {"parts": (5, 8), "output_size": 3},  # more parts than bins: some serve none
        {"group_size": 5, "output_size": 3},  # more groups than bins
        {"reach": 30.0},  # most bins lie outside
    ],
    ids=describe,
)
def test_awkward_sizes(config, dtype, memory_format, device):
    tensors, geometry = deform_ps_roi_pool_inputs(**config, dtype=dtype, device=device)
    tensors["input"] = tensors["input"].contiguous(memory_format=memory_format)
    check(deform_ps_roi_pool, tensors, geometry)


# Conventions.


def ramp(height, width, device, dtype=torch.float64):
    """Channels y and x: the mean position of a bin's samples, away from the border."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([y, x])[None].to(device, dtype)


# (x1, x2) in image pixels; begin and length in pixels of the map at a scale of 1/2, by hand.
ROUNDING = {
    (16.0, 47.0): (7.5, 16.0),
    (16.4, 47.4): (7.5, 16.0),
    (16.5, 46.5): (8.0, 15.5),  # 17 and 47
    (17.49, 46.51): (8.0, 15.5),
    (14.5, 15.5): (7.0, 1.0),  # 15 and 16: not to even, which is 14
    (2.5, 4.0): (1.0, 1.0),  # 3
    (20.0, 20.0): (9.5, 0.5),  # a point is a pixel
    (20.0, 19.0): (9.5, 0.1),  # no length at all
    (20.0, 10.0): (9.5, 0.1),  # inverted
    (30.0, -8.0): (14.5, 0.1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", ["x", "y"])
def test_boxes_are_rounded_and_include_their_far_pixel(axis, dtype, device):
    sides = [(low, 8.0, high, 9.0) if axis == "x" else (8.0, low, 9.0, high) for low, high in ROUNDING]
    boxes = torch.tensor([(0, *side) for side in sides], dtype=dtype, device=device)
    values = [tuple(b[1 if axis == "x" else 2 :: 2].tolist()) for b in boxes]
    sure = [i for i, (value, pair) in enumerate(zip(values, ROUNDING, strict=True)) if value == pair]
    assert len(sure) >= (5 if dtype == torch.bfloat16 else 8)  # half types cannot hold all of these numbers
    out = deform_ps_roi_pool(ramp(40, 40, device, dtype), boxes, None, 1, 0.5, 2)[:, "yx".index(axis), 0, 0]
    for i in sure:
        begin, length = list(ROUNDING.values())[i]
        assert out[i].item() == pytest.approx(begin + length / 4, rel=TOLERANCE[dtype]), list(ROUNDING)[i]


def test_rounding_of_negative_coordinates():
    assert [round_away(v) for v in (-0.4, -0.5, -1.5, -2.5, 2.5, 0.49)] == [0, -1, -2, -3, 3, 0]
    # From -0.5 and -0.4, rounded to -1 and 0, to 4: two samples, 3 and 2.5 pixels apart, of which one or both count.
    image = torch.tensor([[2.0, 3.0, 5.0, 7.0]], dtype=torch.float64).view(1, 1, 1, 4)
    boxes = torch.tensor([[0, -0.5, 0, 4.0, 0], [0, -0.4, 0, 4.0, 0]], dtype=torch.float64)
    out = deform_ps_roi_pool(image, boxes, None, 1, 1.0, 2).flatten().tolist()
    assert out == [5.0 * 0.5 + 3.0 * 0.5, (2.0 + 5.0) / 2]  # at -1.5 and 1.5; at -0.5, clamped, and 2


def test_samples_lie_at_the_near_corner(device):
    box = torch.tensor([[0, 10, 20, 25, 31]], dtype=torch.float64, device=device)  # 16 x 12 at (9.5, 19.5)
    for s in (1, 2, 3, 4):
        out = deform_ps_roi_pool(ramp(40, 40, device), box, None, (3, 2), 1.0, s)
        y = torch.tensor([[19.5], [23.5], [27.5]], dtype=torch.float64, device=device)
        x = torch.tensor([[9.5, 17.5]], dtype=torch.float64, device=device)
        mean = sum(i / s for i in range(s)) / s
        assert_near(out[0, 0], (y + 4 * mean).expand(3, 2), 1e-12)
        assert_near(out[0, 1], (x + 8 * mean).expand(3, 2), 1e-12)


def test_an_impulse_shows_the_order_x_y(device):
    image = torch.zeros(1, 1, 20, 20, dtype=torch.float64, device=device)
    image[0, 0, 12, 6] = 1
    # 4 wide and 8 high from (x, y) = (8, 8) on, to be moved by (-2, 4) = 0.5 * (4 * -1, 8 * 1).
    boxes = torch.tensor([[0.0, 17, 17, 24, 32]], dtype=torch.float64, device=device)
    for dx, dy, expected in [(-1, 1, 1), (1, -1, 0), (-1, 0, 0), (0, 1, 0), (-0.5, 0.5, 0), (-1, 1.0625, 0.75)]:
        offset = torch.tensor([dx, dy], dtype=torch.float64, device=device).view(1, 2, 1, 1)
        assert deform_ps_roi_pool(image, boxes, offset, 1, 0.5, 1, gamma=0.5).item() == expected, (dx, dy)


def test_a_part_of_the_offset_serves_several_bins_of_one_class(device):
    # The offset says who it is by its size: part (qh, qw) of class l moves by 1/16 * (100 l + 10 qh + qw) / 16 boxes.
    box = torch.tensor([[0, 100, 100, 115, 115]], dtype=torch.float64, device=device)  # 16 pixels from 99.5 on
    number = 100 * torch.arange(2)[:, None, None] + 10 * torch.arange(2)[:, None] + torch.arange(3)
    offset = torch.zeros(1, 2, 2, 2, 3, dtype=torch.float64, device=device)
    offset[:, :, 0] = number
    image = ramp(160, 400, device)[:, [1] * 6]
    out = deform_ps_roi_pool(image, box, offset.flatten(1, 2), (5, 4), 1.0, 1, gamma=1 / 16)[0]
    moved = out - (99.5 + 4 * torch.arange(4, device=device))
    rows = [[0, 0, 1, 2], [0, 0, 1, 2], [0, 0, 1, 2], [10, 10, 11, 12], [10, 10, 11, 12]]  # 5 bins of 2, 4 of 3 parts
    expected = (
        torch.tensor(rows, dtype=torch.float64, device=device)
        + torch.tensor([0, 0, 0, 100, 100, 100], device=device)[:, None, None]
    )
    assert_near(moved, expected, 1e-12)


def test_each_bin_has_channels_of_its_group(device):
    image = torch.arange(2 * 9, dtype=torch.float64, device=device).view(1, 18, 1, 1).expand(1, 18, 8, 8)
    box = torch.tensor([[0, 1, 1, 6, 6]], dtype=torch.float64, device=device)
    out = deform_ps_roi_pool(image, box, None, (3, 5), group_size=3)[0]
    first = [[0, 0, 1, 1, 2], [3, 3, 4, 4, 5], [6, 6, 7, 7, 8]]
    expected = torch.tensor([first, [[9 + v for v in row] for row in first]], dtype=torch.float64, device=device)
    assert_near(out, expected, 1e-12)
    coarse = deform_ps_roi_pool(image, box, None, 2, group_size=3)[0, 0]  # 2 bins of 3 groups
    assert_near(coarse, torch.tensor([[0.0, 1], [3, 4]], dtype=torch.float64, device=device), 1e-12)


def test_defaults_are_those_of_mmdetections_configs(device):
    tensors, geometry = deform_ps_roi_pool_inputs(
        spatial_scale=1.0, h=30, w=41, sampling_ratio=4, margin=False, device=device
    )
    defaults = {k: geometry[k] for k in ("boxes", "output_size")}
    expected = deform_ps_roi_pool(**tensors, **geometry)
    assert torch.equal(deform_ps_roi_pool(**tensors, **defaults), expected)
    assert_near(expected, definition(**tensors, **geometry), 1e-12)


def test_no_offset_is_an_offset_of_zeros(device):
    tensors, geometry = deform_ps_roi_pool_inputs(device=device)
    tensors["offset"].zero_()
    expected = run(deform_ps_roi_pool, tensors, geometry)
    del expected["offset"]
    assert_all_near(run(deform_ps_roi_pool, {**tensors, "offset": None}, geometry), expected, 1e-12)


def test_a_mask_of_zero_still_has_a_gradient(device):
    tensors, geometry = deform_ps_roi_pool_inputs(device=device)
    tensors["mask"][:, :, ::2] = 0
    check(deform_ps_roi_pool, tensors, geometry)
    result = run(deform_ps_roi_pool, tensors, geometry)
    assert result["mask"][:, :, ::2].any() and not result["output"][:, :, ::2].any()


# The border rule. A map with H = 4 rows of 2, 3, 5, 7; what a sample at Y gives, the derivatives by Y from the left and
# from the right (at a whole pixel, either will do), and the weights of the four rows.
H, ROWS = 4, (2.0, 3.0, 5.0, 7.0)
OUTSIDE = (0.0, {0.0}, (0, 0, 0, 0))
BORDER = {
    -0.75: OUTSIDE,
    -0.5: (2.0, {0.0}, (1, 0, 0, 0)),
    -0.25: (2.0, {0.0}, (1, 0, 0, 0)),
    0.0: (2.0, {0.0, 1.0}, (1, 0, 0, 0)),
    0.25: (2.25, {1.0}, (0.75, 0.25, 0, 0)),
    0.75: (2.75, {1.0}, (0.25, 0.75, 0, 0)),
    1.0: (3.0, {1.0, 2.0}, (0, 1, 0, 0)),
    2.75: (6.5, {2.0}, (0, 0, 0.25, 0.75)),
    H - 1.0: (7.0, {2.0, 0.0}, (0, 0, 0, 1)),
    H - 0.75: (7.0, {0.0}, (0, 0, 0, 1)),
    H - 0.5: (7.0, {0.0}, (0, 0, 0, 1)),
    H - 0.25: OUTSIDE,
    **dict.fromkeys([math.nan, math.inf, -math.inf, 1e4, -1e4, 1e20, -1e20, 3e38, 2.0**31, -(2.0**31), 2.0**32,
                     2.0**63], OUTSIDE),
}  # fmt: skip


@pytest.mark.parametrize("axis", ["x", "y"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_border_table(dtype, axis, device):
    # One sample in the corner, at 0.5, of a box of 2 x 4, moved by gamma * 4 = 1 along the long side by an offset of 1.
    n, long = len(BORDER), "xy".index(axis)
    sides = [(1, 1, 4, 2), (1, 1, 2, 4)][long]
    image = torch.tensor(ROWS, dtype=dtype, device=device).view(1, 1, H, 1).repeat(n, 1, 1, 3)
    offset = torch.zeros(n, 2, 1, 1, dtype=torch.float64)
    offset[:, long, 0, 0] = torch.tensor(list(BORDER), dtype=torch.float64) - 0.5
    tensors = {
        "input": image if axis == "y" else image.mT.contiguous(),
        "offset": offset.to(device, dtype),
        "mask": torch.ones(n, 1, 1, 1, dtype=dtype, device=device),
    }
    boxes = torch.tensor([(i, *sides) for i in range(n)], dtype=dtype, device=device)
    result = run(deform_ps_roi_pool, tensors, {"boxes": boxes, "output_size": 1, "sampling_ratio": 1, "gamma": 0.25})
    for i, (position, (value, derivatives, weights)) in enumerate(BORDER.items()):
        assert result["output"][i].item() == value, position
        assert result["mask"][i].item() == value, position
        assert result["offset"][i, long].item() in derivatives, position
        assert result["offset"][i, 1 - long].item() == 0, position  # rows are constant
        touched = result["input"][i, 0] if axis == "y" else result["input"][i, 0].mT
        assert touched.sum(1).tolist() == list(weights), position


# Two samples two pixels apart on the same map, the first one at Y: value, derivative, weights of the rows.
COUNTED = {
    -2.75: (0.0, 0.0, (0, 0, 0, 0)),  # -0.75
    -2.25: (2.0, 0.0, (1, 0, 0, 0)),  # -0.25, clamped: the only one
    -1.75: (2.25, 1.0, (0.75, 0.25, 0, 0)),  # 0.25: the only one
    -0.25: ((2.0 + 4.5) / 2, 1.0, (0.5, 0.125, 0.375, 0)),  # the first is clamped
    0.25: ((2.25 + 5.5) / 2, 1.5, (0.375, 0.125, 0.375, 0.125)),
    1.25: ((3.5 + 7.0) / 2, 1.0, (0, 0.375, 0.125, 0.5)),  # the second is clamped
    1.75: (4.5, 2.0, (0, 0.25, 0.75, 0)),  # the second, at 3.75, is outside
    3.25: (7.0, 0.0, (0, 0, 0, 1)),
    3.75: (0.0, 0.0, (0, 0, 0, 0)),
}


@pytest.mark.parametrize("axis", ["x", "y"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_is_over_the_samples_on_the_map(dtype, axis, device):
    n, long = len(COUNTED), "xy".index(axis)
    image = torch.tensor(ROWS, dtype=dtype, device=device).view(1, 1, H, 1).repeat(n, 1, 1, 3)
    offset = torch.zeros(n, 2, 1, 1, dtype=torch.float64)
    offset[:, long, 0, 0] = torch.tensor(list(COUNTED), dtype=torch.float64) - 0.5
    tensors = {"input": image if axis == "y" else image.mT.contiguous(), "offset": offset.to(device, dtype)}
    # Across, one of the two samples is on the map and one, at 0.5 + 3 of 3 pixels, is not.
    sides = [(1, 1, 4, 6), (1, 1, 6, 4)][long]
    boxes = torch.tensor([(i, *sides) for i in range(n)], dtype=dtype, device=device)
    result = run(deform_ps_roi_pool, tensors, {"boxes": boxes, "output_size": 1, "sampling_ratio": 2, "gamma": 0.25})
    for i, (position, (value, derivative, weights)) in enumerate(COUNTED.items()):
        assert result["output"][i].item() == value, position
        assert result["offset"][i, long].item() == derivative, position
        touched = result["input"][i, 0] if axis == "y" else result["input"][i, 0].mT
        assert touched.sum(1).tolist() == list(weights), position


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("parts", [None, 2])
@pytest.mark.parametrize("corners", [(-6.3, -5.2, 31.9, 27.8), (-9.1, -7.7, 5.3, 6.2), (15.2, 12.7, 40.3, 33.1)])
def test_differences_at_borders(corners, parts, classes, device):
    tensors, geometry = deform_ps_roi_pool_inputs(
        boxes=[(0, *corners)] * 2, classes=classes, parts=parts, reach=1.0, device=device
    )
    grad = random_grad(tensors, geometry)
    expected = offset_differences(deform_ps_roi_pool, tensors, geometry, grad)
    assert_near(run(deform_ps_roi_pool, tensors, geometry, grad)["offset"], expected, 1e-7)
    assert_near(run(definition, tensors, geometry, grad)["offset"], expected, 1e-7)
    points = [sampling_points(corners, s.cpu(), (3, 5), 0.37, 3, 0.1) for s in tensors["offset"]]
    y, x = (torch.cat([p[i].flatten() for p in points]) for i in range(2))
    rims = (
        (((y > -0.5) & (y < 0)) | ((y > 10) & (y < 10.5))).any(),
        (((x > -0.5) & (x < 0)) | ((x > 12) & (x < 12.5))).any(),
    )
    assert any(rims) and ((y < -0.5) | (y > 10.5)).any()


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("given", ["offset and mask", "offset", "mask"])
def test_gradcheck(given, memory_format, device):
    tensors, geometry = deform_ps_roi_pool_inputs(
        n=1, c=2, h=4, w=5, k=3, output_size=(2, 3), offset="offset" in given, mask="mask" in given, group_size=2,
        classes=2, parts=(2, 2), device=device,
    )  # fmt: skip
    tensors["input"] = tensors["input"].contiguous(memory_format=memory_format)
    leaves = {k: t.requires_grad_() for k, t in tensors.items() if t is not None}

    def pool(*values):
        return deform_ps_roi_pool(**{"offset": None, **dict(zip(leaves, values, strict=True))}, **geometry)

    assert torch.autograd.gradcheck(pool, tuple(leaves.values()))


# Positions that are none.

NAN, INF = math.nan, math.inf
LOST = [
    (NAN, 3, 17, 14), (2, NAN, 17, 14), (2, 3, NAN, 14), (2, 3, 17, NAN), (NAN, NAN, NAN, NAN),
    (2, 3, INF, 14), (2, 3, 17, INF),
    (-INF, 3, 17, 14), (-INF, 3, INF, 14), (2, -INF, 17, INF), (INF, 3, INF, 14), (INF, 3, 17, 14), (2, INF, 17, -INF),
    (-INF, -INF, INF, INF), (INF, INF, -INF, -INF), (2, -INF, 17, 14),
    (2.0**31, 3, 2.0**31 + 50, 14), (2, -(2.0**32), 17, 20 - 2.0**32), (2.0**63, 3, 2.0**63, 14),
    (60, 3, 81, 17), (-81, 3, -60, 17), (3, 60, 17, 81), (3, -81, 17, -60), (1e30, 1e30, -1e30, -1e30),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_boxes_that_are_no_place_give_zero_and_read_no_pixel(dtype, device):
    boxes = [(i % 2, *box) for i, box in enumerate(LOST)]
    tensors, geometry = deform_ps_roi_pool_inputs(
        boxes=boxes, output_size=(2, 4), reach=1.0, group_size=2, classes=2, margin=False, dtype=dtype, device=device
    )
    for memory_format in FORMATS:
        nowhere = torch.full_like(tensors["input"], math.nan).contiguous(memory_format=memory_format)
        result = run(deform_ps_roi_pool, {**tensors, "input": nowhere}, geometry)
        for name, t in result.items():
            bad = t.flatten(1).ne(0).any(1).nonzero().flatten().tolist()
            assert not bad, f"{name}: not zero for {[boxes[i] if name != 'input' else f'image {i}' for i in bad]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_enormous_boxes(dtype, device):
    # Of the first only the sample in the corner is on the map.
    boxes = [(0, 2, 3, 1e20, 1e20), (1, -1e30, 3, 1e30, 14), (0, 2, 3, 3e38, 14)]
    tensors, geometry = deform_ps_roi_pool_inputs(boxes=boxes, margin=False, offset=False, dtype=dtype, device=device)
    check(deform_ps_roi_pool, tensors, geometry)
    if dtype != torch.float16:  # to which 1e20 is infinite
        assert (
            deform_ps_roi_pool(**tensors, **geometry)[0, 0].ne(0).tolist() == [[True] + [False] * 4] + [[False] * 5] * 2
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lost_boxes_and_offsets_leave_the_others_alone(dtype, device):
    tensors, geometry = deform_ps_roi_pool_inputs(k=9, dtype=dtype, device=device)
    flat = tensors["offset"].view(-1)
    spots = torch.randperm(flat.numel(), device=device)[: flat.numel() // 5]
    special = torch.tensor([NAN, INF, -INF, 1e20, -1e20, 2.0**31, -(2.0**32)], device=device).to(flat)
    flat[spots] = special[torch.arange(len(spots), device=device) % len(special)]
    geometry["boxes"][2, 1], geometry["boxes"][5, 4] = NAN, NAN
    check(deform_ps_roi_pool, tensors, geometry)
    result = run(deform_ps_roi_pool, tensors, geometry)
    lost = ~(tensors["offset"].double().abs() < 1e4).all(1, keepdim=True)
    lost[[2, 5]] = True
    assert 0.3 < lost.double().mean() < 0.7
    assert not result["output"][lost.expand_as(result["output"])].any()
    assert not result["offset"][lost.expand(-1, 2, -1, -1)].any() and not result["mask"][lost].any()


# Batches, lists, many boxes.


def test_each_box_pools_from_its_own_image(device):
    tensors, geometry = deform_ps_roi_pool_inputs(n=4, k=9, group_size=2, device=device)
    geometry["boxes"][:, 0] = torch.tensor([3.0, 0, 3, 1, 0, 3, 1, 0, 3])  # none from image 2
    whole = run(deform_ps_roi_pool, tensors, geometry)
    assert_all_near(whole, run(definition, tensors, geometry), 1e-12)
    assert not whole["input"][2].any() and whole["input"][[0, 1, 3]].flatten(1).any(1).all()


@pytest.mark.parametrize("counts", [(2, 3, 1), (0, 4, 0), (3, 0, 2)], ids=str)
def test_a_list_of_boxes_is_their_tensor(counts, device):
    tensors, geometry = deform_ps_roi_pool_inputs(n=3, k=sum(counts), device=device)
    listed = list(geometry["boxes"][:, 1:].split(counts))
    geometry["boxes"][:, 0] = torch.arange(3, device=device).repeat_interleave(torch.tensor(counts, device=device))
    expected = run(deform_ps_roi_pool, tensors, geometry)
    assert_all_near(run(deform_ps_roi_pool, tensors, {**geometry, "boxes": listed}), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_many_boxes_on_any_number_of_threads(dtype):
    tensors, geometry = deform_ps_roi_pool_inputs(
        n=3, c=40, k=120, output_size=4, parts=2, classes=2, group_size=2, dtype=dtype, boxes_dtype=torch.float32
    )
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run(deform_ps_roi_pool, tensors, geometry))
    finally:
        torch.set_num_threads(threads)
    one, two = results
    assert torch.equal(one["output"], two["output"])
    assert_all_near(two, one, TOLERANCE[dtype])
