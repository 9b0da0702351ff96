"""R-FCN: votes and scores from their definition, hard examples, and how it composes with the rest."""

import math

import pytest
import torch
import torch.nn.functional as F
from dcnv2_d2 import add_dcnv2_config
from dcnv2_d2.analysis import RoINode
from dcnv2_d2.export.detector import Detector
from dcnv2_d2.modeling.rfcn import RFCNROIHeads
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from ..reference import assert_near
from ..reference_ps_pool import deform_ps_roi_pool as defined

CLASSES = 3
SMALL = {
    "DEVICE": "cpu",
    "BACKBONE.NAME": "build_dcnv2_resnet_backbone",
    "RESNETS.STEM_OUT_CHANNELS": 8,
    "RESNETS.RES2_OUT_CHANNELS": 16,
    "RESNETS.WIDTH_PER_GROUP": 4,
    "RESNETS.RES5_DILATION": 2,
    "RESNETS.OUT_FEATURES": ["res4", "res5"],
    "RPN.IN_FEATURES": ["res4"],
    "ROI_HEADS.IN_FEATURES": ["res5"],
    "ROI_HEADS.NAME": "RFCNROIHeads",
    "ROI_HEADS.NUM_CLASSES": CLASSES,
    "ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    "ROI_BOX_HEAD.POOLER_TYPE": "DeformPSRoIPool",
    "ROI_BOX_HEAD.POOLER_RESOLUTION": 3,
    "ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2,
    "ROI_BOX_HEAD.SMOOTH_L1_BETA": 1.0,
    "RFCN.CONV_DIM": 12,
}
PLAIN = {"ROI_BOX_HEAD.POOLER_TYPE": "PSRoIPool"}


def make_cfg(**changes):
    cfg = get_cfg()
    add_dcnv2_config(cfg)
    cfg.merge_from_list([x for key, value in {**SMALL, **changes}.items() for x in (f"MODEL.{key}", value)])
    return cfg


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    return build_model(make_cfg(**changes))


@torch.no_grad()
def disturb(module, scale=0.3):
    for name, parameter in module.named_parameters():
        if name.startswith("roi_heads") or isinstance(module, RFCNROIHeads):
            parameter += scale * torch.randn_like(parameter)


def make_heads(**changes):
    return RFCNROIHeads(make_cfg(**changes), {"res5": ShapeSpec(channels=5, stride=16)})


def make_inputs(boxes=((20.0, 10, 90, 70), (5, 40, 40, 88))):
    noise = torch.randint(0, 256, (3, 91, 125), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    boxes = torch.tensor(boxes).reshape(-1, 4)
    target = Instances((91, 125), gt_boxes=Boxes(boxes), gt_classes=torch.arange(len(boxes)) % CLASSES)
    return [{"image": noise, "instances": target, "height": 91, "width": 125}]


def test_scores_and_deltas_equal_the_definition():
    """The mean over the bins of what each bin's own map says, moved by what the bin's own maps of offsets say."""
    heads = make_heads().double()
    disturb(heads)
    x = torch.randn(2, 5, 9, 11).double()
    boxes = [torch.tensor([[3.0, 5, 130, 90], [-20, 17, 60, 140]]), torch.tensor([[40.5, 33.25, 47, 38]])]
    rois = torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])
    hidden = F.conv2d(x, heads.conv_new_1.weight, heads.conv_new_1.bias).clamp(min=0)
    pool = {"output_size": 3, "spatial_scale": 1 / 16, "sampling_ratio": 2, "group_size": 3}

    def channel(pooler, c, owner):
        maps, offsets = (F.conv2d(hidden, conv.weight, conv.bias) for conv in (pooler.conv, pooler.conv_offset))
        moves = [defined(offsets[:, (2 * owner + axis) * 9 :][:, :9], rois, None, **pool) for axis in (0, 1)]
        return defined(maps[:, c * 9 :][:, :9], rois, torch.cat(moves, 1), gamma=0.1, **pool).sum((1, 2, 3)) / 9

    votes = heads.vote({"res5": x}, [b.double() for b in boxes])
    assert votes.shape == (3, CLASSES + 1 + 4, 3, 3)
    scores, deltas = heads.box_predictor(votes)
    expected = torch.stack([channel(heads.cls_pooler, c, c) for c in range(CLASSES + 1)], dim=1)
    assert_near(scores.double(), expected, 1e-6)
    assert_near(deltas.double(), torch.stack([channel(heads.bbox_pooler, c, 0) for c in range(4)], dim=1), 1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_zero_offsets_are_the_plain_detector(training):
    plain, model = make_model(**PLAIN), make_model(seed=1)
    disturb(plain, 0.1)
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    poolers = ("cls_pooler", "bbox_pooler")
    assert missing == [f"roi_heads.{pooler}.conv_offset.{p}" for pooler in poolers for p in ("weight", "bias")]
    outputs = []
    for detector in (plain, model):
        torch.manual_seed(3)
        with EventStorage():
            outputs.append(detector.train(training)(make_inputs()))
    if training:
        assert outputs[0].keys() == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
        assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])
        return
    first, second = (output[0]["instances"] for output in outputs)
    assert len(first) and torch.equal(first.scores, second.scores)
    assert torch.equal(first.pred_boxes.tensor, second.pred_boxes.tensor)


def test_classes_have_offsets_of_their_own_and_boxes_share_one():
    heads = make_heads(**{"DCNV2.POOL_GAMMA": 0.2})
    assert heads.cls_pooler.conv_offset.out_channels == 2 * (CLASSES + 1) * 9
    assert heads.bbox_pooler.conv_offset.out_channels == 2 * 9
    assert heads.cls_pooler.gamma == heads.bbox_pooler.gamma == 0.2
    assert not any(p.any() for pooler in (heads.cls_pooler, heads.bbox_pooler) for p in pooler.conv_offset.parameters())


def hand_made(losses_of_images, foreground_every=4):
    """Predictions for RoIs of known cross-entropy, every fourth of which is foreground, some with a box far off."""
    logits, deltas, proposals, hardness = [], [], [], []
    for losses in losses_of_images:
        count = len(losses)
        classes = torch.full((count,), CLASSES)
        classes[::foreground_every] = 1
        # p of the right class is exp(-loss); the rest is shared evenly
        p = torch.tensor([math.exp(-loss) for loss in losses], dtype=torch.float64)
        scores = (1 - p)[:, None].expand(-1, CLASSES + 1) / CLASSES
        scores = scores.scatter(1, classes[:, None], p[:, None])
        boxes = torch.tensor([[0.0, 0, 40, 40]]).expand(count, -1)
        delta = torch.zeros(count, 4)
        delta[::8, 0] = 3.0  # smooth L1 beyond 1: 3 - 0.5
        logits.append(scores.log().float())
        deltas.append(delta)
        proposals.append(
            Instances((64, 64), proposal_boxes=Boxes(boxes.clone()), gt_boxes=Boxes(boxes.clone()), gt_classes=classes)
        )
        hardness.append([loss + (2.5 if i % 8 == 0 else 0) for i, loss in enumerate(losses)])
    return (torch.cat(logits), torch.cat(deltas)), proposals, hardness


def test_ohem_keeps_exactly_the_128_hardest():
    heads = make_heads(**{"RFCN.OHEM": True, "ROI_HEADS.BATCH_SIZE_PER_IMAGE": 128})
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2)).tolist()
    images = [[0.01 + 0.0101 * i for i in order], [0.02 + 0.013 * i for i in reversed(order[:200])]]
    predictions, proposals, hardness = hand_made(images)
    actual = heads.box_predictor.hardness(predictions, proposals)
    assert_near(actual, torch.tensor(sum(hardness, [])), 1e-5)
    (logits, deltas), kept = heads._hardest(predictions, proposals)
    assert [len(p) for p in kept] == [128, 128] and len(logits) == len(deltas) == 256
    start = 0
    for i, (all_of_image, of_image) in enumerate(zip(hardness, kept, strict=True)):
        best = sorted(range(len(all_of_image)), key=lambda j: -all_of_image[j])[:128]
        assert torch.equal(logits[i * 128 : (i + 1) * 128], predictions[0][[start + j for j in best]])
        assert torch.equal(of_image.gt_classes, proposals[i].gt_classes[best])
        start += len(all_of_image)


def test_ohem_averages_classes_over_the_kept_and_boxes_over_128():
    """Of 40 RoIs all are kept; boxes still count as parts of 128."""
    heads = make_heads(**{"RFCN.OHEM": True, "ROI_HEADS.BATCH_SIZE_PER_IMAGE": 128})
    losses = [0.1 + 0.01 * i for i in range(40)]
    predictions, proposals, _ = hand_made([losses])
    heads.label_and_sample_proposals = lambda proposals, targets: proposals
    heads.vote = lambda features, boxes: torch.cat(predictions, dim=1)[:, :, None, None]
    with EventStorage():
        _, result = heads.train()(None, {}, proposals, [None])
    assert result["loss_cls"].item() == pytest.approx(sum(losses) / 40, rel=1e-5)
    assert result["loss_box_reg"].item() == pytest.approx(5 * 2.5 / 128, rel=1e-5)  # RoIs 0, 8, ..., 32


@pytest.mark.parametrize("ohem", [True, False])
def test_which_proposals_are_labelled(ohem):
    """OHEM labels all, with foreground from an IoU of 0.5 on; without it, so many random ones."""
    heads = make_heads(**{"RFCN.OHEM": ohem, "ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16})
    target = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[0.0, 0, 40, 40]])), gt_classes=torch.tensor([2]))
    heights = torch.arange(1.0, 61)
    boxes = torch.stack([torch.zeros(60), torch.zeros(60), torch.full((60,), 40.0), heights], dim=1)
    proposals = Instances((64, 64), proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(60))
    with EventStorage():
        (labelled,) = heads.label_and_sample_proposals([proposals], [target])
        (alone,) = heads.label_and_sample_proposals([proposals], [target[:0]])
    assert len(labelled) == (61 if ohem else 16)
    near = (labelled.proposal_boxes.tensor[:, 3] >= 20) & (labelled.proposal_boxes.tensor[:, 3] <= 80)
    assert torch.equal(labelled.gt_classes, torch.where(near, 2, CLASSES))
    assert len(alone) == (60 if ohem else 16) and (alone.gt_classes == CLASSES).all()


@pytest.mark.parametrize("ohem", [True, False])
@pytest.mark.parametrize("boxes", [[], [(20.0, 10, 90, 70)]], ids=["no objects", "an object"])
def test_every_parameter_takes_part(ohem, boxes):
    """Distributed training needs it, also for images without objects."""
    model = make_model(**{"RFCN.OHEM": ohem})
    disturb(model, 0.05)
    with EventStorage(), torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(make_inputs(boxes))
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()] == []
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "res2"}


def test_no_proposals():
    heads = make_heads().eval()
    empty = Instances((64, 64), proposal_boxes=Boxes(torch.zeros(0, 4)), objectness_logits=torch.zeros(0))
    with torch.no_grad():
        (found,), losses = heads(None, {"res5": torch.randn(1, 5, 4, 4)}, [empty])
    assert len(found) == 0 and losses == {}


def test_roi_node_sees_the_votes():
    model = make_model().eval()
    disturb(model)
    response = RoINode(20, 10, 90, 70).respond(model, torch.rand(1, 3, 91, 125) * 255)
    assert response.shape == (1, (CLASSES + 1 + 4) * 9)


def test_given_boxes_come_back():
    model = make_model().eval()
    given = Instances((91, 125), pred_boxes=Boxes(torch.tensor([[1.0, 2, 30, 40]])), pred_classes=torch.tensor([1]))
    with torch.no_grad():
        (out,) = model.inference(make_inputs(), [given], do_postprocess=False)
    assert torch.equal(out.pred_boxes.tensor, given.pred_boxes.tensor)


def test_export_is_refused():
    with pytest.raises(ValueError, match="StandardROIHeads, got .*RFCNROIHeads"):
        Detector(make_model())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2"}, "POOLER_TYPE must be PSRoIPool or DeformPSRoIPool .* ROIAlignV2"),
        ({"ROI_HEADS.IN_FEATURES": ["res4", "res5"]}, "IN_FEATURES must be one map .*res4"),
        ({"ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": False}, "CLS_AGNOSTIC_BBOX_REG must be True .* got False"),
        ({"ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": True}, "TRAIN_ON_PRED_BOXES must be False"),
        ({"MASK_ON": True}, "MASK_ON must be False"),
        ({"KEYPOINT_ON": True}, "KEYPOINT_ON must be False"),
        ({"RFCN.OHEM": True, "ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "giou"}, "BBOX_REG_LOSS_TYPE must be smooth_l1 .*giou"),
        ({"ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 0}, "sampling_ratio must be above 0, got 0"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        make_heads(**changes)
