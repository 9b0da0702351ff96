"""A mask head for each stage of a cascade."""

from typing import Any, cast

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads import BaseMaskRCNNHead, MaskRCNNConvUpsampleHead
from torch import Tensor, nn
from torch.nn import functional as F


@ROI_MASK_HEAD_REGISTRY.register()
class AveragedMaskHeads(BaseMaskRCNNHead, nn.ModuleList):
    """Detectron2's mask head, as many times as a cascade has stages, whose masks are averaged.

    mmdetection's Cascade Mask R-CNN predicts so. It trains each head on the boxes of its stage; here all are trained
    together, on the proposals.
    """

    @configurable
    def __init__(self, *, heads: list[MaskRCNNConvUpsampleHead], **kwargs: Any):
        """
        Args:
            heads: whose `layers` make mask logits of features.
            kwargs: of BaseMaskRCNNHead.
        """
        super().__init__(**kwargs)
        self.extend(heads)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        heads = [MaskRCNNConvUpsampleHead(cfg, input_shape) for _ in cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS]
        return {"heads": heads, **super().from_config(cfg, input_shape)}

    def layers(self, x: Tensor) -> Tensor:
        masks = torch.stack([cast(MaskRCNNConvUpsampleHead, head).layers(x) for head in self])
        # The logit of the mean probability, without probabilities, which round to 0 and 1 in half types
        return F.logsigmoid(masks).logsumexp(0) - F.logsigmoid(-masks).logsumexp(0)
