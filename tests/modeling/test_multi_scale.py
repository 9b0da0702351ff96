"""Multi-scale testing with averaged boxes."""

import pytest
import torch
from dcnv2_d2.config import check_config
from dcnv2_d2.engine import Trainer
from dcnv2_d2.modeling.multi_scale import AveragingTTA, with_augmentation
from detectron2.modeling import build_model

from .test_rfcn import make_cfg, make_inputs, make_model


def make(average=0.5, **changes):
    cfg = make_cfg(**changes)
    cfg.TEST.AUG.ENABLED = True
    cfg.TEST.AUG.MIN_SIZES = (64, 91)
    cfg.TEST.AUG.FLIP = False
    cfg.TEST.AUG.AVERAGE_IOU = average
    return cfg


BOXES = torch.tensor(
    [[10.0, 10, 50, 50], [12, 10, 54, 50], [10, 10, 49, 51], [60, 60, 90, 90], [30, 10, 70, 50]]
)  # IoU with the first: 1, 0.83, 0.93, 0, 1/3
SCORES, CLASSES = torch.tensor([0.8, 0.5, 0.4, 0.3, 0.2]), torch.tensor([1, 1, 2, 1, 1])


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_boxes_of_a_class_that_overlap_are_averaged_by_score(average):
    tta = with_augmentation(make(average, **{"ROI_HEADS.NMS_THRESH_TEST": 0.5}), make_model())
    assert isinstance(tta, AveragingTTA)
    merged = tta._merge_detections(BOXES.clone(), list(SCORES), list(CLASSES), (91, 125))
    assert merged.scores.tolist() == pytest.approx([0.8, 0.4, 0.3, 0.2])
    first = (0.8 * BOXES[0] + 0.5 * BOXES[1]) / 1.3 if average else BOXES[0]
    assert torch.allclose(merged.pred_boxes.tensor, torch.stack([first, BOXES[2], BOXES[3], BOXES[4]]))


def test_boxes_beyond_the_image_are_averages_inside_of_it():
    tta = with_augmentation(make(0.9), make_model())
    boxes = torch.tensor([[-60.0, 10, 30, 50]])  # two thirds of it are outside
    merged = tta._merge_detections(boxes, list(SCORES[:1]), list(CLASSES[:1]), (91, 125))
    assert merged.pred_boxes.tensor.tolist() == [[0, 10, 30, 50]]


def test_all_scales_are_seen():
    cfg = make()
    model = build_model(cfg).eval()
    sizes = []
    model.backbone.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[-2:])))
    with torch.no_grad():
        (out,) = with_augmentation(cfg, model)([{**make_inputs()[0]}])
    assert len(sizes) == 1 and sizes[0] == (91, 125)  # both scales, padded into one batch
    assert out["instances"].image_size == (91, 125)


def test_trainer_tests_so(monkeypatch):
    seen = []
    monkeypatch.setattr("detectron2.engine.DefaultTrainer.test", lambda cfg, model, evaluators=None: seen.append(model))
    cfg, model = make(), make_model()
    Trainer.test(cfg, model)
    cfg.TEST.AUG.ENABLED = False
    Trainer.test(cfg, model)
    assert isinstance(seen[0], AveragingTTA) and seen[0].model is model and seen[1] is model


@pytest.mark.parametrize(
    "average, changes, message",
    [
        (1.5, {}, "AVERAGE_IOU must be from 0 to 1, got 1.5"),
        (
            0.5,
            {"META_ARCHITECTURE": "ClassAwareRPN"},
            "must be a GeneralizedRCNN for .*, got ClassAwareRPN",
        ),
    ],
)
def test_errors(average, changes, message):
    with pytest.raises(ValueError, match=message):
        check_config(make(average, **changes))
