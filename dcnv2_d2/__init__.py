"""Deformable ConvNets v2 for Detectron2: importing this package makes its parts known to Detectron2's registries."""

import os

# Before torch loads OpenMP: its threads spin so long while they wait that training takes several times longer as soon
# as another process wants the same cores. This many spins, some microseconds, cost nothing on a quiet machine.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

from . import compat

if compat.prepare():  # before anything that imports Detectron2
    from . import modeling  # noqa: F401
    from .config import add_dcnv2_config, load_config
    from .data import register_all
    from .ops._counting import register_with_fvcore

    register_all()
    register_with_fvcore()
    __all__ = ["add_dcnv2_config", "load_config"]
else:

    def __getattr__(name):
        if name in ("add_dcnv2_config", "load_config"):
            raise ImportError(f"dcnv2_d2.{name} needs Detectron2, which is not installed: {compat.INSTALL_HINT}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
