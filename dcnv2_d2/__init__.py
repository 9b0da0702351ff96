"""Deformable ConvNets v2 for Detectron2: importing this package makes its parts known to Detectron2's registries."""

import os
import warnings

# Before torch loads OpenMP: its threads spin so long while they wait that training takes several times longer as soon
# as another process wants the same cores. This many spins, some microseconds, cost nothing on a quiet machine.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

from . import compat

if compat.prepare():  # before anything that imports Detectron2
    from . import modeling  # noqa: F401
    from .config import add_dcnv2_config, load_config
    from .data import register_all

    register_all()
    __all__ = ["add_dcnv2_config", "load_config"]
else:
    warnings.warn(
        f"Detectron2 is not installed; only dcnv2_d2.ops and dcnv2_d2.layers can be used. {compat.INSTALL_HINT}",
        stacklevel=2,
    )
