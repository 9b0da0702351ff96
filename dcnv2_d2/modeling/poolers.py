"""Poolers: Detectron2's ROIPooler with deformable pooling at each level."""

from typing import Any

from detectron2.modeling.poolers import ROIPooler
from torch import nn

from ..layers import DeformRoIPool, ModulatedDeformRoIPool

# POOLER_TYPE -> layer
LAYERS = {"DeformRoIPool": DeformRoIPool, "ModulatedDeformRoIPool": ModulatedDeformRoIPool}


def deform_pooler(
    pooler: ROIPooler,
    layer: type[DeformRoIPool],
    in_channels: int,
    *,
    shared: bool = False,
    branch_from: ROIPooler | None = None,
    **kwargs: Any,
) -> None:
    """Makes a pooler of Detectron2's deformable, in place; its level assignment, sizes and scales stay.

    Args:
        pooler: of the type ROIAlignV2.
        layer: DeformRoIPool or ModulatedDeformRoIPool.
        in_channels: channels of every map.
        shared: whether one branch serves all levels, instead of one for each.
        branch_from: a deformable pooler of as many levels, whose branches are used instead of own ones.
        kwargs: the layer's own arguments: gamma, hidden_dims, mask_scale.
    """
    levels: list[DeformRoIPool] = []
    for i, align in enumerate(pooler.level_poolers):
        owner = levels[0] if shared and levels else None
        if branch_from is not None:
            owner = branch_from.level_poolers[i]
        like = (align.output_size, align.spatial_scale, align.sampling_ratio)
        levels.append(layer(in_channels, *like, branch_from=owner, **kwargs))
    pooler.level_poolers = nn.ModuleList(levels)
