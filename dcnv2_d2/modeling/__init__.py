"""What Detectron2's registries hold; importing it registers everything."""

from . import backbone, meta_arch, roi_heads  # noqa: F401
