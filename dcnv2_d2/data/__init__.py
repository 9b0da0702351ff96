"""Generated data sets, VOC's labels, data sets given by their files, and checks of data sets (check.py)."""

from .files import register_files
from .generate import ensure_generated, register_bent_shapes
from .label_maps import register_label_maps
from .voc import register_voc_sem_seg

__all__ = [
    "ensure_generated",
    "register_bent_shapes",
    "register_files",
    "register_label_maps",
    "register_voc_sem_seg",
]
