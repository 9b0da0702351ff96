"""Modules around the operators, and the call that mixes them into any model."""

from .convert import replace_convs
from .deform_conv import DeformConv2d, ModulatedDeformConv2d, dcn_state_dict
from .deform_ps_roi_pool import DeformPSRoIPool, PSRoIPool
from .deform_roi_pool import DeformRoIPool, ModulatedDeformRoIPool

__all__ = [
    "DeformConv2d",
    "DeformPSRoIPool",
    "DeformRoIPool",
    "ModulatedDeformConv2d",
    "ModulatedDeformRoIPool",
    "PSRoIPool",
    "dcn_state_dict",
    "replace_convs",
]
