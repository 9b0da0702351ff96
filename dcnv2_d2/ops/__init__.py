"""The operators as functions of tensors; registered with PyTorch as torch.ops.dcnv2_d2.*."""

from . import _counting, _registrations  # noqa: F401
from .deform_conv import deform_conv2d
from .deform_ps_roi_pool import deform_ps_roi_pool
from .deform_roi_pool import deform_roi_pool

__all__ = ["deform_conv2d", "deform_ps_roi_pool", "deform_roi_pool"]
