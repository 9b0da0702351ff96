"""The class-aware RPN: its losses from their definition, its selection of boxes, and what it trains."""

import pytest
import torch
import torch.nn.functional as F
from dcnv2_d2 import add_dcnv2_config
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

CLASSES = 3


def make_model(**changes):
    cfg = get_cfg()
    add_dcnv2_config(cfg)
    small = {
        "DEVICE": "cpu",
        "META_ARCHITECTURE": "ClassAwareRPN",
        "BACKBONE.NAME": "build_dcnv2_resnet_backbone",
        "RESNETS.STEM_OUT_CHANNELS": 8,
        "RESNETS.RES2_OUT_CHANNELS": 16,
        "RESNETS.WIDTH_PER_GROUP": 4,
        "RESNETS.RES5_DILATION": 2,
        "RESNETS.OUT_FEATURES": ["res5"],
        "RPN.IN_FEATURES": ["res5"],
        "ROI_HEADS.NUM_CLASSES": CLASSES,
        "RFCN.CONV_DIM": 12,
        "ANCHOR_GENERATOR.SIZES": [[32, 64]],
    }
    cfg.merge_from_list([x for key, value in {**small, **changes}.items() for x in (f"MODEL.{key}", value)])
    torch.manual_seed(0)
    return build_model(cfg)


def make_target(boxes=((20.0, 10, 90, 70), (5, 40, 40, 88)), classes=(2, 0)):
    boxes, classes = torch.tensor(boxes).reshape(-1, 4), torch.tensor(classes, dtype=torch.long)
    return Instances((91, 125), gt_boxes=Boxes(boxes), gt_classes=classes)


def make_inputs(target=None):
    image = torch.randint(0, 256, (3, 91, 125), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [{"image": image, "instances": make_target() if target is None else target, "height": 91, "width": 125}]


def test_losses_equal_the_definition():
    """All anchors are sampled, so that nothing is random: sums over them, divided by the size of the sample."""
    weights = {"RPN.LOSS_WEIGHT": 0.5, "RPN.BBOX_REG_LOSS_WEIGHT": 3.0}
    model = make_model(**{"RPN.BATCH_SIZE_PER_IMAGE": 10000, "RPN.SMOOTH_L1_BETA": 1 / 9}, **weights)
    anchors = model.anchor_generator([torch.zeros(2, 1, 6, 8)])
    count = len(anchors[0])
    logits, deltas = torch.randn(2, count, CLASSES + 1), 0.3 * torch.randn(2, count, 4)
    targets = [make_target(), make_target(((60.0, 20, 120, 80),), (1,))]
    labels, boxes = model.label_anchors(anchors, targets)
    with EventStorage():
        losses = model.losses(anchors, [logits], labels, [deltas], boxes)
    cls = box = positives = 0
    for i in range(2):
        for j in range(count):
            label = int(labels[i][j])
            if label == -1:
                continue
            cls -= logits[i, j].log_softmax(0)[label].item()
            if label == CLASSES:
                continue
            positives += 1
            wanted = model.box2box_transform.get_deltas(anchors[0].tensor[j : j + 1], boxes[i][j : j + 1])[0]
            for difference in (deltas[i, j] - wanted).abs().tolist():
                box += 4.5 * difference**2 if difference < 1 / 9 else difference - 1 / 18
    assert positives > 3 and any((of_image == -1).any() for of_image in labels)
    assert losses["loss_cls"].item() == pytest.approx(0.5 * cls / 20000, rel=1e-5)
    assert losses["loss_box_reg"].item() == pytest.approx(1.5 * box / 20000, rel=1e-5)


def test_so_many_anchors_of_each_image_are_trained_on():
    model = make_model(**{"RPN.BATCH_SIZE_PER_IMAGE": 20, "RPN.POSITIVE_FRACTION": 0.1})
    anchors = model.anchor_generator([torch.zeros(2, 1, 6, 8)])
    logits = torch.zeros(2, len(anchors[0]), CLASSES + 1, requires_grad=True)
    labels, boxes = model.label_anchors(anchors, [make_target(), make_target()[:0]])
    with EventStorage():
        model.losses(anchors, [logits], labels, [torch.zeros(2, len(anchors[0]), 4)], boxes)["loss_cls"].backward()
    used = logits.grad.abs().sum(2) > 0
    assert used.sum(1).tolist() == [20, 20]
    foreground = torch.stack(labels) < CLASSES
    assert (used & foreground & (torch.stack(labels) >= 0)).sum(1).tolist() == [2, 0]


def test_inference_decodes_anchors_and_suppresses_by_class():
    model = make_model(**{"ROI_HEADS.NMS_THRESH_TEST": 0.3, "ROI_HEADS.SCORE_THRESH_TEST": 0.2}).eval()
    images = ImageList(torch.zeros(1, 3, 91, 125), [(91, 125)])
    features = [torch.zeros(1, 1, 6, 8)]
    anchors = model.anchor_generator(features)[0].tensor.view(6, 8, -1, 4)
    per_cell = anchors.shape[2]
    logits = torch.full((1, per_cell, CLASSES + 1, 6, 8), -10.0)
    logits[:, :, CLASSES] = 0  # background
    deltas = torch.zeros(1, per_cell, 4, 6, 8)
    logits[0, 0, 1, 2, 3] = 5.0  # the best of class 1
    logits[0, 0, 1, 2, 4] = 4.0  # overlaps it: suppressed
    logits[0, 0, 2, 2, 4] = 4.5  # of another class: kept
    logits[0, 1, 0, 5, 7] = -1.4  # below the threshold: p = 0.198
    deltas[0, 0, 0, 2, 3] = 0.5  # moves by half its width
    (found,) = model.forward_inference(images, features, ([logits.flatten(1, 2)], [deltas.flatten(1, 2)]))
    assert found.pred_classes.tolist() == [1, 2]
    width = anchors[2, 3, 0, 2] - anchors[2, 3, 0, 0]
    moved = anchors[2, 3, 0] + torch.tensor([0.5, 0, 0.5, 0]) * width
    assert torch.allclose(found.pred_boxes.tensor, torch.stack([moved, anchors[2, 4, 0]]), atol=1e-4)
    expected = [F.softmax(torch.tensor([-10.0, 5, -10, 0]), 0)[1], F.softmax(torch.tensor([-10.0, 4, 4.5, 0]), 0)[2]]
    assert torch.allclose(found.scores, torch.stack(expected))


@pytest.mark.parametrize("target", [make_target(), make_target()[:0]], ids=["objects", "none"])
def test_every_parameter_takes_part(target):
    model = make_model(**{"DCNV2.DEFORM_LAST": 2})
    with EventStorage(), torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(make_inputs(target))
    assert losses.keys() == {"loss_cls", "loss_box_reg"}
    sum(losses.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()] == []
