"""Aligned-Inception-ResNet, the backbone of the appendix of Deformable ConvNets v1, out of Detectron2's blocks."""

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicStem
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor

from .backbone import ReducedC5, _deformable

BLOCKS = (3, 4, 23, 3)  # of res2 to res5


class AlignedInceptionBlock(CNNBlockBase):
    """A residual block with two branches of 3x3 convolutions, both of which are centred on their output.

    With p a quarter of the output channels: 1x1, 3x3 of p channels; beside it 1x1, 3x3, 3x3 of p / 2; both together,
    norm, ReLU, 1x1. The first 3x3 of each branch and the projection have the stride.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, dilation: int = 1, norm: str = "BN"
    ) -> None:
        """
        Args:
            out_channels: a multiple of 8.
            dilation: of the 3x3 convolutions.
            norm: as in Detectron2's blocks.

        Raises:
            ValueError: out_channels is no multiple of 8.
        """
        if out_channels % 8:
            raise ValueError(f"AlignedInceptionBlock: out_channels must be a multiple of 8, got {out_channels}")
        super().__init__(in_channels, out_channels, stride)
        width, half = out_channels // 4, out_channels // 8

        def conv(inputs, outputs, size, stride=1, *, norm=norm, activation=F.relu):
            layer = Conv2d(
                inputs,
                outputs,
                size,
                stride,
                padding=dilation * (size // 2),
                dilation=dilation if size > 1 else 1,
                bias=False,
                norm=get_norm(norm, outputs),
                activation=activation,
            )
            c2_msra_fill(layer)
            return layer

        bare = {"norm": "", "activation": None}  # the two branches share a norm
        self.branch1_conv1 = conv(in_channels, width, 1)
        self.branch1_conv2 = conv(width, width, 3, stride, **bare)
        self.branch2_conv1 = conv(in_channels, half, 1)
        self.branch2_conv2 = conv(half, half, 3, stride)
        self.branch2_conv3 = conv(half, half, 3, **bare)
        self.norm = get_norm(norm, width + half)
        self.conv = conv(width + half, out_channels, 1, activation=None)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = conv(in_channels, out_channels, 1, stride, activation=None)

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[N, in_channels, H, W] -> Tensor[N, out_channels, H / stride, W / stride]"""
        first = self.branch1_conv2(self.branch1_conv1(x))
        second = self.branch2_conv3(self.branch2_conv2(self.branch2_conv1(x)))
        out = torch.cat([first, second], dim=1)
        if self.norm is not None:
            out = self.norm(out)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return F.relu_(self.conv(F.relu_(out)) + shortcut)


def build_aligned_inception_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Reads of MODEL.RESNETS: STEM_OUT_CHANNELS, RES2_OUT_CHANNELS (doubled at every stage), NORM, OUT_FEATURES and
    RES5_DILATION, which with 2 leaves res5 at stride 16; and BACKBONE.FREEZE_AT.

    Raises:
        ValueError: RES5_DILATION is neither 1 nor 2.
    """
    resnets = cfg.MODEL.RESNETS
    if resnets.RES5_DILATION not in (1, 2):
        raise ValueError(f"MODEL.RESNETS.RES5_DILATION must be 1 or 2, got {resnets.RES5_DILATION}")
    stem = BasicStem(input_shape.channels, resnets.STEM_OUT_CHANNELS, resnets.NORM)
    stages, in_channels, out_channels = [], resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS
    for i, blocks in enumerate(BLOCKS):
        dilation = resnets.RES5_DILATION if i == 3 else 1
        stride = 1 if i == 0 or dilation == 2 else 2
        options = {"in_channels": in_channels, "out_channels": out_channels, "dilation": dilation}
        strides = [stride] + [1] * (blocks - 1)
        stages.append(
            ResNet.make_stage(AlignedInceptionBlock, blocks, stride_per_block=strides, norm=resnets.NORM, **options)
        )
        in_channels, out_channels = out_channels, 2 * out_channels
    return ResNet(stem, stages, out_features=resnets.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)


def build_aligned_inception_resnet_dc5_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ReducedC5:
    """The same with a reduced res5, as build_dcnv2_resnet_dc5_backbone has it; reads MODEL.DCNV2.DC5_CHANNELS."""
    return ReducedC5(build_aligned_inception_resnet_backbone(cfg, input_shape), cfg.MODEL.DCNV2.DC5_CHANNELS)


build_dcnv2_aligned_inception_resnet_backbone = BACKBONE_REGISTRY.register()(
    _deformable(build_aligned_inception_resnet_backbone)
)
build_dcnv2_aligned_inception_resnet_dc5_backbone = BACKBONE_REGISTRY.register()(
    _deformable(build_aligned_inception_resnet_dc5_backbone)
)
