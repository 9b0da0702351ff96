"""The meta architecture of R-CNN feature mimicking."""

from typing import Any

from detectron2.config import configurable
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN
from torch import Tensor, nn

from .mimicking import Mimicking, still_statistics


@META_ARCH_REGISTRY.register()
class MimickingRCNN(GeneralizedRCNN):
    """Detectron2's GeneralizedRCNN, whose ROI heads may run the backbone on crops of the image while training.

    The losses have `loss_mimic` and `loss_mimic_cls` among them. At inference it is GeneralizedRCNN, whose checkpoints
    it shares but for the heads' `mimicking.cls_score`.
    """

    @configurable
    def __init__(self, **kwargs: Any):
        """Takes the arguments of GeneralizedRCNN.

        Raises:
            ValueError: roi_heads are not made for mimicking, or the settings of mimicking do not suit the backbone.
        """
        super().__init__(**kwargs)
        if not isinstance(self.roi_heads, Mimicking):
            raise ValueError(
                "MODEL.ROI_HEADS.NAME must be MimickingROIHeads or MimickingCascadeROIHeads for "
                f"MODEL.META_ARCHITECTURE MimickingRCNN, got {type(self.roi_heads).__name__}"
            )
        mimicking = self.roi_heads.mimicking
        divisor = self.backbone.size_divisibility
        if divisor and mimicking.crop_size % divisor:
            raise ValueError(
                f"MODEL.MIMIC.CROP_SIZE must be a multiple of the backbone's size_divisibility ({divisor}), "
                f"got {mimicking.crop_size}"
            )
        if mimicking.chunk and any(isinstance(m, (nn.SyncBatchNorm, NaiveSyncBatchNorm)) for m in self.modules()):
            raise ValueError(
                "MODEL.MIMIC.CHUNK must be 0 with a synchronized batch norm, whose processes wait for each other in "
                f"every pass, got {mimicking.chunk}"
            )
        # The heads do not own the backbone: a callable is no submodule.
        self.roi_heads.crop_features = self._crop_features

    def _crop_features(self, crops: Tensor) -> dict[str, Tensor]:
        with still_statistics(self.backbone):
            return self.backbone(crops)
