"""Deformable convolutions in any model of Detectron2, by one config key: MODEL.DCNV2.CONVS."""

import logging
import re

from detectron2.config import CfgNode
from torch import nn

from .. import compat
from ..layers import replace_convs


def deform_convs(model: nn.Module, cfg: CfgNode) -> None:
    """Makes the convolutions that MODEL.DCNV2.CONVS chooses deformable, in place.

    detectron2.modeling.build_model does this with every model. Also reads MODEL.DCNV2.MASK_SCALE,
    MODEL.RESNETS.DEFORM_MODULATED and DEFORM_NUM_GROUPS.

    Raises:
        ValueError: one of CONVS is not a regular expression, or finds no convolution larger than 1x1, one that is
            frozen, or one that cannot be converted (see DeformConv2d.from_conv).
    """
    if "DCNV2" not in cfg.MODEL:
        return
    for pattern in cfg.MODEL.DCNV2.CONVS:
        try:
            names = replace_convs(
                model,
                pattern,
                modulated=cfg.MODEL.RESNETS.DEFORM_MODULATED,
                offset_groups=cfg.MODEL.RESNETS.DEFORM_NUM_GROUPS,
                mask_scale=cfg.MODEL.DCNV2.MASK_SCALE,
            )
        except (ValueError, re.error, TypeError) as error:
            raise ValueError(f"MODEL.DCNV2.CONVS, {pattern!r}: {error}") from error
        frozen = [name for name in names if not model.get_submodule(name).weight.requires_grad]
        if frozen:
            raise ValueError(
                f"MODEL.DCNV2.CONVS, {pattern!r}: convolutions must be trained to become deformable, but "
                f"{frozen[0]} is frozen (see MODEL.BACKBONE.FREEZE_AT), {len(frozen)} in all"
            )
        logging.getLogger(__name__).info("MODEL.DCNV2.CONVS, %r: %d deformable layers", pattern, len(names))


compat.finish_models(deform_convs)
