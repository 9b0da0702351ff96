"""Recorded sampling positions and the tree of points below a node, against positions computed by hand."""

import itertools

import pytest
import torch
from dcnv2_d2.analysis import record_sampling, sampling_points
from dcnv2_d2.layers import DeformConv2d, ModulatedDeformConv2d
from torch import nn

from .. import reference

H, W = 32, 48


def layer(cls=ModulatedDeformConv2d, stride=1, shift=None, logits=None, **kwargs):
    """A 3x3 layer; shift: {(group, tap): (dy, dx)} at every position, logits: of each group's taps."""
    made = cls(4, 4, 3, stride, 1, **kwargs)
    bias = made.conv_offset.bias.data
    for (group, tap), values in (shift or {}).items():
        start = group * 18 + 2 * tap
        bias[start : start + 2] = torch.tensor(values)
    if logits is not None:
        bias[18 * made.offset_groups :] = torch.as_tensor(logits)
    return made


def record(*layers, size=(H, W)):
    model = nn.Sequential(*layers)
    with record_sampling(model) as records, torch.no_grad():
        model(torch.randn(1, 4, *size))
    return records


def grid(ys, xs):
    return [[y, x] for y, x in itertools.product(ys, xs)]


PLAIN_STRIDE_2 = nn.Conv2d(4, 4, 3, 2, 1)


@pytest.mark.parametrize("cls", [DeformConv2d, ModulatedDeformConv2d])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("node", [(8.0, 12.0), (8.4, 11.6)])
def test_one_layer(node, stride, cls):
    points, modulation = sampling_points(record(layer(cls, stride)), node, (H, W))
    assert points.tolist() == grid((7, 8, 9), (11, 12, 13))
    assert modulation.tolist() == [1.0 if cls is DeformConv2d else 0.5] * 9


def test_two_layers_of_stride_two():
    points, modulation = sampling_points(record(layer(stride=2), layer(stride=2)), (8.0, 20.0), (H, W))
    # The second samples at (8, 20) +- 2 image pixels, the first around each of these at +- 1.
    ys, xs = ([[c - 2 + i, c + i, c + 2 + i] for i in (-1, 0, 1)] for c in (8, 20))
    expected = [
        [ys[i1][i2], xs[j1][j2]] for i2, j2, i1, j1 in itertools.product(range(3), repeat=4)
    ]  # tap of the second layer, then of the first
    assert points.tolist() == expected
    assert modulation.tolist() == [0.25] * 81


def test_plain_layers_between():
    deeper = record(PLAIN_STRIDE_2, layer(), PLAIN_STRIDE_2, nn.ReLU(), layer())
    points, _ = sampling_points(deeper[-1:], (16.0, 24.0), (H, W))
    assert points.tolist() == grid((12, 16, 20), (20, 24, 28))
    points, _ = sampling_points(deeper, (16.0, 24.0), (H, W))
    assert len(points) == 81 and points[:9].tolist() == grid((10, 12, 14), (18, 20, 22))


@pytest.mark.parametrize("before, pixel", [([], 1), ([PLAIN_STRIDE_2], 2), ([PLAIN_STRIDE_2, PLAIN_STRIDE_2], 4)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("tap, shift", [(1, (2.0, 0.0)), (1, (0.0, -1.5)), (5, (-0.25, 0.75))])
def test_an_offset_moves_its_tap_in_image_pixels(tap, shift, stride, before, pixel):
    regular, _ = sampling_points(record(*before, layer(stride=stride)), (16.0, 24.0), (H, W))
    moved, _ = sampling_points(record(*before, layer(stride=stride, shift={(0, tap): shift})), (16.0, 24.0), (H, W))
    expected = torch.zeros(9, 2)
    expected[tap] = torch.tensor(shift) * pixel
    assert torch.equal(moved - regular, expected)


def test_an_offset_moves_what_hangs_below_it():
    # Tap (0, 1) of the last layer looks 2 of its pixels (4 of the image) further down, with all nine samples below.
    last = layer(shift={(0, 1): (2.0, 0.0)})
    regular, _ = sampling_points(record(layer(stride=2), layer()), (16.0, 24.0), (H, W))
    moved, _ = sampling_points(record(layer(stride=2), last), (16.0, 24.0), (H, W))
    expected = torch.zeros(9, 9, 2)
    expected[1, :, 0] = 4
    assert torch.equal(moved - regular, expected.flatten(0, 1))


def test_modulation_is_the_product_on_the_way():
    first, last = torch.linspace(-2, 2, 9), torch.linspace(1, -3, 9)
    _, modulation = sampling_points(
        record(layer(logits=first, mask_scale=2.0), layer(logits=last)), (16.0, 24.0), (H, W)
    )
    torch.testing.assert_close(modulation, torch.outer(last.sigmoid(), 2 * first.sigmoid()).flatten())


@pytest.mark.parametrize(
    "node, shift, left_out",
    [
        ((0.0, 0.0), {}, {0, 1, 2, 3, 6}),  # at -1
        ((0.0, 24.0), {(0, 1): (0.125, 0.0)}, {0, 2}),  # at -0.875, which still counts
        ((31.0, 24.0), {(0, 7): (-0.125, 0.0)}, {6, 8}),
        ((16.0, 47.0), {(0, 2): (0.0, 500.0), (0, 5): (0.0, -0.125)}, {2, 8}),
        ((16.0, 24.0), {(0, 4): (float("nan"), 0.0)}, {4}),
        ((16.0, 24.0), {(0, 3): (-17.0, 0.0), (0, 4): (0.0, -25.0), (0, 5): (16.0, 0.0)}, {3, 4, 5}),
    ],
)
def test_points_outside_are_left_out(node, shift, left_out):
    logits = torch.linspace(-2, 2, 9)
    points, modulation = sampling_points(record(layer(logits=logits, shift=shift)), node, (H, W))
    kept = [tap for tap in range(9) if tap not in left_out]
    expected = torch.tensor(node) + torch.tensor(grid((-1, 0, 1), (-1, 0, 1)))
    for (_, tap), values in shift.items():
        expected[tap] += torch.tensor(values)
    assert torch.equal(points, expected[kept])
    torch.testing.assert_close(modulation, logits.sigmoid()[kept])


def test_what_hangs_below_a_point_outside_is_left_out():
    points, modulation = sampling_points(record(layer(), layer()), (0.0, 24.0), (H, W))
    # Last layer: 6 of 9 inside. First: 6 inside below those in row 0, 9 below those in row 1.
    assert len(points) == len(modulation) == 3 * 6 + 3 * 9
    assert points.min() == 0


@pytest.mark.parametrize("stride", [1, 2])
def test_two_offset_groups(stride):
    records = record(layer(stride=stride, offset_groups=2, shift={(1, 2): (3.0, -1.0)}, logits=torch.arange(18) / 9))
    points, modulation = sampling_points(records, (16.0, 24.0), (H, W))
    expected = torch.tensor(2 * grid((15, 16, 17), (23, 24, 25))).float()
    expected[9 + 2] += torch.tensor([3.0, -1.0])
    assert torch.equal(points, expected)
    torch.testing.assert_close(modulation, (torch.arange(18) / 9).sigmoid())


@pytest.mark.parametrize("cls", [DeformConv2d, ModulatedDeformConv2d])
@pytest.mark.parametrize("groups", [1, 2])
def test_record_matches_the_reference(groups, cls):
    geometry = {"stride": (2, 1), "padding": (1, 3), "dilation": (1, 2)}
    made = cls(4, 6, (3, 2), **geometry, offset_groups=groups)
    for p in made.conv_offset.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 4, 9, 14)
    with record_sampling(nn.Sequential(made)) as records, torch.no_grad():
        made(x)
    offset, mask = made.predict(x)
    y, x_ = reference.sampling_points(x, offset, made.weight, **geometry)
    expected = torch.stack([y, x_], dim=3)[0].flatten(0, 1)  # [G*K, 2, Ho, Wo] of the first image
    (found,) = records
    torch.testing.assert_close(found.position.double(), expected, rtol=0, atol=1e-4)
    assert torch.equal(found.mask, torch.ones_like(found.mask) if mask is None else mask[0])
    assert found.mask.shape == expected[:, 0].shape and found.in_size == (9, 14) and found.name == "0"


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_does_not_move_the_grid(autocast):
    made = layer().to(torch.float32 if autocast else torch.bfloat16)
    x = torch.zeros(1, 4, 3, 400, dtype=made.weight.dtype)
    with record_sampling(nn.Sequential(made)) as records, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        made(x)
    assert records[0].position[4, 1, 0].tolist() == list(range(400))


def test_order_is_that_of_running():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = layer(), layer(stride=2)

        def forward(self, x):
            return self.first(self.second(x))

    with record_sampling(model := Backwards()) as records:
        model(torch.randn(1, 4, H, W))
    assert [(r.name, r.in_size) for r in records] == [("second", (H, W)), ("first", (H // 2, W // 2))]


def test_hooks_are_removed():
    model = nn.Sequential(layer(), layer())
    x = torch.randn(1, 4, 8, 8)
    with record_sampling(model) as records:
        model(x)
        model(x)
    assert len(records) == 4 and not any(r.position.requires_grad for r in records)
    model(x)
    assert len(records) == 4
    with pytest.raises(KeyError), record_sampling(model):
        raise KeyError
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_the_model_s_output_is_left_alone():
    model, x = nn.Sequential(layer(shift={(0, 3): (0.5, 1.5)}), layer(stride=2)), torch.randn(3, 4, 9, 11)
    expected = model(x)
    with record_sampling(model):
        assert torch.equal(model(x), expected)


def test_empty_batch():
    model = nn.Sequential(layer(), layer())
    with record_sampling(model):
        assert model(torch.randn(0, 4, 8, 8)).shape == (0, 4, 8, 8)


def test_no_records():
    with record_sampling(nn.Sequential(nn.Conv2d(4, 4, 3))) as records:
        pass
    with pytest.raises(ValueError, match="records must hold at least one deformable layer, got none"):
        sampling_points(records, (1.0, 1.0), (8, 8))
