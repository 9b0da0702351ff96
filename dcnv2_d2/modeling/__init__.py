"""What Detectron2's registries hold; importing it registers everything."""

from . import backbone, roi_heads  # noqa: F401
