"""ROI heads of Detectron2 with deformable poolers, chosen by POOLER_TYPE, and with feature mimicking."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads

from .mimicking import Mimicking
from .poolers import LAYERS, deform_pooler


class DeformPoolers(StandardROIHeads):
    """To be mixed into ROI heads of Detectron2: POOLER_TYPE of the box and the mask head may be deformable.

    A deformable mask pooler uses the branch of the box pooler, as the paper's parameter counts say. Reads
    MODEL.DCNV2.DPOOL_FC_DIMS, MDPOOL_FC_DIMS, POOL_SHARED, POOL_GAMMA and MASK_SCALE.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """
        Raises:
            ValueError: a deformable POOLER_TYPE of the keypoint head, or one of the mask head that the box head lacks.
        """
        box, mask, keypoint = (
            getattr(cfg.MODEL, f"ROI_{head}_HEAD").POOLER_TYPE for head in ("BOX", "MASK", "KEYPOINT")
        )
        plain = cfg.clone()
        plain.defrost()
        if box in LAYERS:
            plain.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlignV2"
        if cfg.MODEL.MASK_ON and mask in LAYERS:
            if mask != box:
                raise ValueError(
                    f"MODEL.ROI_MASK_HEAD.POOLER_TYPE must be a plain type or, as it uses the branch of the box head's "
                    f"pooler, equal MODEL.ROI_BOX_HEAD.POOLER_TYPE ({box}), got {mask}"
                )
            plain.MODEL.ROI_MASK_HEAD.POOLER_TYPE = "ROIAlignV2"
        if cfg.MODEL.KEYPOINT_ON and keypoint in LAYERS:
            raise ValueError(f"MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE must be one of Detectron2's, got {keypoint}")
        heads = super().from_config(plain, input_shape)
        if box not in LAYERS:
            return heads

        dcnv2 = cfg.MODEL.DCNV2
        in_channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
        modulated = box == "ModulatedDeformRoIPool"
        options = {
            "gamma": dcnv2.POOL_GAMMA,
            "hidden_dims": dcnv2.MDPOOL_FC_DIMS if modulated else dcnv2.DPOOL_FC_DIMS,
            **({"mask_scale": dcnv2.MASK_SCALE} if modulated else {}),
        }
        deform_pooler(heads["box_pooler"], LAYERS[box], in_channels, shared=dcnv2.POOL_SHARED, **options)
        if cfg.MODEL.MASK_ON and mask in LAYERS:
            deform_pooler(heads["mask_pooler"], LAYERS[mask], in_channels, branch_from=heads["box_pooler"], **options)
        for name in ("box_pooler", "mask_pooler"):
            for level, layer in enumerate(getattr(heads.get(name), "level_poolers", ())):
                layer.name = f"{name}.{level}"
        return heads


@ROI_HEADS_REGISTRY.register()
class DCNv2ROIHeads(DeformPoolers):
    """Detectron2's StandardROIHeads; POOLER_TYPE may also be DeformRoIPool or ModulatedDeformRoIPool."""


@ROI_HEADS_REGISTRY.register()
class DCNv2CascadeROIHeads(DeformPoolers, CascadeROIHeads):
    """Detectron2's CascadeROIHeads; POOLER_TYPE may also be DeformRoIPool or ModulatedDeformRoIPool."""


@ROI_HEADS_REGISTRY.register()
class MimickingROIHeads(Mimicking, DCNv2ROIHeads):
    """DCNv2ROIHeads with R-CNN feature mimicking in training; for the meta architecture MimickingRCNN."""


@ROI_HEADS_REGISTRY.register()
class MimickingCascadeROIHeads(Mimicking, DCNv2CascadeROIHeads):
    """DCNv2CascadeROIHeads with R-CNN feature mimicking of the first stage; for the meta architecture MimickingRCNN."""
