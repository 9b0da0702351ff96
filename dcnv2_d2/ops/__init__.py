"""The operators as functions of tensors; registered with PyTorch as torch.ops.dcnv2_d2.*."""

from .deform_conv import deform_conv2d

__all__ = ["deform_conv2d"]
