"""What Detectron2's registries hold; importing it registers everything."""

from . import backbone  # noqa: F401
