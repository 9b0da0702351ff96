"""The numbers of dcnv2_d2.ops.deform_roi_pool: against the float64 definition, roi_align and hand tables."""

import math
import random

import pytest
import torch
from dcnv2_d2.ops import deform_roi_pool
from torchvision.ops import roi_align

from ..reference import TOLERANCE, assert_all_near, assert_near, assert_same, run
from ..reference_pool import (
    check,
    deform_roi_pool_inputs,
    offset_differences,
    random_grad,
    run_shifted_roi_align,
    sampling_points,
)
from ..reference_pool import deform_roi_pool as definition

HALVES = [torch.float16, torch.bfloat16]
FORMATS = [torch.contiguous_format, torch.channels_last]
CHOICES = {
    "n": [1, 2, 3],
    "c": [1, 3, 8],
    "size": [(11, 13), (7, 20), (16, 9)],
    "output_size": [1, 3, 7, (3, 5), (4, 1)],
    "spatial_scale": [1.0, 0.5, 1 / 16],
    "sampling_ratio": [-1, 0, 1, 2, 4],
    "gamma": [0.1, 0.5, -0.3],
    "offset": [True, True, False],
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


# The oracles themselves: indexing by the formula against torchvision's roi_align of translated boxes.


@pytest.mark.parametrize("config", sample(12, seed=1), ids=describe)
def test_definitions_agree(config):
    tensors, geometry = deform_roi_pool_inputs(**config)
    grad = random_grad(tensors, geometry)
    expected, actual = run_shifted_roi_align(tensors, geometry, grad), run(definition, tensors, geometry, grad)
    assert_all_near(actual, expected, 1e-8)
    for name in expected.keys() - {"offset"}:  # which comes from differences
        assert_near(actual[name], expected[name], 1e-12, name)


# Boxes (x1, y1, x2, y2) on a map of 11 x 13 at a scale of 1/2: an image of 22 x 26 pixels.
BOXES = {
    "inside": (2.3, 3.1, 17.4, 13.7),
    "over every border": (-6.3, -5.2, 31.9, 27.8),
    "over a corner": (-9.1, -7.7, 5.3, 6.2),
    "over the far corner": (15.2, 12.7, 40.3, 33.1),
    "in the rim that is clamped": (-0.9, -0.8, 0.7, 0.3),
    "in the far rim": (25.3, 21.2, 26.8, 22.7),
    "to the right": (60.2, 3.1, 80.7, 17.2),
    "above": (3.1, -60.4, 19.3, -30.2),
    "narrow": (7.31, 2.2, 7.34, 19.7),
    "without width": (7.3, 2.2, 7.3, 19.7),
    "without height": (7.3, 4.2, 16.1, 4.2),
    "a point": (7.3, 4.2, 7.3, 4.2),
    "inverted": (17.4, 13.7, 2.3, 3.1),
    "inverted far": (31.9, 27.8, -6.3, -5.2),
    "ten thousand pixels wide": (-4980.3, 3.1, 5019.8, 17.6),
    "ten thousand pixels high": (3.1, -41.3, 17.6, 9958.6),
}


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("zero", ["none", "zeros"])
@pytest.mark.parametrize("sampling_ratio", [-1, 1, 2, 4])
@pytest.mark.parametrize("box", BOXES)
def test_zero_offset_is_roi_align(box, sampling_ratio, zero, memory_format, device):
    tensors, geometry = deform_roi_pool_inputs(
        boxes=[(1, *BOXES[box])], reach=0.0, margin=0, mask=False, sampling_ratio=sampling_ratio, device=device
    )
    image, offset, grad = tensors["input"], tensors["offset"], random_grad(tensors, geometry)
    image = image.contiguous(memory_format=memory_format)
    tensors = {"input": image, "offset": offset if zero == "zeros" else None}
    actual = run(deform_roi_pool, tensors, geometry, grad)
    del geometry["gamma"]
    expected = run(roi_align, {"input": image}, {**geometry, "aligned": True}, grad)
    assert_all_near({k: actual[k] for k in expected}, expected, 1e-10)
    assert zero == "none" or actual["offset"].isfinite().all()


@pytest.mark.parametrize("sampling_ratio", [-1, 0])
@pytest.mark.parametrize("corners", [(17.4, 3.1, 2.3, 13.7), (2.3, 13.7, 17.4, 3.1), (17.4, 13.7, 2.3, 3.1),
                                     (7.3, 2.2, 7.3, 19.7), (7.3, 9.2, 5.1, 9.2)])  # fmt: skip
def test_an_adaptive_grid_without_samples_gives_zero(corners, sampling_ratio, device):
    # ceil(-1.51) = -1: a grid of -1 x 2 or -1 x -2 samples, where roi_align fails to allocate or has a positive count.
    boxes = [(0, *corners), (1, *BOXES["inside"]), (1, *corners)]
    tensors, geometry = deform_roi_pool_inputs(boxes=boxes, margin=0, sampling_ratio=sampling_ratio, device=device)
    check(deform_roi_pool, tensors, geometry)
    result = run(deform_roi_pool, tensors, geometry)
    assert result["output"][1].all()
    assert not any(result[k][[0, 2]].any() for k in ("output", "offset", "mask"))
    assert not result["input"][0].any()


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("config", sample(30, seed=2), ids=describe)
def test_matches_shifted_roi_align(config, memory_format, device):
    tensors, geometry = deform_roi_pool_inputs(**config, device=device)
    tensors["input"] = tensors["input"].contiguous(memory_format=memory_format)
    grad = random_grad(tensors, geometry)
    actual, expected = run(deform_roi_pool, tensors, geometry, grad), run_shifted_roi_align(tensors, geometry, grad)
    if config["offset"]:
        assert_near(actual.pop("offset"), expected.pop("offset"), 1e-7, "offset")  # from differences
    assert_all_near(actual, expected, 1e-10)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("config", sample(16, seed=3), ids=describe)
def test_matches_definition(config, dtype, memory_format, device):
    tensors, geometry = deform_roi_pool_inputs(**config, dtype=dtype, boxes_dtype=torch.float32, device=device)
    tensors["input"] = tensors["input"].contiguous(memory_format=memory_format)
    check(deform_roi_pool, tensors, geometry)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        {"c": 1, "output_size": (5, 3)},
        {"c": 3, "sampling_ratio": -1},
        {"c": 17, "output_size": (2, 9)},
        {"c": 70, "n": 3},
        {"c": 256, "k": 3, "sampling_ratio": 1},
        {"c": 513, "k": 2, "output_size": 2},
        {"h": 1, "w": 1, "spatial_scale": 0.25},
        {"h": 1, "w": 9},
        {"h": 9, "w": 1},
        {"h": 2, "w": 2, "reach": 1.0},
        {"n": 5, "k": 40, "h": 6, "w": 5, "output_size": 3},  # the boxes overlap: many samples add to each pixel
        {"h": 40, "w": 53, "n": 1, "output_size": 14, "k": 2, "sampling_ratio": -1, "gamma": 0.05},
        {"reach": 30.0},  # most bins lie outside
    ],
    ids=describe,
)
def test_awkward_sizes(config, dtype, memory_format, device):
    tensors, geometry = deform_roi_pool_inputs(**config, dtype=dtype, device=device)
    tensors["input"] = tensors["input"].contiguous(memory_format=memory_format)
    check(deform_roi_pool, tensors, geometry)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_a_map_of_many_megabytes(memory_format, device):  # of which the CPU takes some channels at a time
    tensors, geometry = deform_roi_pool_inputs(c=36, n=2, h=352, w=352, k=4, dtype=torch.float64, device=device)
    tensors["input"] = tensors["input"].contiguous(memory_format=memory_format)
    check(deform_roi_pool, tensors, geometry)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_types_keep_sub_pixel_positions(dtype, device):
    config = {"h": 3, "w": 1500, "c": 4, "spatial_scale": 1.0, "gamma": 0.01}
    tensors, geometry = deform_roi_pool_inputs(
        **config, dtype=dtype, offset_dtype=torch.float32, boxes_dtype=torch.float32, device=device
    )
    check(deform_roi_pool, tensors, geometry)


# Conventions: order of the offset's blocks, its unit, which bin it serves.


def test_an_impulse_shows_the_order_x_y(device):
    image = torch.zeros(1, 1, 20, 20, dtype=torch.float64, device=device)
    image[0, 0, 12, 6] = 1
    # At a scale of 1/2: 4 wide and 8 high around (x, y) = (8, 8), to be moved by (-2, 4) = 0.5 * (4 * -1, 8 * 1).
    boxes = torch.tensor([[0.0, 13, 9, 21, 25]], dtype=torch.float64, device=device)
    for dx, dy, expected in [(-1, 1, 1), (1, -1, 0), (-1, 0, 0), (0, 1, 0), (-0.5, 0.5, 0), (-1, 1.0625, 0.75)]:
        offset = torch.tensor([dx, dy], dtype=torch.float64, device=device).view(1, 2, 1, 1)
        out = deform_roi_pool(image, boxes, offset, 1, 0.5, 1, gamma=0.5)
        assert out.item() == expected, (dx, dy)


@pytest.mark.parametrize("sampling_ratio", [-1, 1, 2, 3])
def test_offsets_are_gamma_times_the_size_of_the_box_bin_by_bin(sampling_ratio, device):
    # On the channels y and x, a bin away from the border gives the position of its centre.
    y, x = torch.meshgrid(torch.arange(60.0), torch.arange(80.0), indexing="ij")
    image = torch.stack([y, x])[None].double().to(device)
    boxes = torch.tensor([[0, 60.5, 40.25, 83.0, 50.5], [0, 70.0, 44.0, 72.25, 71.5]], dtype=torch.float64)
    offset = torch.rand(2, 2, 3, 5, dtype=torch.float64) * 4 - 2
    mask = torch.rand(2, 1, 3, 5, dtype=torch.float64)
    x1, y1, x2, y2 = boxes[:, 1:, None, None].unbind(1)
    gamma, scale = 0.2, 0.5
    y = y1 * scale - 0.5 + (y2 - y1) * scale * (gamma * offset[:, 1] + (torch.arange(3.0).double()[:, None] + 0.5) / 3)
    x = x1 * scale - 0.5 + (x2 - x1) * scale * (gamma * offset[:, 0] + (torch.arange(5.0).double() + 0.5) / 5)
    arguments = [t.to(device) for t in (boxes, offset)]
    actual = deform_roi_pool(image, *arguments, (3, 5), scale, sampling_ratio, gamma, mask.to(device))
    assert_near(actual, (torch.stack([y, x], 1) * mask).to(device), 1e-12)


def test_gamma_is_a_tenth_and_the_grid_adaptive_by_default(device):
    tensors, geometry = deform_roi_pool_inputs(spatial_scale=1.0, h=30, w=41, sampling_ratio=-1, device=device)
    defaults = {k: geometry[k] for k in ("boxes", "output_size")}
    actual = run(deform_roi_pool, tensors, defaults)
    assert_all_near(actual, run(definition, tensors, geometry), 1e-12)


def test_gamma_zero_ignores_the_offset(device):
    tensors, geometry = deform_roi_pool_inputs(device=device)
    geometry["gamma"] = 0.0
    still = run(deform_roi_pool, {**tensors, "offset": None}, geometry)
    moved = run(deform_roi_pool, tensors, geometry)
    assert not moved.pop("offset").any()
    assert_all_near(moved, still, 1e-12)


def test_no_mask_is_a_mask_of_ones(device):
    tensors, geometry = deform_roi_pool_inputs(device=device)
    tensors["mask"].fill_(1)
    expected = run(deform_roi_pool, tensors, geometry)
    del expected["mask"]
    assert_all_near(run(deform_roi_pool, {**tensors, "mask": None}, geometry), expected, 1e-12)


def test_a_mask_of_zero_still_has_a_gradient(device):
    tensors, geometry = deform_roi_pool_inputs(device=device)
    tensors["mask"][:, :, ::2] = 0
    check(deform_roi_pool, tensors, geometry)
    result = run(deform_roi_pool, tensors, geometry)
    assert result["mask"][:, :, ::2].any() and not result["output"][:, :, ::2].any()


# The border rule. A map with H = 4 rows of 2, 3, 5, 7; what a sample at Y gives, the derivatives by Y from the left and
# from the right (at a whole pixel, either will do), and the weights of the four rows.
H, ROWS = 4, (2.0, 3.0, 5.0, 7.0)
OUTSIDE = (0.0, {0.0}, (0, 0, 0, 0))
BORDER = {
    -1.25: OUTSIDE,
    -1.0: (2.0, {0.0}, (1, 0, 0, 0)),
    -0.75: (2.0, {0.0}, (1, 0, 0, 0)),
    -0.25: (2.0, {0.0}, (1, 0, 0, 0)),
    0.0: (2.0, {0.0, 1.0}, (1, 0, 0, 0)),
    0.25: (2.25, {1.0}, (0.75, 0.25, 0, 0)),
    0.75: (2.75, {1.0}, (0.25, 0.75, 0, 0)),
    1.0: (3.0, {1.0, 2.0}, (0, 1, 0, 0)),
    2.75: (6.5, {2.0}, (0, 0, 0.25, 0.75)),
    H - 1.0: (7.0, {2.0, 0.0}, (0, 0, 0, 1)),
    H - 0.75: (7.0, {0.0}, (0, 0, 0, 1)),
    H: (7.0, {0.0}, (0, 0, 0, 1)),
    H + 0.25: OUTSIDE,
    **dict.fromkeys([math.nan, math.inf, -math.inf, 1e4, -1e4, 1e20, -1e20, 3e38, 2.0**31, -(2.0**31), 2.0**32,
                     2.0**63], OUTSIDE),
}  # fmt: skip


@pytest.mark.parametrize("axis", ["x", "y"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_border_table(dtype, axis, device):
    # One sample in the middle of a box of 2 x 4, moved by gamma * 4 = 1 along the long side by an offset of 1.
    n, long = len(BORDER), "xy".index(axis)
    sides = [(0.5, 0.5, 4.5, 2.5), (0.5, 0.5, 2.5, 4.5)][long]
    image = torch.tensor(ROWS, dtype=dtype, device=device).view(1, 1, H, 1).repeat(n, 1, 1, 3)
    offset = torch.zeros(n, 2, 1, 1, dtype=torch.float64)
    offset[:, long, 0, 0] = torch.tensor(list(BORDER), dtype=torch.float64) - 2
    tensors = {
        "input": image if axis == "y" else image.mT.contiguous(),
        "offset": offset.to(device, dtype),
        "mask": torch.ones(n, 1, 1, 1, dtype=dtype, device=device),
    }
    boxes = torch.tensor([(i, *sides) for i in range(n)], dtype=dtype, device=device)
    result = run(deform_roi_pool, tensors, {"boxes": boxes, "output_size": 1, "sampling_ratio": 1, "gamma": 0.25})
    for i, (position, (value, derivatives, weights)) in enumerate(BORDER.items()):
        assert result["output"][i].item() == value, position
        assert result["mask"][i].item() == value, position
        assert result["offset"][i, long].item() in derivatives, position
        assert result["offset"][i, 1 - long].item() == 0, position  # rows are constant
        touched = result["input"][i, 0] if axis == "y" else result["input"][i, 0].mT
        assert touched[:, 1].tolist() == list(weights), position
        assert not touched[:, [0, 2]].any(), position


@pytest.mark.parametrize("sampling_ratio", [-1, 1, 2, 4])
@pytest.mark.parametrize("box", ["over every border", "over a corner", "over the far corner", "flush"])
def test_differences_at_borders(box, sampling_ratio, device):
    # Where a sample is clamped along y only, its derivative by x must survive; other implementations err here.
    corners = {**BOXES, "flush": (0.0, 0.0, 26.0, 22.0)}[box]
    tensors, geometry = deform_roi_pool_inputs(
        boxes=[(0, *corners)] * 3, sampling_ratio=sampling_ratio, reach=2.0, device=device
    )
    grad = random_grad(tensors, geometry)
    expected = offset_differences(deform_roi_pool, tensors, geometry, grad)
    assert_near(run(deform_roi_pool, tensors, geometry, grad)["offset"], expected, 1e-8)
    assert_near(run(definition, tensors, geometry, grad)["offset"], expected, 1e-8)
    points = [sampling_points(corners, s.cpu(), (3, 5), 0.5, sampling_ratio, 0.1) for s in tensors["offset"]]
    y, x = (torch.cat([p[i].flatten() for p in points]) for i in range(2))
    assert (((y > -1) & (y < 0)) | ((y > 10) & (y < 11))).any() and (((x > -1) & (x < 0)) | ((x > 12) & (x < 13))).any()


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("sampling_ratio", [-1, 2])
@pytest.mark.parametrize("given", ["offset and mask", "offset", "mask"])
def test_gradcheck(given, sampling_ratio, memory_format, device):
    tensors, geometry = deform_roi_pool_inputs(
        c=2, h=5, w=6, k=3, output_size=(2, 3), offset="offset" in given, mask="mask" in given,
        sampling_ratio=sampling_ratio, device=device,
    )  # fmt: skip
    tensors["input"] = tensors["input"].contiguous(memory_format=memory_format)
    leaves = {k: t.requires_grad_() for k, t in tensors.items() if t is not None}

    def pool(*values):
        return deform_roi_pool(**{"offset": None, **dict(zip(leaves, values, strict=True))}, **geometry)

    assert torch.autograd.gradcheck(pool, tuple(leaves.values()))


# Positions that are none.

NAN, INF = math.nan, math.inf
LOST = [
    (NAN, 3, 17, 14), (2, NAN, 17, 14), (2, 3, NAN, 14), (2, 3, 17, NAN), (NAN, NAN, NAN, NAN),
    (2, 3, INF, 14), (-INF, 3, 17, 14), (-INF, 3, INF, 14), (2, -INF, 17, INF), (INF, 3, INF, 14),
    (-INF, -INF, INF, INF), (INF, INF, -INF, -INF), (2, -INF, 17, 14), (2, 3, 17, INF),
    (2.0**31, 3, 2.0**31 + 50, 14), (2, -(2.0**32), 17, 20 - 2.0**32), (2.0**63, 3, 2.0**63, 14),
    (60, 3, 81, 17), (-81, 3, -60, 17), (3, 60, 17, 81), (3, -81, 17, -60),
]  # fmt: skip
ENORMOUS = [(-1e30, 3, 1e30, 14), (2, -3e38, 17, 3e38), (1e30, 1e30, -1e30, -1e30), (2, 3, 1e20, 1e20)]


@pytest.mark.parametrize("sampling_ratio", [-1, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_boxes_that_are_no_place_give_zero_and_read_no_pixel(dtype, sampling_ratio, device):
    lost = LOST + (ENORMOUS if sampling_ratio > 0 else [])
    boxes = [(i % 2, *box) for i, box in enumerate(lost)]
    config = {"output_size": (2, 4), "sampling_ratio": sampling_ratio, "reach": 1.0, "margin": 0, "dtype": dtype}
    tensors, geometry = deform_roi_pool_inputs(boxes=boxes, **config, device=device)
    for memory_format in FORMATS:
        nowhere = torch.full_like(tensors["input"], math.nan).contiguous(memory_format=memory_format)
        result = run(deform_roi_pool, {**tensors, "input": nowhere}, geometry)
        for name, t in result.items():
            bad = t.flatten(1).ne(0).any(1).nonzero().flatten().tolist()
            assert not bad, f"{name}: not zero for {[boxes[i] if name != 'input' else f'image {i}' for i in bad]}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_lost_boxes_and_offsets_leave_the_others_alone(dtype, device):
    tensors, geometry = deform_roi_pool_inputs(k=9, dtype=dtype, device=device)
    flat = tensors["offset"].view(-1)
    spots = torch.randperm(flat.numel(), device=device)[: flat.numel() // 5]
    special = torch.tensor([NAN, INF, -INF, 1e20, -1e20, 2.0**31, -(2.0**32)], device=device).to(flat)
    flat[spots] = special[torch.arange(len(spots), device=device) % len(special)]
    geometry["boxes"][2, 1], geometry["boxes"][5, 4] = NAN, INF
    check(deform_roi_pool, tensors, geometry)
    result = run(deform_roi_pool, tensors, geometry)
    lost = ~(tensors["offset"].double().abs() < 1e4).all(1, keepdim=True)
    lost[[2, 5]] = True
    assert 0.3 < lost.double().mean() < 0.7
    assert not result["output"][lost.expand_as(result["output"])].any()
    assert not result["offset"][lost.expand(-1, 2, -1, -1)].any() and not result["mask"][lost].any()


# Batches, lists, many boxes.


def test_each_box_pools_from_its_own_image(device):
    tensors, geometry = deform_roi_pool_inputs(n=4, k=9, device=device)
    geometry["boxes"][:, 0] = torch.tensor([3.0, 0, 3, 1, 0, 3, 1, 0, 3])  # none from image 2
    whole = run(deform_roi_pool, tensors, geometry)
    assert_all_near(whole, run(definition, tensors, geometry), 1e-12)
    assert not whole["input"][2].any() and whole["input"][[0, 1, 3]].flatten(1).any(1).all()
    for i, box in enumerate(geometry["boxes"]):
        image = tensors["input"][int(box[0])][None]
        alone = {"input": image, **{k: tensors[k][i : i + 1] for k in ("offset", "mask")}}
        result = run(deform_roi_pool, alone, {**geometry, "boxes": torch.cat([box.new_zeros(1), box[1:]])[None]})
        for name in ("output", "offset", "mask"):
            assert_near(whole[name][i : i + 1], result[name], 1e-12, name)


@pytest.mark.parametrize("counts", [(2, 3, 1), (0, 4, 0), (3, 0, 2)], ids=str)
def test_a_list_of_boxes_is_their_tensor(counts, device):
    tensors, geometry = deform_roi_pool_inputs(n=3, k=sum(counts), device=device)
    listed = list(geometry["boxes"][:, 1:].split(counts))
    geometry["boxes"][:, 0] = torch.arange(3, device=device).repeat_interleave(torch.tensor(counts, device=device))
    expected = run(deform_roi_pool, tensors, geometry)
    actual = run(deform_roi_pool, tensors, {**geometry, "boxes": listed})
    assert_same(actual, expected, torch.float64)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_many_boxes_on_any_number_of_threads(dtype, memory_format):
    tensors, geometry = deform_roi_pool_inputs(n=3, c=20, k=300, output_size=4, dtype=dtype, boxes_dtype=torch.float32)
    tensors["input"] = tensors["input"].contiguous(memory_format=memory_format)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run(deform_roi_pool, tensors, geometry))
    finally:
        torch.set_num_threads(threads)
    one, two = results
    assert torch.equal(one["output"], two["output"])
    assert_all_near(two, one, TOLERANCE[dtype])
    if memory_format == torch.channels_last and dtype != torch.float64:
        check(deform_roi_pool, tensors, geometry)
