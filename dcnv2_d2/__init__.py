"""Deformable ConvNets v2 for Detectron2: importing this package makes its parts known to Detectron2's registries."""

import os
from typing import NoReturn

# Before torch loads OpenMP: its threads spin so long while they wait that training takes several times longer as soon
# as another process wants the same cores. This many spins, some microseconds, cost nothing on a quiet machine.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

from . import compat

__version__ = "0.1.0"
__all__ = ["add_dcnv2_config", "load_config"]

if compat.prepare():  # before anything that imports Detectron2
    from . import modeling  # noqa: F401
    from .config import add_dcnv2_config, load_config
    from .data import register_bent_shapes, register_label_maps, register_voc_sem_seg
    from .ops._counting import register_with_fvcore

    register_bent_shapes()
    register_label_maps()
    register_voc_sem_seg()
    register_with_fvcore()
else:

    def __getattr__(name: str) -> NoReturn:
        if name in __all__:
            raise ImportError(f"dcnv2_d2.{name} needs Detectron2, which is not installed. {compat.INSTALL_HINT}")
        raise AttributeError(f"module 'dcnv2_d2' has no attribute {name!r}")
