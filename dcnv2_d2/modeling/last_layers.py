"""The last layers of a backbone, how many are deformable, and their dilation (Tables 1 and 3 of v1)."""

from typing import Any

from detectron2.config import CfgNode
from torch import nn

from ..layers import DeformConv2d, replace_convs

DILATED = 3  # layers whose dilation Table 3 varies


def dilate_last(resnet: nn.Module, cfg: CfgNode) -> None:
    """Gives the last three convolutions larger than 1x1 of a Detectron2 ResNet another dilation, in place.

    Reads MODEL.DCNV2.LAST_DILATION; 0 changes nothing.

    Raises:
        ValueError: it is negative, or they have a stride or are frozen by MODEL.BACKBONE.FREEZE_AT.
    """
    dilation = cfg.MODEL.DCNV2.LAST_DILATION
    if not dilation:
        return
    for name in _last(resnet, "LAST_DILATION", dilation, DILATED, cfg):
        conv: Any = resnet.get_submodule(name)
        if conv.stride != (1, 1):
            raise ValueError(
                f"MODEL.DCNV2.LAST_DILATION changes {name}, which must have a stride of 1 "
                f"(MODEL.RESNETS.RES5_DILATION 2 makes it so), got {conv.stride}"
            )
        conv.dilation = (dilation, dilation)
        conv.padding = tuple(dilation * (size // 2) for size in conv.kernel_size)


def deform_last(resnet: nn.Module, cfg: CfgNode) -> None:
    """Makes the last convolutions larger than 1x1 of a Detectron2 ResNet deformable, in place.

    Reads MODEL.DCNV2.DEFORM_LAST, their number, and as deform_stages MODEL.RESNETS.DEFORM_MODULATED, DEFORM_NUM_GROUPS
    and MASK_SCALE. OFFSET_DILATION counts for all deformable layers: False takes it from what predicts offsets.

    Raises:
        ValueError: DEFORM_LAST is negative, or asks for more layers than there are, for layers that
            MODEL.BACKBONE.FREEZE_AT freezes, or beside DEFORM_ON_PER_STAGE.
    """
    dcnv2, resnets = cfg.MODEL.DCNV2, cfg.MODEL.RESNETS
    if dcnv2.DEFORM_LAST:
        if any(resnets.DEFORM_ON_PER_STAGE):
            raise ValueError(
                f"MODEL.DCNV2.DEFORM_LAST must be 0 beside MODEL.RESNETS.DEFORM_ON_PER_STAGE "
                f"{resnets.DEFORM_ON_PER_STAGE}, got {dcnv2.DEFORM_LAST}"
            )
        chosen = _last(resnet, "DEFORM_LAST", dcnv2.DEFORM_LAST, dcnv2.DEFORM_LAST, cfg)
        replace_convs(
            resnet,
            lambda name, conv: name in chosen,
            modulated=resnets.DEFORM_MODULATED,
            offset_groups=resnets.DEFORM_NUM_GROUPS,
            mask_scale=dcnv2.MASK_SCALE,
        )
    if not dcnv2.OFFSET_DILATION:
        for layer in resnet.modules():
            if isinstance(layer, DeformConv2d):
                layer.conv_offset.dilation = (1, 1)
                layer.conv_offset.padding = tuple(size // 2 for size in layer.kernel_size)


def _last(resnet: nn.Module, key: str, value: int, count: int, cfg: CfgNode) -> list[str]:
    """Names of the last `count` convolutions larger than 1x1 of the stages."""
    names = [
        name
        for name, m in resnet.named_modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) and name.startswith("res")
    ]
    if value < 0:
        raise ValueError(f"MODEL.DCNV2.{key} must not be negative, got {value}")
    if count > len(names):
        raise ValueError(f"MODEL.DCNV2.{key} = {value} changes {count} layers, but the backbone has {len(names)}")
    chosen = names[-count:]
    freeze_at, first = cfg.MODEL.BACKBONE.FREEZE_AT, int(chosen[0][len("res")])
    if first <= freeze_at:
        raise ValueError(
            f"MODEL.DCNV2.{key} = {value} reaches res{first}, which MODEL.BACKBONE.FREEZE_AT = {freeze_at} freezes; "
            f"expected FREEZE_AT of at most {first - 1}"
        )
    return chosen
