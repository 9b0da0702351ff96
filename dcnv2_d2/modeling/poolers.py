"""Poolers: Detectron2's ROIPooler with deformable pooling at each level."""

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
    lender: ROIPooler | None = None,
    **kwargs,
) -> None:
    """Makes a pooler of Detectron2's deformable, in place; its level assignment, sizes and scales stay.

    Args:
        pooler: of the type ROIAlignV2.
        layer: DeformRoIPool or ModulatedDeformRoIPool.
        in_channels: channels of every map.
        shared: whether one branch serves all levels, instead of one for each.
        lender: a deformable pooler of as many levels, whose branches are used instead of own ones.
        kwargs: the layer's own arguments: gamma, hidden_dims, mask_scale.
    """
    levels = []
    for i, align in enumerate(pooler.level_poolers):
        lends = lender.level_poolers[i] if lender is not None else levels[0] if shared and levels else None
        levels.append(
            layer(in_channels, align.output_size, align.spatial_scale, align.sampling_ratio, lender=lends, **kwargs)
        )
    pooler.level_poolers = nn.ModuleList(levels)
