"""Modules around the operators, and the call that mixes them into any model."""

from .convert import replace_convs
from .deform_conv import DeformConv2d, ModulatedDeformConv2d

__all__ = ["DeformConv2d", "ModulatedDeformConv2d", "replace_convs"]
