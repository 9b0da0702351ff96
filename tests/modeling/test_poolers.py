"""Detectron2's ROIPooler, made deformable: levels, one branch for each or one for all, and borrowed branches."""

import copy
import math

import pytest
import torch
from dcnv2_d2.layers import DeformRoIPool, ModulatedDeformRoIPool
from dcnv2_d2.modeling.poolers import deform_pooler
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from ..reference import assert_near

CLASSES = [DeformRoIPool, ModulatedDeformRoIPool]
STRIDES = (4, 8, 16, 32)
CHANNELS, HEIGHT, WIDTH = 3, 256, 320
GAMMA = 0.2


def plain(output_size=7, strides=STRIDES, kind="ROIAlignV2", sampling_ratio=2):
    return ROIPooler(output_size, [1 / s for s in strides], sampling_ratio, kind)


def make(cls, *args, shared=False, branch_from=None, mask_scale=2.0, **kwargs):
    """A deformable pooler, in float64."""
    own = {"hidden_dims": ()}
    if cls is ModulatedDeformRoIPool:
        own = {"hidden_dims": (5, 4), "mask_scale": mask_scale}
    pooler = plain(*args, **kwargs)
    assert deform_pooler(pooler, cls, CHANNELS, shared=shared, branch_from=branch_from, gamma=GAMMA, **own) is None
    return pooler.double()


def randomise(pooler, reach=1.0):
    for p in pooler.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=reach / math.sqrt(p.shape[1]))
        else:
            nn.init.uniform_(p, 0, reach)  # positive: no ReLU is dead
    return pooler


def maps(n=2, strides=STRIDES, dtype=torch.float64):
    return [torch.randn(n, CHANNELS, HEIGHT // s, WIDTH // s, dtype=dtype) for s in strides]


def random_boxes(*counts, smallest=8, largest=900):
    """For each image so many boxes of these sizes (sqrt(area)); the larger ones reach over the image's border."""
    per_image = []
    for count in counts:
        size = smallest * (largest / smallest) ** torch.linspace(0, 1, count).double()
        aspect = 0.7 + 0.6 * torch.rand(count)
        sides = torch.stack([size * aspect, size / aspect], 1)
        center = torch.rand(count, 2).double() * torch.tensor([WIDTH, HEIGHT])
        per_image.append(Boxes(torch.cat([center - sides / 2, center + sides / 2], 1)))
        per_image[-1].tensor = per_image[-1].tensor.double()  # Boxes makes float32 of them
    return per_image


def levels_of(box_lists):
    """Detectron2's rule, Eq. 1 of the FPN paper: 224 pixels belong to p4, index 2."""
    areas = torch.cat([b.area() for b in box_lists])
    return (2 + torch.log2(areas.sqrt() / 224)).floor().clamp(0, 3).long()


def with_index(box_lists):
    return torch.cat([torch.cat([b.tensor.new_full((len(b), 1), i), b.tensor], 1) for i, b in enumerate(box_lists)])


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_fresh_pooler_is_roi_align_v2(cls, shared, sampling_ratio):
    x, box_lists = maps(3), random_boxes(30, 0, 25)
    assert levels_of(box_lists).unique().tolist() == [0, 1, 2, 3]
    expected = plain(sampling_ratio=sampling_ratio)(x, box_lists)
    assert_near(make(cls, sampling_ratio=sampling_ratio, shared=shared)(x, box_lists), expected, 1e-12)


@pytest.mark.parametrize("cls, strides, output_size", [
    (ModulatedDeformRoIPool, STRIDES, 7), (DeformRoIPool, (16,), (3, 5)), (DeformRoIPool, STRIDES[1:], 5),
])  # fmt: skip
def test_what_stays_of_the_pooler(cls, strides, output_size):
    pooler, before = make(cls, output_size, strides, sampling_ratio=4), plain(output_size, strides)
    for name in ("output_size", "min_level", "max_level", "canonical_level", "canonical_box_size"):
        assert getattr(pooler, name) == getattr(before, name)
    for layer, stride in zip(pooler.level_poolers, strides, strict=True):
        assert type(layer) is cls and layer.output_size == before.output_size
        assert layer.spatial_scale == 1 / stride and layer.sampling_ratio == 4 and layer.gamma == GAMMA
        assert getattr(layer, "mask_scale", 2.0) == 2.0


@pytest.mark.parametrize("cls", CLASSES)
def test_every_level_s_own_branch_moves_the_boxes_of_that_level(cls):
    pooler, x, box_lists = make(cls), maps(), random_boxes(20, 15)
    with torch.no_grad():
        for level, layer in enumerate(pooler.level_poolers):  # level i: i + 1 to the right, i upwards
            layer.branch[-1].bias[:98] = torch.tensor([level + 1.0, -level]).repeat_interleave(49)
    boxes, levels = with_index(box_lists), levels_of(box_lists)
    expected = boxes.new_zeros(len(boxes), CHANNELS, 7, 7)
    for level, stride in enumerate(STRIDES):
        own = levels == level
        assert own.any()
        size = boxes[own, 3:] - boxes[own, 1:3]
        shift = GAMMA * size * torch.tensor([level + 1, -level])
        moved = torch.cat([boxes[own, :1], boxes[own, 1:] + shift.repeat(1, 2)], 1)
        expected[own] = roi_align(x[level], moved, 7, 1 / stride, 2, aligned=True)
    assert_near(pooler(x, box_lists), expected, 1e-12)


def test_non_square_bins_on_one_level():
    pooler, x, box_lists = randomise(make(DeformRoIPool, (3, 5), (16,))), maps(strides=(16,)), random_boxes(4, 3)
    out = pooler(x, box_lists)
    assert out.shape == (7, CHANNELS, 3, 5)
    assert torch.equal(out, pooler.level_poolers[0](x[0], with_index(box_lists)))


@pytest.mark.parametrize("cls", CLASSES)
def test_state_dict(cls):
    parts = {f"{i}.{kind}" for i in ((0,) if cls is DeformRoIPool else (0, 2, 4)) for kind in ("weight", "bias")}
    for shared in (False, True):
        pooler = make(cls, shared=shared)
        owners = range(1 if shared else 4)
        expected = {f"level_poolers.{level}.branch.{part}" for level in owners for part in parts}
        assert set(pooler.state_dict()) == expected == {name for name, _ in pooler.named_parameters()}
        first = pooler.level_poolers[0]
        assert all((layer.branch_owner is first) == (shared or layer is first) for layer in pooler.level_poolers)


@pytest.mark.parametrize("cls", CLASSES)
def test_shared_equals_copies(cls):
    shared, copies = randomise(make(cls, shared=True)), make(cls)
    x, box_lists = maps(), random_boxes(20, 15)
    for layer in copies.level_poolers:
        layer.branch.load_state_dict(shared.level_poolers[0].branch.state_dict())
    out = shared(x, box_lists)
    assert torch.equal(copies(x, box_lists), out) and not torch.allclose(out, plain()(x, box_lists), 0.1)
    out.square().sum().backward()
    copies(x, box_lists).square().sum().backward()
    for name, grad in gradients(shared.level_poolers[0]).items():
        assert_near(grad, sum(gradients(layer)[name] for layer in copies.level_poolers), 1e-11, name)


@pytest.mark.parametrize("counts, smallest, largest, used", [
    ((5, 4), 8, 100, [0]), ((0, 6), 500, 900, [3]), ((6, 0), 120, 200, [1]), ((0, 0), 8, 900, []),
])  # fmt: skip
@pytest.mark.parametrize("lends", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_empty_levels_and_images_without_proposals(cls, lends, counts, smallest, largest, used):
    owner = randomise(make(cls))
    pooler = make(cls, 14, branch_from=owner) if lends else owner
    x = [level.requires_grad_() for level in maps()]
    box_lists = random_boxes(*counts, smallest=smallest, largest=largest)
    out = pooler(x, box_lists)
    assert out.shape == (sum(counts), CHANNELS, *pooler.output_size) and out.isfinite().all()
    out.square().sum().backward()
    for level, layer in enumerate(owner.level_poolers):
        # Distributed training waits for every parameter's gradient.
        assert all(grad is not None for grad in gradients(layer).values())
        assert all(grad.any() == (level in used) for grad in gradients(layer).values()), level
        assert x[level].grad is not None and x[level].grad.any() == (level in used)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_mask_pooler_borrows_level_by_level(cls, shared):
    box = randomise(make(cls, shared=shared))
    mask, x, box_lists = make(cls, 14, branch_from=box), maps(), random_boxes(12, 9)
    assert not list(mask.parameters()) and not mask.state_dict()
    for i, layer in enumerate(mask.level_poolers):
        assert layer.branch_owner is box.level_poolers[0 if shared else i]
    out = mask(x, box_lists)
    boxes, levels = with_index(box_lists), levels_of(box_lists)
    for i, layer in enumerate(box.level_poolers):
        offset, modulation = layer.predict(x[i], boxes[levels == i])
        predicted = mask.level_poolers[i].predict(x[i], boxes[levels == i])
        assert torch.equal(predicted[0], offset.repeat_interleave(2, 2).repeat_interleave(2, 3))
        if modulation is not None:
            assert_near(predicted[1], modulation.repeat_interleave(2, 2).repeat_interleave(2, 3), 1e-15)
        assert torch.equal(out[levels == i], mask.level_poolers[i](x[i], boxes[levels == i]))
    out.square().sum().backward()
    assert all(grad.any() for grad in gradients(box).values())


@pytest.mark.parametrize("shared", [False, True])
def test_a_copy_of_both_poolers_keeps_them_together(shared):
    box = randomise(make(ModulatedDeformRoIPool, shared=shared))
    model = nn.ModuleDict({"box": box, "mask": make(ModulatedDeformRoIPool, 14, branch_from=box)})
    x, box_lists = maps(), random_boxes(8, 5)
    twin, expected = copy.deepcopy(model), model["mask"](x, box_lists)
    for i, layer in enumerate(twin["mask"].level_poolers):
        assert layer.branch_owner is twin["box"].level_poolers[0 if shared else i]
    randomise(twin)
    assert not torch.equal(twin["mask"](x, box_lists), expected)
    assert torch.equal(model["mask"](x, box_lists), expected)
    state = model.state_dict()
    assert all(name.startswith("box.") for name in state)
    twin.load_state_dict(state)
    assert torch.equal(twin["mask"](x, box_lists), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_autocast(cls, dtype):
    box = randomise(make(cls), 0.1).float()
    mask = make(cls, 14, branch_from=box).float()
    x, box_lists = (
        [level.requires_grad_() for level in maps(dtype=dtype)],
        [Boxes(b.tensor) for b in random_boxes(9, 7)],
    )
    for pooler in (box, mask):
        expected = pooler([level.float() for level in x], box_lists)
        with torch.autocast("cpu", torch.bfloat16):
            actual = pooler(x, box_lists)
        assert actual.dtype == dtype
        # Not assert_near: a sample that rounding moves over the border of the map jumps to 0.
        assert F.cosine_similarity(actual.flatten().float(), expected.flatten(), dim=0) > 0.99
        actual.float().square().sum().backward()
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in gradients(box).values())


def test_branch_from_errors():
    for other in (plain(), make(DeformRoIPool)):
        kind = type(other.level_poolers[0]).__name__
        with pytest.raises(
            ValueError, match=f"branch_from must be a ModulatedDeformRoIPool of 3 channels, got a {kind}"
        ):
            make(ModulatedDeformRoIPool, 14, branch_from=other)
