"""The generated data set "bent shapes", data sets given by their files, and checks of data sets (check.py)."""

from .files import register_files
from .generate import ensure_generated, register_bent_shapes

__all__ = ["ensure_generated", "register_bent_shapes", "register_files"]
