"""What Detectron2's registries hold; importing it registers everything."""

from . import (  # noqa: F401
    aligned_inception,
    backbone,
    class_aware_rpn,
    convs,
    deeplab,
    mask_head,
    meta_arch,
    rfcn,
    roi_heads,
)
