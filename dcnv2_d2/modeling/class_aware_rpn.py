"""The class-aware RPN of Deformable ConvNets v1 (section 4.1): a region proposal network with classes, a detector."""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_anchor_generator, build_backbone
from detectron2.modeling.box_regression import Box2BoxTransform, _dense_box_regression_loss
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn


class ClassAwareRPNHead(nn.Module):
    """A 1x1 convolution with a ReLU, and 1x1 convolutions that predict C + 1 logits and a box for each anchor."""

    def __init__(self, in_channels: int, channels: int, num_anchors: int, num_classes: int) -> None:
        super().__init__()
        self.conv_new_1 = Conv2d(in_channels, channels, 1, activation=F.relu)
        self.cls_logits = nn.Conv2d(channels, num_anchors * (num_classes + 1), 1)
        self.anchor_deltas = nn.Conv2d(channels, num_anchors * 4, 1)
        for layer in self.children():
            nn.init.normal_(layer.get_parameter("weight"), std=0.01)
            nn.init.zeros_(layer.get_parameter("bias"))

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Tensor[N, C_in, H, W] of each -> logits Tensor[N, A * (C + 1), H, W], deltas Tensor[N, A * 4, H, W]"""
        hidden = [self.conv_new_1(x) for x in features]
        return [self.cls_logits(x) for x in hidden], [self.anchor_deltas(x) for x in hidden]


@META_ARCH_REGISTRY.register()
class ClassAwareRPN(RetinaNet):
    """Detectron2's dense detector (its data flow, labels of anchors and selection of boxes) with the losses of an RPN.

    Sampled anchors, a softmax over C + 1 classes, and class-agnostic boxes; at inference, NMS by class.
    """

    @configurable
    def __init__(
        self, *, batch_size_per_image: int, positive_fraction: float, loss_weight: dict[str, float], **kwargs: Any
    ) -> None:
        """
        Args:
            batch_size_per_image, positive_fraction: of anchors that are trained on, as in Detectron2's RPN.
            loss_weight: of `loss_cls` and `loss_box_reg`.
            kwargs: of RetinaNet.
        """
        super().__init__(**kwargs)
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.loss_weight = loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Reads MODEL.RPN for anchors and boxes, MODEL.ROI_HEADS for classes and detections, MODEL.RFCN.CONV_DIM."""
        backbone, rpn, heads = build_backbone(cfg), cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS
        shapes: list[ShapeSpec] = [backbone.output_shape()[name] for name in rpn.IN_FEATURES]
        anchor_generator = build_anchor_generator(cfg, shapes)
        return {
            "backbone": backbone,
            "head": ClassAwareRPNHead(
                shapes[0].channels, cfg.MODEL.RFCN.CONV_DIM, anchor_generator.num_anchors[0], heads.NUM_CLASSES
            ),
            "head_in_features": rpn.IN_FEATURES,
            "anchor_generator": anchor_generator,
            "box2box_transform": Box2BoxTransform(weights=rpn.BBOX_REG_WEIGHTS),
            "anchor_matcher": Matcher(rpn.IOU_THRESHOLDS, rpn.IOU_LABELS, allow_low_quality_matches=True),
            "num_classes": heads.NUM_CLASSES,
            "batch_size_per_image": rpn.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": rpn.POSITIVE_FRACTION,
            "loss_weight": {"loss_cls": rpn.LOSS_WEIGHT, "loss_box_reg": rpn.LOSS_WEIGHT * rpn.BBOX_REG_LOSS_WEIGHT},
            "smooth_l1_beta": rpn.SMOOTH_L1_BETA,
            "box_reg_loss_type": rpn.BBOX_REG_LOSS_TYPE,
            "test_score_thresh": heads.SCORE_THRESH_TEST,
            "test_topk_candidates": rpn.PRE_NMS_TOPK_TEST,
            "test_nms_thresh": heads.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "vis_period": cfg.VIS_PERIOD,
            "input_format": cfg.INPUT.FORMAT,
        }

    def forward_training(
        self, images: ImageList, features: list[Tensor], predictions: Any, gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        logits, deltas = self._transpose_dense_predictions(predictions, [self.num_classes + 1, 4])
        anchors = self.anchor_generator(features)
        labels, boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, logits, labels, deltas, boxes)

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """As RetinaNet.losses, but on a sample of anchors of each image, with losses summed and divided by its size."""
        labels = torch.full_like(torch.stack(gt_labels), -1)
        for sampled, of_image in zip(labels, gt_labels, strict=True):
            chosen = torch.cat(
                subsample_labels(of_image, self.batch_size_per_image, self.positive_fraction, self.num_classes)
            )
            sampled[chosen] = of_image[chosen]
        positive = (labels >= 0) & (labels < self.num_classes)
        get_event_storage().put_scalar("num_pos_anchors", positive.sum().item() / len(labels))
        size = self.batch_size_per_image * len(labels)
        loss_cls = F.cross_entropy(
            torch.cat(pred_logits, dim=1).float().flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="sum"
        )
        loss_box_reg = _dense_box_regression_loss(
            anchors,
            self.box2box_transform,
            pred_anchor_deltas,
            gt_boxes,
            positive,
            box_reg_loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        losses = {"loss_cls": loss_cls, "loss_box_reg": loss_box_reg}
        return {name: loss / size * self.loss_weight[name] for name, loss in losses.items()}

    def forward_inference(self, images: ImageList, features: list[Tensor], predictions: Any) -> list[Instances]:
        logits, deltas = self._transpose_dense_predictions(predictions, [self.num_classes + 1, 4])
        anchors = self.anchor_generator(features)
        results = []
        for i, size in enumerate(images.image_sizes):
            scores = [x[i].float().softmax(dim=1)[:, :-1] for x in logits]
            results.append(self.inference_single_image(anchors, scores, [x[i] for x in deltas], size))
        return results
