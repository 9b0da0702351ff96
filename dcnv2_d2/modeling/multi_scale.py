"""Multi-scale testing: Detectron2's, with the averaging of boxes of Deformable ConvNets v1's Table 5."""

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, GeneralizedRCNNWithTTA
from detectron2.structures import Boxes, pairwise_iou
from torch import nn


def check_augmentation(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: TEST.AUG.ENABLED for a model that is no GeneralizedRCNN, or AVERAGE_IOU is not from 0 to 1.
    """
    if not 0 <= cfg.TEST.AUG.AVERAGE_IOU <= 1:
        raise ValueError(f"TEST.AUG.AVERAGE_IOU must be from 0 to 1, got {cfg.TEST.AUG.AVERAGE_IOU}")
    kind = cfg.MODEL.META_ARCHITECTURE
    if cfg.TEST.AUG.ENABLED and not issubclass(META_ARCH_REGISTRY.get(kind), GeneralizedRCNN):
        raise ValueError(f"MODEL.META_ARCHITECTURE must be a GeneralizedRCNN for TEST.AUG.ENABLED, got {kind}")


def with_augmentation(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """The model as TEST.AUG wants it to be tested; the model itself if TEST.AUG.ENABLED is False."""
    return AveragingTTA(cfg, model) if cfg.TEST.AUG.ENABLED else model


class AveragingTTA(GeneralizedRCNNWithTTA):
    """Detectron2's test-time augmentation; each box that NMS keeps may become an average.

    With TEST.AUG.AVERAGE_IOU above 0 it is the mean, weighted by score, of all boxes of its class, of all scales, that
    overlap it by at least so much, itself included.
    """

    def _merge_detections(self, all_boxes, all_scores, all_classes, shape_hw):
        merged = super()._merge_detections(all_boxes, all_scores, all_classes, shape_hw)
        least = self.cfg.TEST.AUG.AVERAGE_IOU
        if least and len(merged):
            scores, classes = torch.stack(list(all_scores)), torch.stack(list(all_classes))
            boxes = Boxes(all_boxes.to(scores))
            boxes.clip(shape_hw)  # as the kept ones are
            near = pairwise_iou(merged.pred_boxes, boxes) >= least
            weights = scores * (near & (merged.pred_classes[:, None] == classes))
            merged.pred_boxes = Boxes(weights @ boxes.tensor / weights.sum(1, keepdim=True))
        return merged
