"""Backbones: Detectron2 builds them, then the convolutions of the chosen stages are made deformable."""

import functools
import logging
from collections.abc import Callable

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ASPP, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone, ResNet, build_resnet_backbone
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone, build_retinanet_resnet_fpn_backbone
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn

from ..layers import replace_convs
from .last_layers import deform_last, dilate_last

# Those of Detectron2 that read MODEL.RESNETS.DEFORM_ON_PER_STAGE
DETECTRON2_BUILDERS = (build_resnet_backbone, build_resnet_fpn_backbone, build_retinanet_resnet_fpn_backbone)
STAGES = ("res2", "res3", "res4", "res5")  # conv2 to conv5 in the paper


def deform_stages(resnet: ResNet, cfg: CfgNode) -> None:
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
    if not any(flags) and not cfg.MODEL.DCNV2.CONVS:
        logging.getLogger(__name__).warning(
            "MODEL.BACKBONE.NAME is %s, but MODEL.RESNETS.DEFORM_ON_PER_STAGE chooses no stage: no layer of the "
            "backbone is deformable.",
            cfg.MODEL.BACKBONE.NAME,
        )
    for number, (stage, deform) in enumerate(zip(STAGES, flags, strict=True), start=2):
        if not deform:
            continue
        if number <= freeze_at:
            raise ValueError(
                f"MODEL.RESNETS.DEFORM_ON_PER_STAGE makes {stage} deformable, but MODEL.BACKBONE.FREEZE_AT = "
                f"{freeze_at} freezes it; expected FREEZE_AT of at most {number - 1}"
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


def _deformable(build: Callable[[CfgNode, ShapeSpec], Backbone]) -> Callable[[CfgNode, ShapeSpec], Backbone]:
    """A builder of Detectron2's, whose ResNet is then converted."""

    @functools.wraps(build)
    def build_deformable(cfg, input_shape):
        plain = cfg.clone()
        plain.defrost()
        plain.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * len(STAGES)  # Detectron2's own layers need its extension
        backbone = build(plain, input_shape)
        resnet = getattr(backbone, "bottom_up", backbone)
        dilate_last(resnet, cfg)
        deform_stages(resnet, cfg)
        deform_last(resnet, cfg)
        return backbone

    build_deformable.__name__ = build.__name__.replace("build_", "build_dcnv2_", 1)
    return build_deformable


class ReducedC5(Backbone):
    """A ResNet whose res5 is reduced, by a 1x1 convolution as in the paper's own detector, which uses no FPN."""

    size_divisibility = 0

    def __init__(self, bottom_up: ResNet, channels: int, reduce: nn.Module | None = None):
        """
        Args:
            bottom_up: has res5 among its outputs.
            channels: of the reduced res5; the paper's 256.
            reduce: another module than the 1x1 convolution, Tensor[N, C, H, W] -> Tensor[N, channels, H, W].
        """
        super().__init__()
        shapes = bottom_up.output_shape()
        self.bottom_up = bottom_up
        if reduce is None:
            reduce = nn.Conv2d(shapes["res5"].channels, channels, kernel_size=1)
            c2_xavier_fill(reduce)
        self.reduce = reduce
        self._out_features = list(shapes)
        self._out_feature_strides = {name: shape.stride for name, shape in shapes.items()}
        self._out_feature_channels = {name: shape.channels for name, shape in shapes.items()} | {"res5": channels}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Tensor[N, 3, H, W] -> the features of bottom_up by name, res5 reduced."""
        features = self.bottom_up(x)
        features["res5"] = self.reduce(features["res5"])
        return features


def build_resnet_dc5_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ReducedC5:
    """Reads MODEL.DCNV2.DC5_CHANNELS; RESNETS.RES5_DILATION 2 keeps res5 at stride 16, as in the paper."""
    return ReducedC5(build_resnet_backbone(cfg, input_shape), cfg.MODEL.DCNV2.DC5_CHANNELS)


def build_resnet_aspp_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ReducedC5:
    """DeepLab v3's: atrous spatial pyramid pooling reduces res5. For Detectron2's SemanticSegmentor.

    Reads MODEL.DCNV2.DC5_CHANNELS and MODEL.SEM_SEG_HEAD.NORM; the dilations are DeepLab v3's for stride 16, which
    RESNETS.RES5_DILATION 2 gives.
    """
    resnet, channels = build_resnet_backbone(cfg, input_shape), cfg.MODEL.DCNV2.DC5_CHANNELS
    options = {"norm": cfg.MODEL.SEM_SEG_HEAD.NORM, "activation": F.relu, "dropout": 0.1}
    aspp = ASPP(resnet.output_shape()["res5"].channels, channels, [6, 12, 18], **options)
    backbone = ReducedC5(resnet, channels, aspp)
    # Targets are padded as the images are, and compared with the upsampled predictions.
    backbone.size_divisibility = max(shape.stride for shape in resnet.output_shape().values())
    return backbone


def build_small_resnet_dc5_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ReducedC5:
    """A small ResNet with a reduced res5 for images of 100 to 200 pixels, for which Detectron2's are too coarse.

    Stride 4 at res2, 8 from res3 on; basic blocks, one at res2 and two a stage after that. Reads
    MODEL.RESNETS.STEM_OUT_CHANNELS, RES2_OUT_CHANNELS (doubled at res3 and at res4), NORM and OUT_FEATURES.
    """
    resnets = cfg.MODEL.RESNETS
    channels, width = resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS
    stem = BasicStem(input_shape.channels, channels, resnets.NORM)
    stages = []
    for out_channels, strides in ((width, [1]), (2 * width, [2, 1]), (4 * width, [1, 1]), (4 * width, [1, 1])):
        shape = {"stride_per_block": strides, "in_channels": channels, "out_channels": out_channels}
        stages.append(ResNet.make_stage(BasicBlock, len(strides), **shape, norm=resnets.NORM))
        channels = out_channels
    resnet = ResNet(stem, stages, out_features=resnets.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
    return ReducedC5(resnet, cfg.MODEL.DCNV2.DC5_CHANNELS)


build_dcnv2_resnet_backbone = BACKBONE_REGISTRY.register()(_deformable(build_resnet_backbone))
build_dcnv2_resnet_dc5_backbone = BACKBONE_REGISTRY.register()(_deformable(build_resnet_dc5_backbone))
build_dcnv2_resnet_aspp_backbone = BACKBONE_REGISTRY.register()(_deformable(build_resnet_aspp_backbone))
build_dcnv2_small_resnet_dc5_backbone = BACKBONE_REGISTRY.register()(_deformable(build_small_resnet_dc5_backbone))
build_dcnv2_resnet_fpn_backbone = BACKBONE_REGISTRY.register()(_deformable(build_resnet_fpn_backbone))
# Detectron2's name for it, build_retinanet_resnet_fpn_backbone, gets the same prefix.
build_dcnv2_retinanet_resnet_fpn_backbone = BACKBONE_REGISTRY.register()(
    _deformable(build_retinanet_resnet_fpn_backbone)
)
