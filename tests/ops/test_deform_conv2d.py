"""The numbers of dcnv2_d2.ops.deform_conv2d: against the float64 definition, torchvision, F.conv2d and hand tables."""

import math
import random

import pytest
import torch
import torchvision
from dcnv2_d2.ops import deform_conv2d
from torch.nn import functional as F

from ..reference import (
    TOLERANCE,
    assert_all_near,
    assert_near,
    assert_same,
    deform_conv2d_dense,
    deform_conv2d_inputs,
    run,
    sampling_points,
)
from ..reference import deform_conv2d as definition

NAMES = ("input", "offset", "weight", "bias", "mask")
CHOICES = {
    "n": [1, 2, 3],
    "kernel": [1, 2, 3, 5, (3, 5)],
    "stride": [1, 2, (1, 2), (3, 1)],
    "padding": [0, 1, 2, (2, 1)],
    "dilation": [1, 2, (1, 2), (2, 1)],
    "groups": [1, 2, 4],
    "offset_groups": [1, 2, 4],
    "bias": [True, False],
    "mask": [True, False],
}


def sample(count, seed):
    """`count` configurations in which each choice of each argument appears about equally often."""
    rng = random.Random(seed)
    columns = {}
    for name, values in CHOICES.items():
        columns[name] = (values * count)[:count]
        rng.shuffle(columns[name])
    return [{name: columns[name][i] for name in columns} for i in range(count)]


def describe(config):
    return "-".join(f"{k}{v}" for k, v in config.items()).replace(" ", "")


def check(config, dtype, device="cpu", tolerance=None, **dtypes):
    """Output and all gradients against the definition in float64, evaluated on the same rounded values."""
    tensors, geometry = deform_conv2d_inputs(**config, dtype=dtype, device=device, **dtypes)
    grad = torch.randn_like(deform_conv2d(**tensors, **geometry))
    actual = run(deform_conv2d, tensors, geometry, grad)
    doubles = {k: t if t is None else t.double() for k, t in tensors.items()}
    assert_all_near(actual, run(definition, doubles, geometry, grad), tolerance or TOLERANCE[dtype])


# The oracles themselves: two formulations with nothing in common.


@pytest.mark.parametrize("config", sample(12, seed=1), ids=describe)
def test_definitions_agree(config):
    tensors, geometry = deform_conv2d_inputs(**config)
    grad = torch.randn_like(definition(**tensors, **geometry))
    assert_all_near(run(definition, tensors, geometry, grad), run(deform_conv2d_dense, tensors, geometry, grad), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("config", sample(40, seed=2), ids=describe)
def test_matches_definition(config, dtype, device):
    check(config, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        {"c": 3, "o": 5},
        {"c": 17, "o": 5, "kernel": (3, 5)},
        {"c": 70, "o": 5, "h": 40, "w": 53, "n": 1, "offset_groups": 2},  # many tiles, the last one partial
        {"c": 70, "o": 33, "groups": 1, "offset_groups": 70, "h": 5},
        {"c": 17, "o": 17, "groups": 17},
        {"c": 12, "o": 36, "groups": 12, "offset_groups": 3, "dilation": 2},
        {"c": 12, "o": 8, "groups": 4, "offset_groups": 3},
        {"c": 12, "o": 6, "groups": 2, "offset_groups": 12},
        {"c": 1, "o": 1, "kernel": 1, "padding": 0},
        {"c": 512, "o": 8, "h": 6, "w": 5},
        {"c": 4, "o": 130, "h": 6, "w": 5},
        {"n": 3, "h": 3, "w": 5, "kernel": (3, 5), "padding": 0},  # 1x1 output
        {"n": 3, "h": 1, "w": 9, "kernel": (1, 3), "padding": (0, 1), "reach": 1},
        {"n": 3, "h": 9, "w": 1, "reach": 1},
        {"n": 3, "h": 1, "w": 1, "reach": 1},
        {"h": 19, "w": 31, "reach": 40},  # most samples outside, many far
        {"h": 9, "w": 9, "padding": 7, "reach": 9, "kernel": 2},  # padding beyond the kernel
    ],
    ids=describe,
)
def test_awkward_sizes(config, dtype, device):
    # Coordinates near 40 cost float32 samples two more bits than the tolerance foresees.
    check(config, dtype, device, tolerance=TOLERANCE[dtype] * (4 if config.get("reach", 0) > 9 else 1))


@pytest.mark.parametrize("offset_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_offset_and_mask_of_another_dtype(dtype, offset_dtype, device):
    coarsest = max(TOLERANCE[dtype], TOLERANCE[offset_dtype])
    config = {"c": 12, "o": 10, "kernel": (3, 2), "groups": 2, "offset_groups": 3}
    check(config, dtype, device, tolerance=coarsest, offset_dtype=offset_dtype)


@pytest.mark.parametrize("config", sample(20, seed=3), ids=describe)
def test_matches_torchvision(config):
    tensors, geometry = deform_conv2d_inputs(**config)
    # A third of the sampling points at whole pixels, none of them on the line at -1, where torchvision's rule differs.
    whole = torch.rand_like(tensors["offset"]) < 1 / 3
    offset = torch.where(whole, tensors["offset"].floor(), tensors["offset"])
    y, x = sampling_points(tensors["input"], offset, tensors["weight"], **geometry)
    tensors["offset"] = torch.where(torch.stack([y, x], 3).reshape_as(offset) == -1, offset + 0.25, offset)
    grad = torch.randn_like(definition(**tensors, **geometry))
    expected = run(torchvision.ops.deform_conv2d, tensors, geometry, grad)
    assert_all_near(run(deform_conv2d, tensors, geometry, grad), expected, 1e-12)


@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_zero_offset_is_conv2d(groups, modulated, device):
    config = {"c": 10, "o": 6, "kernel": (3, 5), "stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)}
    tensors, geometry = deform_conv2d_inputs(**config, groups=groups, mask=modulated, device=device)
    tensors["offset"].zero_()
    if modulated:
        tensors["mask"].fill_(1)
    actual = run(deform_conv2d, tensors, geometry)
    plain = {name: tensors[name] for name in ("input", "weight", "bias")}
    expected = run(F.conv2d, plain, {**geometry, "groups": groups})
    assert_all_near({name: actual[name] for name in expected}, expected, 1e-12)


def test_no_mask_is_a_mask_of_ones(device):
    tensors, geometry = deform_conv2d_inputs(c=12, o=6, groups=3, offset_groups=2, device=device)
    tensors["mask"].fill_(1)
    expected = run(deform_conv2d, tensors, geometry)
    del expected["mask"]
    assert_all_near(run(deform_conv2d, {**tensors, "mask": None}, geometry), expected, 1e-12)


def test_an_impulse_shows_the_order_dy_dx(device):
    image = torch.zeros(1, 1, 9, 9, device=device)
    image[0, 0, 6, 2] = 1
    offset = torch.tensor([2.0, -3.0], device=device).view(1, 2, 1, 1).expand(1, 2, 9, 9)
    out = deform_conv2d(image, offset, torch.ones(1, 1, 1, 1, device=device))
    # The output at (4, 5) looks at (4 + 2, 5 - 3).
    assert out.nonzero().tolist() == [[0, 0, 4, 5]]


@pytest.mark.parametrize("offset_groups", [1, 2, 4])
def test_each_offset_and_mask_channel_serves_one_tap_of_one_group(offset_groups, device):
    c, kh, kw, h, w, g = 4, 2, 3, 5, 6, offset_groups
    taps = kh * kw
    image = torch.randint(1, 99, (1, c, h, w), device=device).double()
    # Output channel c*taps + k is tap k of input channel c and nothing else.
    weight = torch.eye(c * taps, dtype=torch.float64, device=device).view(c * taps, c, kh, kw)
    ho, wo = h - kh + 1, w - kw + 1
    padded = F.pad(image[0], (0, 1, 0, 1))
    offset = torch.zeros(1, 2 * g * taps, ho, wo, dtype=torch.float64, device=device)
    mask = torch.ones(1, g * taps, ho, wo, dtype=torch.float64, device=device)

    def columns(moved_group=None, moved_tap=None, dy=0, dx=0):
        out = torch.empty(c, taps, ho, wo, dtype=torch.float64, device=device)
        for channel in range(c):
            for k in range(taps):
                hit = (channel // (c // g), k) == (moved_group, moved_tap)
                y, x = k // kw + dy * hit, k % kw + dx * hit
                out[channel, k] = padded[channel, y : y + ho, x : x + wo]
        return out

    for group in range(g):
        for k in range(taps):
            for axis, shift in enumerate([(1, 0), (0, 1)]):
                one = offset.clone()
                one[:, group * 2 * taps + 2 * k + axis] = 1
                expected = columns(group, k, *shift)
                assert torch.equal(deform_conv2d(image, one, weight)[0], expected.flatten(0, 1)), (group, k, axis)
            one = mask.clone()
            one[:, group * taps + k] = 0.5
            expected = columns().view(g, c // g, taps, ho, wo)
            expected[group, :, k] *= 0.5
            actual = deform_conv2d(image, offset, weight, mask=one)[0]
            assert torch.equal(actual, expected.flatten(0, 2)), (group, k)


# The border rule. A map with H = 4 rows of 2, 3, 5, 7; what a sample at y gives, its derivative by y, and the weights
# of the four rows.
H, ROWS = 4, (2.0, 3.0, 5.0, 7.0)
OUTSIDE = (0.0, 0.0, (0, 0, 0, 0))
BORDER = {
    -1.25: OUTSIDE,
    -1.0: OUTSIDE,  # torchvision: derivative 2
    -0.75: (0.5, 2.0, (0.25, 0, 0, 0)),
    -0.25: (1.5, 2.0, (0.75, 0, 0, 0)),
    0.0: (2.0, 1.0, (1, 0, 0, 0)),
    0.75: (2.75, 1.0, (0.25, 0.75, 0, 0)),
    1.0: (3.0, 2.0, (0, 1, 0, 0)),
    2.75: (6.5, 2.0, (0, 0, 0.25, 0.75)),
    H - 1.0: (7.0, -7.0, (0, 0, 0, 1)),
    H - 0.75: (5.25, -7.0, (0, 0, 0, 0.75)),
    H - 0.25: (1.75, -7.0, (0, 0, 0, 0.25)),
    H: OUTSIDE,
    H + 0.25: OUTSIDE,
    **dict.fromkeys([math.nan, math.inf, -math.inf, 1e4, -1e4], OUTSIDE),
}
BEYOND_HALF = [
    s * v for s in (1, -1) for v in (1e20, 3e38, 2.0**31 - 128, 2.0**31, 2.0**32, 2.0**32 + 1024, 2.0**63, 2.0**64)
]


def sample_column(positions, dtype, device, axis, across=1.0, offset_dtype=None):
    """One sample per image at y = position, x = across (axis 0) or the other way round; tensors with gradients."""
    n = len(positions)
    image = torch.tensor(ROWS, dtype=dtype, device=device).view(1, 1, H, 1).repeat(n, 1, 1, 3)
    offset = torch.full((n, 2, 1, 1), across, dtype=torch.float64)
    offset[:, axis, 0, 0] = torch.tensor(positions, dtype=torch.float64)
    offset = offset.to(device, offset_dtype or dtype)
    image, stride = (image, (H, 3)) if axis == 0 else (image.mT.contiguous(), (3, H))
    tensors = {
        "input": image,
        "offset": offset,
        "weight": torch.ones(1, 1, 1, 1, dtype=dtype, device=device),
        "bias": None,
        "mask": torch.ones(n, 1, 1, 1, dtype=dtype, device=device),
    }
    return run(deform_conv2d, tensors, {"stride": stride})


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_border_table(dtype, axis, device):
    result = sample_column(list(BORDER), dtype, device, axis)
    for i, (position, (value, derivative, weights)) in enumerate(BORDER.items()):
        assert result["output"][i].item() == value, position
        assert result["mask"][i].item() == value, position
        assert result["offset"][i, axis].item() == derivative, position
        assert result["offset"][i, 1 - axis].item() == 0, position  # rows are constant
        touched = result["input"][i, 0] if axis == 0 else result["input"][i, 0].mT
        assert touched[:, 1].tolist() == list(weights), position
        assert not touched[:, [0, 2]].any(), position
    assert result["weight"].item() == sum(value for value, _, _ in BORDER.values())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_border_to_the_last_bit(dtype, axis, device):
    def next_to(value, towards):
        return torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(towards, dtype=dtype)).item()

    inside = [next_to(-1.0, 0.0), next_to(4.0, 0.0)]
    result = sample_column([*inside, next_to(-1.0, -2.0), next_to(4.0, 5.0)], dtype, device, axis)
    expected = [2 * (inside[0] + 1), 7 * (4 - inside[1]), 0.0, 0.0]
    assert result["output"].flatten().tolist() == expected
    assert result["offset"][:, axis].flatten().tolist() == [2.0, -7.0, 0.0, 0.0]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("offset_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_coordinates_no_integer_can_hold(offset_dtype, axis, device):
    result = sample_column(BEYOND_HALF, torch.float32, device, axis, offset_dtype=offset_dtype)
    assert not any(t.any() for t in result.values())


@pytest.mark.parametrize("axis", [0, 1])
def test_outside_along_one_axis_silences_the_other(axis, device):
    outside = [p for p, row in BORDER.items() if row is OUTSIDE]
    for across in (0.5, -0.5, 2.5):
        result = sample_column(outside, torch.float64, device, axis, across=across)
        assert not any(t.any() for t in result.values()), across


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_whole_pixel_offsets_follow_the_authors_rule(dtype, device):
    # Every position is an integer, and about one in six lies on the line at -1, H - 1 or H.
    tensors, geometry = deform_conv2d_inputs(c=6, o=4, h=7, w=8, padding=2, offset_groups=2, dtype=dtype, device=device)
    tensors["offset"] = tensors["offset"].floor()
    grad = torch.randn_like(definition(**tensors, **geometry))
    assert_all_near(
        run(deform_conv2d, tensors, geometry, grad), run(definition, tensors, geometry, grad), TOLERANCE[dtype]
    )


SPECIAL = [math.nan, math.inf, -math.inf, 1e20, -1e20, 2.0**31, -(2.0**31), 2.0**32]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_offsets_that_are_no_positions_contribute_nothing(dtype, device):
    config = {"c": 20, "o": 6, "kernel": (3, 2), "groups": 2, "offset_groups": 4, "h": 9, "w": 10}
    tensors, geometry = deform_conv2d_inputs(**config, dtype=dtype, device=device)
    flat = tensors["offset"].view(-1)
    spots = torch.randperm(flat.numel(), device=device)[: flat.numel() // 5]
    flat[spots] = torch.tensor(SPECIAL).to(flat)[torch.arange(len(spots), device=device) % len(SPECIAL)]
    doubles = {k: t.double() for k, t in tensors.items()}
    grad = torch.randn_like(deform_conv2d(**tensors, **geometry))
    actual = run(deform_conv2d, tensors, geometry, grad)
    assert_all_near(actual, run(definition, doubles, geometry, grad), TOLERANCE[dtype])
    n, channels, ho, wo = tensors["offset"].shape
    pairs = tensors["offset"].double().view(n, channels // 2, 2, ho, wo)
    lost = ~(pairs.abs() < 1e4).all(2)
    assert 0.3 < lost.double().mean() < 0.4
    assert not actual["mask"][lost].any()
    assert not actual["offset"].view_as(pairs).movedim(2, -1)[lost].any()


@pytest.mark.parametrize("poison", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_poisoned_pixel_reaches_only_samples_beside_it(dtype, poison, device):
    # Samples near a border, beyond it and lost altogether must not read a stand-in pixel with weight zero.
    tensors, geometry = deform_conv2d_inputs(c=20, o=4, h=9, w=12, offset_groups=2, reach=4, dtype=dtype, device=device)
    tensors["offset"][:, :, ::3, ::2] = math.nan
    clean = run(deform_conv2d, tensors, geometry)
    for row, column in [(0, 0), (0, 11), (8, 0), (8, 11), (4, 5), (0, 6), (3, 0)]:
        image = tensors["input"].clone()
        image[:, :, row, column] = poison
        y, x = sampling_points(image, tensors["offset"], tensors["weight"], **geometry)
        beside = ((y - row).abs() < 1) & ((x - column).abs() < 1)
        result = run(deform_conv2d, {**tensors, "input": image}, geometry)
        reached = beside.any(1).any(1)
        assert reached.any() and not reached.all()
        assert not result["output"].isfinite().movedim(1, -1)[reached].any()
        assert torch.equal(result["output"].movedim(1, -1)[~reached], clean["output"].movedim(1, -1)[~reached])
        untouched = ~beside.flatten(1, 2)
        assert torch.equal(result["mask"][untouched], clean["mask"][untouched])
        untouched = untouched.repeat_interleave(2, 1)
        assert torch.equal(result["offset"][untouched], clean["offset"][untouched])
        assert_near(result["input"], clean["input"], TOLERANCE[dtype] if device == "cuda" else 0)


# Batches, layouts, repetition.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("n", [0, 1, 2, 33, 65])
def test_a_batch_is_its_images(n, dtype, device):
    config = {"c": 6, "o": 4, "h": 8, "w": 7, "kernel": (3, 2), "stride": (2, 1), "groups": 2, "offset_groups": 3}
    tensors, geometry = deform_conv2d_inputs(**config, n=n, dtype=dtype, device=device)
    whole = run(deform_conv2d, tensors, geometry)
    assert whole["output"].shape == (n, 4, 4, 8)
    assert {k: whole[k].shape for k in NAMES} == {k: t.shape for k, t in tensors.items()}
    shared = {k: torch.zeros_like(tensors[k]) for k in ("weight", "bias")}
    for i in range(n):
        image = {k: t if k in shared else t[i : i + 1] for k, t in tensors.items()}
        alone = run(deform_conv2d, image, geometry)
        for name in ("output", "input", "offset", "mask"):
            assert_near(whole[name][i : i + 1], alone[name], TOLERANCE[dtype], name)
        for name in shared:
            shared[name] += alone[name]
    for name in shared:
        assert_near(whole[name], shared[name], TOLERANCE[dtype], name)


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "a window": lambda t: F.pad(t, (1, 2, 2, 1))[..., 2:-1, 1:-2],
    "channel slice": lambda t: torch.cat([t.flip(1), t, t], 1)[:, t.shape[1] : 2 * t.shape[1]],
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["input", "offset", "weight", "mask", "grad_output", "all"])
def test_layouts(name, layout, device):
    config = {"c": 12, "o": 6, "kernel": (2, 3), "groups": 2, "offset_groups": 2, "stride": (1, 2), "padding": (0, 1)}
    tensors, geometry = deform_conv2d_inputs(**config, device=device)
    grad = torch.randn_like(deform_conv2d(**tensors, **geometry))
    chosen = [name] if name != "all" else ["input", "offset", "weight", "mask", "grad_output"]
    laid = {k: LAYOUTS[layout](t) for k, t in {**tensors, "grad_output": grad}.items() if k in chosen}
    for k, t in laid.items():
        assert not t.is_contiguous(), k

    def run_as_laid(contiguous):
        leaves = {k: laid.get(k, t).detach().requires_grad_() for k, t in tensors.items()}
        if contiguous:
            leaves = {k: t.detach().contiguous().requires_grad_() for k, t in leaves.items()}
        out = deform_conv2d(**leaves, **geometry)
        out_grad = laid.get("grad_output", grad)
        return out, torch.autograd.grad(out, leaves.values(), out_grad.contiguous() if contiguous else out_grad)

    out, grads = run_as_laid(contiguous=False)
    expected_out, expected_grads = run_as_laid(contiguous=True)
    assert_near(out, expected_out, 1e-12)
    for k, actual, expected in zip(tensors, grads, expected_grads, strict=True):
        assert_near(actual, expected, 1e-12, k)


def test_expanded_grad_output(device):
    tensors, geometry = deform_conv2d_inputs(n=3, device=device)
    leaves = [t.requires_grad_() for t in tensors.values()]
    out = deform_conv2d(**tensors, **geometry)
    expected = torch.autograd.grad((out * torch.ones_like(out)).sum(), leaves, retain_graph=True)
    for actual, gradient in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True):
        assert_near(actual, gradient, 1e-12 if device == "cuda" else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_to_the_bit(dtype, device):
    # reach 1: many samples add to the same pixels.
    tensors, geometry = deform_conv2d_inputs(n=3, c=70, o=40, h=33, w=35, reach=1, dtype=dtype, device=device)
    first = run(deform_conv2d, tensors, geometry)
    for _ in range(3):
        again = run(deform_conv2d, tensors, geometry)
        assert_same(again, first, dtype)


@pytest.mark.parametrize("wanted", NAMES)
def test_a_single_gradient_on_its_own(wanted, device):
    tensors, geometry = deform_conv2d_inputs(c=12, o=6, groups=3, offset_groups=2, device=device)
    expected = run(deform_conv2d, tensors, geometry)[wanted]
    leaf = tensors[wanted].requires_grad_()
    deform_conv2d(**tensors, **geometry).sum().backward()
    assert_near(leaf.grad, expected, 1e-12)
    assert all(t.grad is None for k, t in tensors.items() if k != wanted)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_keep_subpixel_positions_on_wide_maps(dtype, axis, device):
    # At x = 1400 float16 steps by a whole pixel and bfloat16 by eight.
    config = {"n": 1, "c": 64, "o": 8, "h": 300, "w": 1400, "kernel": (1, 3), "padding": (0, 1), "stride": (50, 1)}
    if axis == 1:
        config.update(h=1400, w=300, kernel=(3, 1), padding=(1, 0), stride=(1, 50))
    check(config, dtype, device, offset_dtype=torch.float32)
