"""R-FCN: RoI heads that vote by position-sensitive pooling, plain or deformable (Deformable ConvNets v1)."""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, ROIHeads
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from ..layers import DeformPSRoIPool, PSRoIPool

POOLER_TYPES = ("PSRoIPool", "DeformPSRoIPool")


class VotingOutputLayers(FastRCNNOutputLayers):
    """Detectron2's losses and inference on the mean votes of an RoI's bins, in place of fully connected layers."""

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        """Takes the arguments of FastRCNNOutputLayers but input_shape."""
        super().__init__(ShapeSpec(channels=1), **kwargs)
        del self.cls_score, self.bbox_pred

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        options = super().from_config(cfg, None)
        del options["input_shape"]
        return options

    def forward(self, votes: Tensor) -> tuple[Tensor, Tensor]:
        """Tensor[R, C + 1 + 4, bins, bins] -> logits Tensor[R, C + 1] and deltas Tensor[R, 4], in float32"""
        scores = votes.float().mean((2, 3))
        return scores[:, : self.num_classes + 1], scores[:, self.num_classes + 1 :]

    def hardness(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> Tensor:
        """Tensor[R]: the losses of each RoI, cross-entropy and smooth L1 of its box, weighted, without a gradient.

        Args:
            predictions, proposals: see FastRCNNOutputLayers.losses.
        """
        scores, deltas = (p.detach() for p in predictions)
        classes = torch.cat([p.gt_classes for p in proposals])
        loss = F.cross_entropy(scores, classes, reduction="none") * self.loss_weight.get("loss_cls", 1.0)
        foreground = (classes < self.num_classes).nonzero()[:, 0]
        if len(foreground):
            own, truth = (
                torch.cat([getattr(p, name if p.has(name) else "proposal_boxes").tensor for p in proposals])[foreground]
                for name in ("proposal_boxes", "gt_boxes")
            )
            targets = self.box2box_transform.get_deltas(own, truth)
            by_box = F.smooth_l1_loss(deltas[foreground], targets, beta=self.smooth_l1_beta, reduction="none").sum(1)
            loss[foreground] += by_box * self.loss_weight.get("loss_box_reg", 1.0)
        return loss


@ROI_HEADS_REGISTRY.register()
class RFCNROIHeads(ROIHeads):
    """The RoI heads of R-FCN: 1x1 convolutions on one map, and position-sensitive pooling of what they say.

    Boxes are class-agnostic. Deformable pooling has offsets of their own for each class and for the background, and one
    pair for the boxes. Online hard example mining (OHEM), an option, labels all proposals and trains on those with the
    greatest losses.
    """

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        conv_new_1: nn.Module,
        cls_pooler: nn.Module,
        bbox_pooler: nn.Module,
        box_predictor: VotingOutputLayers,
        ohem: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            in_feature: name of the map.
            conv_new_1: from the map to the features of the poolers.
            cls_pooler, bbox_pooler: PSRoIPool or DeformPSRoIPool with C + 1 and 4 channels.
            box_predictor: takes the pooled channels of both.
            ohem: whether batch_size_per_image counts the hardest of all proposals instead of random ones.
            kwargs: of ROIHeads.

        Raises:
            ValueError: OHEM with a loss of boxes other than smooth L1.
        """
        super().__init__(**kwargs)
        if ohem and box_predictor.box_reg_loss_type != "smooth_l1":
            raise ValueError(
                "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE must be smooth_l1 for MODEL.RFCN.OHEM, "
                f"got {box_predictor.box_reg_loss_type}"
            )
        self.in_feature = in_feature
        self.conv_new_1 = conv_new_1
        self.cls_pooler = cls_pooler
        self.bbox_pooler = bbox_pooler
        self.box_predictor = box_predictor
        self.ohem = ohem

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """
        Raises:
            ValueError: POOLER_TYPE is none of POOLER_TYPES, there are several maps, boxes by class, masks or keypoints.
        """
        model, head, names = cfg.MODEL, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_HEADS.IN_FEATURES
        for key, value, good, expected in (
            ("ROI_BOX_HEAD.POOLER_TYPE", head.POOLER_TYPE, head.POOLER_TYPE in POOLER_TYPES, " or ".join(POOLER_TYPES)),
            ("ROI_HEADS.IN_FEATURES", names, len(names) == 1, "one map"),
            ("ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", head.CLS_AGNOSTIC_BBOX_REG, head.CLS_AGNOSTIC_BBOX_REG, "True"),
            ("ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", head.TRAIN_ON_PRED_BOXES, not head.TRAIN_ON_PRED_BOXES, "False"),
            ("MASK_ON", model.MASK_ON, not model.MASK_ON, "False"),
            ("KEYPOINT_ON", model.KEYPOINT_ON, not model.KEYPOINT_ON, "False"),
        ):
            if not good:
                raise ValueError(f"MODEL.{key} must be {expected} for MODEL.ROI_HEADS.NAME RFCNROIHeads, got {value}")
        shape, channels = input_shape[names[0]], model.RFCN.CONV_DIM
        conv_new_1 = Conv2d(shape.channels, channels, 1, activation=F.relu)
        nn.init.normal_(conv_new_1.weight, std=0.01)
        nn.init.zeros_(conv_new_1.bias)
        options = (head.POOLER_RESOLUTION, 1 / shape.stride, head.POOLER_SAMPLING_RATIO)
        classes = model.ROI_HEADS.NUM_CLASSES + 1
        poolers = {}
        for name, outputs, groups in (("cls_pooler", classes, classes), ("bbox_pooler", 4, 1)):
            if head.POOLER_TYPE == "PSRoIPool":
                poolers[name] = PSRoIPool(channels, outputs, *options)
            else:
                pooler = DeformPSRoIPool(channels, outputs, *options, gamma=model.DCNV2.POOL_GAMMA, classes=groups)
                pooler.name = name
                poolers[name] = pooler
        return {
            **super().from_config(cfg),
            **poolers,
            "in_feature": names[0],
            "conv_new_1": conv_new_1,
            "box_predictor": VotingOutputLayers(cfg),
            "ohem": model.RFCN.OHEM,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """See ROIHeads.forward."""
        if self.training:
            proposals = self.label_and_sample_proposals(proposals, targets)
        votes = self.vote(features, [p.proposal_boxes.tensor for p in proposals])
        predictions = self.box_predictor(votes)
        if not self.training:
            return self.box_predictor.inference(predictions, proposals)[0], {}
        if not self.ohem:
            return proposals, self.box_predictor.losses(predictions, proposals)
        predictions, proposals = self._hardest(predictions, proposals)
        losses = self.box_predictor.losses(predictions, proposals)
        # Boxes count by the size of a full batch, of which there may be less.
        losses["loss_box_reg"] *= len(predictions[0]) / (self.batch_size_per_image * len(proposals))
        return proposals, losses

    def vote(self, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """What the bins of RoIs (Tensor[L, 4] of each image) say: Tensor[R, C + 1 + 4, bins, bins]"""
        x = self.conv_new_1(features[self.in_feature])
        return torch.cat([self.cls_pooler(x, boxes), self.bbox_pooler(x, boxes)], dim=1)

    def forward_with_given_boxes(self, features: dict[str, Tensor], instances: list[Instances]) -> list[Instances]:
        """There is nothing to add to given boxes, neither masks nor keypoints."""
        return instances

    def _sample_proposals(self, matched_idxs, matched_labels, gt_classes):
        if not self.ohem:
            return super()._sample_proposals(matched_idxs, matched_labels, gt_classes)
        classes = torch.full_like(matched_idxs, self.num_classes)
        if len(gt_classes):
            classes = torch.where(matched_labels == 1, gt_classes[matched_idxs], classes)
        kept = (matched_labels != -1).nonzero()[:, 0]
        return kept, classes[kept]

    def _hardest(self, predictions, proposals):
        """The predictions and proposals with the greatest losses, batch_size_per_image of each image."""
        counts = [len(p) for p in proposals]
        losses = self.box_predictor.hardness(predictions, proposals)
        kept = [
            loss.argsort(descending=True, stable=True)[: self.batch_size_per_image] for loss in losses.split(counts)
        ]
        rows = torch.arange(len(losses), device=losses.device).split(counts)
        rows = torch.cat([of_image[k] for of_image, k in zip(rows, kept, strict=True)])
        return tuple(p[rows] for p in predictions), [p[k] for p, k in zip(proposals, kept, strict=True)]
