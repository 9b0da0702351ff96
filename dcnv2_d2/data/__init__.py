"""The generated data set "bent shapes" and its registration with Detectron2."""

from .generate import ensure_generated, register_all

__all__ = ["ensure_generated", "register_all"]
