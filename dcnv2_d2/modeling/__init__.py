"""What Detectron2's registries hold; importing it registers everything."""

from . import backbone, convs, mask_head, meta_arch, roi_heads  # noqa: F401
