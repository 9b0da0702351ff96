"""The head of DeepLab as in Deformable ConvNets v1 (section 4.1), for Detectron2's SemanticSegmentor."""

from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn


@SEM_SEG_HEADS_REGISTRY.register()
class DeepLabHead(nn.Module):
    """A 1x1 convolution with a ReLU (fc6), a 1x1 convolution to the classes (score), and bilinear upsampling.

    Upsampled logits are cut to the images, whose sides need be no multiples of the stride.
    """

    @configurable
    def __init__(
        self, *, in_feature: str, in_channels: int, stride: int, channels: int, num_classes: int,
        ignore_value: int = 255, loss_weight: float = 1.0,
    ) -> None:  # fmt: skip
        """
        Args:
            in_feature, in_channels, stride: the map.
            channels: of fc6; the paper's 1024.
            ignore_value: label of pixels that do not count.
        """
        super().__init__()
        self.in_feature = in_feature
        self.stride = stride
        self.ignore_value = ignore_value
        self.loss_weight = loss_weight
        self.fc6 = Conv2d(in_channels, channels, 1, activation=F.relu)
        self.score = nn.Conv2d(channels, num_classes, 1)
        for layer in (self.fc6, self.score):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.get_parameter("bias"))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """
        Raises:
            ValueError: MODEL.SEM_SEG_HEAD.IN_FEATURES is not one map, or COMMON_STRIDE not its stride.
        """
        head = cfg.MODEL.SEM_SEG_HEAD
        if len(head.IN_FEATURES) != 1:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES must be one map for MODEL.SEM_SEG_HEAD.NAME DeepLabHead, "
                f"got {head.IN_FEATURES}"
            )
        shape = input_shape[head.IN_FEATURES[0]]
        if shape.stride != head.COMMON_STRIDE:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE must be the stride of {head.IN_FEATURES[0]} ({shape.stride}) for "
                f"MODEL.SEM_SEG_HEAD.NAME DeepLabHead, got {head.COMMON_STRIDE}"
            )
        return {
            "in_feature": head.IN_FEATURES[0],
            "in_channels": shape.channels,
            "stride": shape.stride,
            "channels": head.CONVS_DIM,
            "num_classes": head.NUM_CLASSES,
            "ignore_value": head.IGNORE_VALUE,
            "loss_weight": head.LOSS_WEIGHT,
        }

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """
        Args:
            features: has in_feature, Tensor[N, C, h, w].
            targets (Tensor[N, H, W]): labels, in training; H and W are at most h and w times the stride.

        Returns:
            In training None and the loss, otherwise the logits Tensor[N, classes, h * stride, w * stride] and no loss.
        """
        logits = self.score(self.fc6(features[self.in_feature])).float()
        logits = F.interpolate(logits, scale_factor=self.stride, mode="bilinear", align_corners=False)
        if not self.training or targets is None:
            return logits, {}
        logits = logits[:, :, : targets.shape[1], : targets.shape[2]]
        loss = F.cross_entropy(logits, targets, ignore_index=self.ignore_value, reduction="sum")
        count = (targets != self.ignore_value).sum().clamp(min=1)  # a crop may have no labels at all
        return None, {"loss_sem_seg": loss / count * self.loss_weight}
