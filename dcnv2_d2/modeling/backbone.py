"""Backbones: Detectron2's builders make them, the chosen stages are then turned deformable."""

import functools
import logging

from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import ResNet, build_resnet_backbone
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone, build_retinanet_resnet_fpn_backbone
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem

from ..layers import replace_convs

STAGES = ("res2", "res3", "res4", "res5")  # conv2 to conv5 in the paper


def deform_stages(resnet, cfg) -> None:
    """Makes the 3x3 convolutions of the chosen stages of a Detectron2 ResNet deformable, in place.

    Reads MODEL.RESNETS.DEFORM_ON_PER_STAGE, DEFORM_MODULATED, DEFORM_NUM_GROUPS and MODEL.DCNV2.MASK_SCALE.

    Raises:
        ValueError: a chosen stage is frozen by MODEL.BACKBONE.FREEZE_AT, or is not part of the backbone.
    """
    resnets, freeze_at = cfg.MODEL.RESNETS, cfg.MODEL.BACKBONE.FREEZE_AT
    flags = resnets.DEFORM_ON_PER_STAGE
    if len(flags) != len(STAGES):
        raise ValueError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE must have {len(STAGES)} values, for {', '.join(STAGES)}, got {flags}"
        )
    for number, (stage, deform) in enumerate(zip(STAGES, flags, strict=True), start=2):
        if not deform:
            continue
        if number <= freeze_at:
            raise ValueError(
                f"MODEL.RESNETS.DEFORM_ON_PER_STAGE makes {stage} deformable, but MODEL.BACKBONE.FREEZE_AT = {freeze_at} "
                f"freezes it; expected FREEZE_AT of at most {number - 1}"
            )
        if not hasattr(resnet, stage):
            raise ValueError(
                f"MODEL.RESNETS.DEFORM_ON_PER_STAGE makes {stage} deformable, but MODEL.RESNETS.OUT_FEATURES = "
                f"{resnets.OUT_FEATURES} ends the backbone before it"
            )
        names = replace_convs(
            getattr(resnet, stage),
            lambda name, conv: True,
            modulated=resnets.DEFORM_MODULATED,
            offset_groups=resnets.DEFORM_NUM_GROUPS,
            mask_scale=cfg.MODEL.DCNV2.MASK_SCALE,
        )
        for name in names:
            layer = resnet.get_submodule(f"{stage}.{name}")
            layer.name = f"{stage}.{name}"
        logging.getLogger(__name__).info("%s: %d deformable layers", stage, len(names))


def _deformable(build):
    """A builder of Detectron2's, whose ResNet is then converted."""

    @functools.wraps(build)
    def build_deformable(cfg, input_shape):
        plain = cfg.clone()
        plain.defrost()
        plain.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * len(STAGES)  # Detectron2's own layers need its extension
        backbone = build(plain, input_shape)
        deform_stages(getattr(backbone, "bottom_up", backbone), cfg)
        return backbone

    build_deformable.__name__ = build.__name__.replace("build_", "build_dcnv2_", 1)
    return build_deformable


def build_small_resnet_backbone(cfg, input_shape):
    """A ResNet for images of 100 to 200 pixels, which Detectron2 has no config for: stride 4 at res2, 8 from res3 on.

    Basic blocks, one at res2 and two a stage after that. Reads MODEL.RESNETS.STEM_OUT_CHANNELS, RES2_OUT_CHANNELS (doubled
    at res3 and at res4), NORM and OUT_FEATURES.
    """
    resnets = cfg.MODEL.RESNETS
    norm, channels, width = resnets.NORM, resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS
    stem = BasicStem(input_shape.channels, channels, norm)
    stages = []
    for out_channels, strides in ((width, [1]), (2 * width, [2, 1]), (4 * width, [1, 1]), (4 * width, [1, 1])):
        stages.append(
            ResNet.make_stage(
                BasicBlock, len(strides), stride_per_block=strides, in_channels=channels, out_channels=out_channels, norm=norm
            )
        )
        channels = out_channels
    return ResNet(stem, stages, out_features=resnets.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)


build_dcnv2_small_resnet_backbone = BACKBONE_REGISTRY.register()(_deformable(build_small_resnet_backbone))
build_dcnv2_resnet_backbone = BACKBONE_REGISTRY.register()(_deformable(build_resnet_backbone))
build_dcnv2_resnet_fpn_backbone = BACKBONE_REGISTRY.register()(_deformable(build_resnet_fpn_backbone))
# Detectron2's name for it, build_retinanet_resnet_fpn_backbone, gets the same prefix.
build_dcnv2_retinanet_resnet_fpn_backbone = BACKBONE_REGISTRY.register()(
    _deformable(build_retinanet_resnet_fpn_backbone)
)
