"""Mimicking's losses by hand and, in float64, in a model; the choice of RoIs, their crops, still_statistics."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from dcnv2_d2.modeling.mimicking import FeatureMimicking, still_statistics
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from ..reference import assert_near
from .small_rcnn import CASCADE, FPN, assert_equal_gradients, gradients_of, losses_of, make_model, two_images

BACKGROUND = 2  # of two classes
# x1, y1, x2, y2 with fractional corners, inside an image of 40 x 60 and at least half a pixel from its border
INSIDE = [[0.5, 0.5, 59.5, 39.5], [3.25, 7.7, 20.1, 9.3], [30.01, 11.99, 55.5, 38.6], [17.3, 2.2, 17.9, 30.8]]


def make(in_features=2, num_classes=BACKGROUND, **kwargs):
    return FeatureMimicking(in_features, num_classes, **{"crop_size": 8, **kwargs})


def make_instances(classes, boxes=None, size=(40, 60)):
    classes = torch.tensor(classes, dtype=torch.long)
    corners = torch.rand(len(classes), 2, 2) * torch.tensor([size[1], size[0]]) * 0.9
    boxes = torch.cat([corners.amin(1), corners.amax(1) + 1], dim=1) if boxes is None else torch.tensor(boxes)
    return Instances(size, proposal_boxes=Boxes(boxes.float().reshape(-1, 4)), gt_classes=classes)


def ramp(*sizes, padding=float("nan")):
    """Images, padded to 64 x 72, whose channels are x and y of the pixel's centre and the number of the image."""
    tensor = torch.full((len(sizes), 3, 64, 72), padding)
    for i, (image, (height, width)) in enumerate(zip(tensor, sizes, strict=True)):
        image[0, :height, :width] = torch.arange(width) + 0.5
        image[1, :height, :width] = torch.arange(height)[:, None] + 0.5
        image[2, :height, :width] = i + 1
    return ImageList(tensor, list(sizes))


def centres(boxes):
    """What the mean of a crop of a ramp is: Tensor[K, 3]"""
    return torch.cat([F.pad(b.get_centers(), (0, 1), value=i + 1) for i, b in enumerate(boxes)])


def crop_means(crops):
    return crops.mean((2, 3))


def never(*args):
    raise AssertionError("called")


# Three images with two, no and one RoIs; cosines 24/25, 0 and -1
RCNN = torch.tensor([[3.0, 4.0], [2.0, 0.0], [0.0, 5.0]])
FRCNN = torch.tensor([[4.0, 3.0], [0.0, 7.0], [0.0, -0.5]])
CLASSES = [[1, BACKGROUND], [], [0]]


@pytest.mark.parametrize("reduction, expected", [("sum", (0.04 + 1 + 2) / 3), ("mean", ((0.04 + 1) / 2 + 2) / 3)])
@pytest.mark.parametrize("weights", [(0.1, 0.1), (1.0, 0.0), (0.25, 3.0)])
def test_hand_built_case(weights, reduction, expected):
    mimicking = make(loss_weight=weights[0], cls_loss_weight=weights[1], reduction=reduction)
    with torch.no_grad():  # logits are log(2) * (a, b, a + b) for the features (a, b)
        mimicking.cls_score.weight.copy_(math.log(2) * torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
    with EventStorage() as storage:
        losses = mimicking.losses(RCNN, FRCNN, [make_instances(c) for c in CLASSES])
    assert losses.keys() == {"loss_mimic", "loss_mimic_cls"}
    assert losses["loss_mimic"].item() == pytest.approx(weights[0] * expected, rel=1e-6)
    shares = [2**4 / (2**3 + 2**4 + 2**7), 2**2 / (2**2 + 2**0 + 2**2), 2**0 / (2**0 + 2**5 + 2**5)]
    cross_entropy = sum(-math.log(share) for share in shares) / 3
    assert losses["loss_mimic_cls"].item() == pytest.approx(weights[1] * cross_entropy, rel=1e-6)
    assert storage.latest()["mimic/cosine_fg"][0] == pytest.approx((24 / 25 - 1) / 2, abs=1e-6)


def one_by_one(rcnn, frcnn):
    """Eq. 3 of each pair of features."""
    mimicking = make(rcnn.shape[1], loss_weight=1.0)
    with EventStorage():
        pairs = zip(rcnn.split(1), frcnn.split(1), strict=True)
        return torch.stack([mimicking.losses(a, b, [make_instances([0])])["loss_mimic"] for a, b in pairs])


def test_identical_features_give_0():
    features = torch.randn(100, 33) * 10 ** torch.linspace(-3, 3, 100)[:, None]
    assert (one_by_one(features, features) <= 2e-7).all()
    with EventStorage() as storage:
        losses = make(33).losses(features, 7 * features, [make_instances([0] * 60), make_instances([1] * 40)])
    assert losses["loss_mimic"].item() == pytest.approx(0, abs=1e-6)
    assert storage.latest()["mimic/cosine_fg"][0] == pytest.approx(1, abs=1e-6)


def test_the_loss_of_a_roi_is_between_0_and_2():
    a, b = torch.randn(2, 100, 33)
    edges = torch.randn(300, 3)  # nearly equal, opposite, nearly orthogonal
    values = one_by_one(torch.cat([a, a, a, 0 * a]), torch.cat([b, a, -a, b]))
    values = torch.cat([values, one_by_one(edges, edges), one_by_one(edges, -edges)])
    assert values.min() >= 0 and values.max() <= 2
    assert values[200:300] == pytest.approx(2) and values[300:400] == pytest.approx(1)


def test_both_sides_get_a_gradient_also_where_features_are_0():
    rcnn, frcnn = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        rcnn[1], frcnn[2] = 0, 0
    with EventStorage():
        losses = make(5).losses(rcnn, frcnn, [make_instances([0, 1, 2])])
    for features in (rcnn, frcnn):
        (grad,) = torch.autograd.grad(losses["loss_mimic"], features, retain_graph=True)
        assert grad.isfinite().all() and grad[0].abs().sum() > 0
    grads = torch.autograd.grad(losses["loss_mimic_cls"], (rcnn, frcnn), allow_unused=True)
    assert grads[0].abs().sum() > 0 and grads[1] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cosine_is_in_float32_under_autocast(dtype):
    # In the half types the cosines round to 1 or, in float16, the norms overflow.
    rcnn = (300 + torch.randn(6, 512)).to(dtype)
    frcnn = (300 + 20 * torch.randn(6, 512)).to(dtype)
    expected = (1 - F.cosine_similarity(rcnn.double(), frcnn.double())).sum().item()
    with EventStorage(), torch.autocast("cpu", dtype):
        losses = make(512, loss_weight=1.0).losses(rcnn, frcnn, [make_instances([0] * 6)])
    assert losses["loss_mimic"].dtype == torch.float32
    assert losses["loss_mimic"].item() == pytest.approx(expected, rel=1e-3)


# --- Omega


@pytest.mark.parametrize("regions, chosen", [("fg", {0, 1}), ("bg", {BACKGROUND}), ("both", {0, 1, BACKGROUND})])
@pytest.mark.parametrize("num_rois", [1, 5, 32])
def test_regions(regions, chosen, num_rois):
    classes = [[2, 0, 1, 2, 2, 0, 1, 1, 0, 2], [], [2, 2, 2], [1] * 50]
    proposals = [make_instances(c) for c in classes]
    omega = make(regions=regions, num_rois=num_rois).sample(proposals)
    assert [len(instances) for instances in proposals] == [10, 0, 3, 50]  # not cut down themselves
    for instances, from_image, c in zip(omega, proposals, classes, strict=True):
        assert instances.image_size == from_image.image_size
        assert len(instances) == min(num_rois, sum(k in chosen for k in c))
        rows = set(
            map(tuple, torch.cat([from_image.proposal_boxes.tensor, from_image.gt_classes[:, None]], 1).tolist())
        )
        drawn = torch.cat([instances.proposal_boxes.tensor, instances.gt_classes[:, None]], 1).tolist()
        assert len(set(map(tuple, drawn))) == len(drawn)  # none twice
        assert set(map(tuple, drawn)) <= rows and set(instances.gt_classes.tolist()) <= chosen


def test_every_roi_is_drawn_as_often():
    mimicking = make(num_rois=4)
    proposals = [make_instances([0] * 12 + [BACKGROUND] * 3)]
    proposals[0].number = torch.arange(15)
    counts = torch.zeros(15)
    for _ in range(600):
        counts[mimicking.sample(proposals)[0].number] += 1
    assert counts[12:].sum() == 0 and counts.sum() == 2400
    assert (counts[:12] - 200).abs().max() < 60  # five standard deviations


# --- crops


def expected_crop(box, size, shape, samples=64):
    """Mean of the clamped coordinates in each pixel of the crop: beyond the last pixels' centres all is flat."""
    x1, y1, x2, y2 = box
    axes = []
    for low, high, length in ((y1, y2, shape[0]), (x1, x2, shape[1])):
        fine = low + (torch.arange(size * samples, dtype=torch.float64) + 0.5) * (high - low) / (size * samples)
        axes.append(fine.clamp(0.5, length - 0.5).reshape(size, samples).mean(1))
    return torch.stack([axes[1].expand(size, size), axes[0][:, None].expand(size, size)])


@pytest.mark.parametrize("size", [1, 8, 33, 224])
def test_crops_have_the_coordinates_of_the_box(size):
    images = ramp((40, 60), (64, 61), (40, 60))
    boxes = [Boxes(torch.tensor(INSIDE)), Boxes(torch.zeros(0, 4)), Boxes(torch.tensor(INSIDE[1:]))]
    crops = make(crop_size=size).crop(images, boxes)
    assert crops.shape == (7, 3, size, size)
    for crop, box, number in zip(crops, INSIDE + INSIDE[1:], [1] * 4 + [3] * 3, strict=True):
        assert (crop[:2] - expected_crop(box, size, (40, 60))).abs().max() < 1e-4
        assert (crop[2] - number).abs().max() < 1e-5


@pytest.mark.parametrize("padding", [float("nan"), 1e6])
def test_at_the_border_crops_continue_the_edge_and_never_see_the_padding(padding):
    border = [[0.0, 0.0, 60.0, 40.0], [59.0, 39.0, 60.0, 40.0], [59.75, 0.1, 60.0, 39.9], [0.0, 0.0, 0.25, 0.5]]
    crops = make(crop_size=16).crop(
        ramp((64, 72), (40, 60), padding=padding), [Boxes(torch.zeros(0, 4)), Boxes(border)]
    )
    for crop, box in zip(crops, border, strict=True):
        expected = expected_crop(box, 16, (40, 60))
        # The samples of a pixel of the crop, one or a few, may straddle the line from where the edge goes on.
        assert (crop[:2] - expected).abs().max() < 0.13
        assert crop[0].max() <= 59.5 + 1e-4 and crop[1].max() <= 39.5 + 1e-4
        flat = (expected == 0.5) | (expected == torch.tensor([59.5, 39.5])[:, None, None])
        assert crop[:2][flat].tolist() == pytest.approx(expected[flat].tolist(), abs=1e-4)


def test_crops_shrink_by_averaging():
    image, box = torch.rand(1, 3, 64, 64), torch.tensor([[8.0, 0, 56, 64]])
    crop = make(crop_size=8).crop(ImageList(image, [(64, 64)]), [Boxes(box)])
    assert_near(crop, F.avg_pool2d(image[..., 8:56].double(), (8, 6)), 1e-5)


# --- together


@pytest.mark.parametrize("chunk", [0, 1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_crops_and_boxes_are_in_the_same_order(chunk, checkpointing):
    # Both features are the RoI's centre, so that any other order would give a loss.
    proposals = [make_instances([0] * 6), make_instances([]), make_instances([1, 2, 1], size=(50, 50))]
    images, sizes = ramp((40, 60), (64, 72), (50, 50)), []

    def rcnn(crops):
        sizes.append(len(crops))
        return crop_means(crops)

    mimicking = make(3, num_rois=4, chunk=chunk, checkpointing=checkpointing, loss_weight=1.0)
    with EventStorage() as storage:
        losses = mimicking(images, proposals, rcnn, centres)
    assert losses["loss_mimic"].item() == pytest.approx(0, abs=1e-5)
    assert storage.latest()["mimic/num_rois"][0] == pytest.approx((4 + 0 + 2) / 3)
    assert sizes == {0: [6], 1: [1] * 6, 3: [3, 3]}[chunk]


@pytest.mark.parametrize("regions, classes", [("fg", [[2, 2], [2]]), ("fg", [[], []]), ("bg", [[0], [1, 1]])])
def test_without_rois_the_losses_are_0_and_the_branch_runs(regions, classes):
    proposals = [make_instances(classes[0]), make_instances(classes[1], size=(64, 72))]
    scale, seen = nn.Parameter(torch.tensor(1.7)), []

    def rcnn(crops):
        seen.append(crops)
        return scale * crops.flatten(1)[:, :3]

    mimicking = make(3, regions=regions)
    with EventStorage() as storage:
        losses = mimicking(ramp((40, 60), (64, 72)), proposals, rcnn, lambda boxes: scale.exp() * centres(boxes))
    assert [loss.item() for loss in losses.values()] == [0, 0]
    assert len(seen) == 1 and len(seen[0]) == 1 and seen[0].isfinite().all()
    grads = torch.autograd.grad(sum(losses.values()), [scale, *mimicking.parameters()])
    assert all((grad == 0).all() for grad in grads)  # and none is None
    assert storage.latest()["mimic/num_rois"] == (0, 0) and "mimic/cosine_fg" not in storage.latest()


# --- in a model

# Proposals from outside: Detectron2's RPN does not run in float64.
GIVEN = {"PROPOSAL_GENERATOR.NAME": "PrecomputedProposals"}


def with_proposals(inputs):
    """Boxes near those of the ground truth and far from them, so that the batch has both kinds."""
    for image in inputs:
        target = image["instances"]
        boxes = target.gt_boxes.tensor
        near = torch.cat([boxes + 4 * torch.rand_like(boxes) for _ in range(6)])
        far = torch.tensor([[0.5, 0.25, 20, 12], [40, 50, 70, 77], [0, 60, 9, 80]])
        proposals = Instances(target.image_size, proposal_boxes=Boxes(torch.cat([near, far])))
        proposals.proposal_boxes.clip(target.image_size)
        proposals.objectness_logits = torch.zeros(len(proposals))
        image["proposals"] = proposals
    return inputs


@pytest.fixture(params=["mdpool", "cascade", "fpn", "bg and fg"])
def in_float64(request):
    """A model in float64 with its input, whose proposals are given."""
    changes = {"mdpool": {}, "cascade": CASCADE, "fpn": FPN, "bg and fg": {"MIMIC.REGIONS": "both"}}[request.param]
    return make_model(GIVEN | changes).double(), with_proposals(two_images())


def test_losses_and_gradients_by_the_formula(in_float64):
    model, inputs = in_float64
    heads, seen = model.roi_heads, []
    sample = heads.mimicking.sample
    heads.mimicking.sample = lambda proposals: seen.append(sample(proposals)) or seen[-1]
    losses = losses_of(model, inputs)
    (omega,) = seen
    boxes, classes = [o.proposal_boxes for o in omega], torch.cat([o.gt_classes for o in omega])
    assert len(classes) > 4

    def features_of(pixels, boxes):
        maps = model.backbone(pixels)
        pooled = heads.box_pooler([maps[name] for name in heads.box_in_features], boxes)
        return (heads.box_head[0] if isinstance(heads.box_head, nn.ModuleList) else heads.box_head)(pooled)

    images, size = model.preprocess_image(inputs), heads.mimicking.crop_size
    crops = heads.mimicking.crop(images, boxes)
    with EventStorage():
        frcnn = features_of(images.tensor, boxes)
        rcnn = features_of(crops, [Boxes(torch.tensor([[0, 0, size, size]]))] * len(crops))
    cosine = (rcnn * frcnn).sum(1) / (rcnn.norm(dim=1) * frcnn.norm(dim=1))
    logits = rcnn @ heads.mimicking.cls_score.weight.T + heads.mimicking.cls_score.bias
    expected = {
        "loss_mimic": 0.1 * (1 - cosine).sum() / len(inputs),
        "loss_mimic_cls": -0.1 * logits.log_softmax(1)[torch.arange(len(classes)), classes].mean(),
    }
    for name, loss in expected.items():
        assert losses[name].item() == pytest.approx(loss.item(), rel=1e-5), name
        assert_equal_gradients(gradients_of(model, losses[name]), gradients_of(model, loss), 1e-4)


def test_gradients_are_the_sum_of_both_branches(in_float64):
    model, inputs = in_float64
    mimicking = model.roi_heads.mimicking
    joint = gradients_of(model, losses_of(model, inputs)["loss_mimic"])
    both = mimicking.losses
    mimicking.losses = lambda rcnn, frcnn, omega: both(rcnn, frcnn.detach(), omega)
    of_rcnn = gradients_of(model, losses_of(model, inputs)["loss_mimic"])
    mimicking.losses = lambda rcnn, frcnn, omega: both(rcnn.detach(), frcnn, omega)
    of_frcnn = gradients_of(model, losses_of(model, inputs)["loss_mimic"])

    reached = {name for name, grad in joint.items() if grad is not None}
    later_stages = tuple(f"roi_heads.box_head.{k}." for k in (1, 2))
    shared = ("backbone.", "roi_heads.box_pooler.", "roi_heads.box_head.")
    shared = {n for n in joint if n.startswith(shared) and not n.startswith(later_stages)}
    assert reached == shared and len(shared) > 50
    # Not all levels of a pyramid have an RoI of the batch.
    everywhere = ("backbone.bottom_up.", "roi_heads.box_head.") if "backbone.fpn_output2.weight" in shared else ""
    for name in shared:
        assert (joint[name] - of_rcnn[name] - of_frcnn[name]).abs().max() <= 1e-10 * joint[name].abs().max(), name
        if name.startswith(everywhere):
            assert of_rcnn[name].abs().max() > 0 and of_frcnn[name].abs().max() > 0, name


# --- running statistics


def make_norms():
    return nn.Sequential(
        nn.BatchNorm2d(3, momentum=0.2), nn.BatchNorm2d(3, momentum=None), NaiveSyncBatchNorm(3, momentum=0.3)
    )


def buffers(module):
    return {name: value.clone() for name, value in module.named_buffers()}


@pytest.mark.parametrize("bad", [1.0, math.inf, math.nan])
def test_still_statistics(bad):
    norms, twin = make_norms(), make_norms()
    x, y = 3 + 2 * torch.randn(2, 4, 3, 5, 5)
    assert torch.equal(norms(x), twin(x))
    before = buffers(norms)
    with still_statistics(norms):
        inside = norms(y)
        norms(bad * y)
    for name, value in norms.named_buffers():
        assert torch.equal(value, before[name]), name
    # Inside with the statistics of the batch, as ever; afterwards as if nothing had been, also with a momentum of
    # None, which takes the average of all batches.
    assert torch.equal(twin(y), inside) and torch.equal(norms(y), inside)
    for (name, value), other in zip(norms.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(value, other), name


def test_still_statistics_after_an_exception():
    norms = make_norms()
    with pytest.raises(RuntimeError, match="inside"), still_statistics(norms):
        norms(torch.randn(2, 3, 4, 4))
        raise RuntimeError("inside")
    assert [norm.momentum for norm in norms] == [0.2, None, 0.3]
    before = buffers(norms)
    norms(torch.randn(2, 3, 4, 4))
    assert not any(torch.equal(a, b) for a, b in itertools.zip_longest(before.values(), norms.buffers()))


def test_still_statistics_leaves_norms_in_eval_mode_alone():
    norms = make_norms()
    norms(3 + 2 * torch.randn(4, 3, 5, 5))
    norms.eval()
    x = torch.randn(2, 3, 4, 4)
    expected = norms(x)
    with still_statistics(norms):
        assert torch.equal(norms(x), expected)
