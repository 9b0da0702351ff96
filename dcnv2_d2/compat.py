"""The one place that knows about Detectron2 versions: 0.6, with or without its compiled part, and main.

Both call themselves "0.6", so what matters is read from their source files. Nothing here imports Detectron2 (that
takes seconds); on main, and on any later Detectron2, :func:`prepare` changes nothing.
"""

import sys
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

INSTALL_HINT = "pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2.git"


def find_detectron2() -> Path | None:
    """Returns Detectron2's directory, or None if it is not installed."""
    spec = find_spec("detectron2")
    # A folder that is merely called detectron2, such as a clone beside the script, has no origin.
    return Path(spec.origin).parent if spec and spec.origin else None


def has_compiled_part() -> bool:
    """Whether Detectron2 has its own `_C`: rotated boxes, its deformable layers, the fast COCO evaluation."""
    root = find_detectron2()
    # Not find_spec("detectron2._C"): that imports detectron2, and would find our stand-in.
    return root is not None and PathFinder.find_spec("detectron2._C", [str(root)]) is not None


def has_fast_coco_eval() -> bool:
    """What to pass to COCOEvaluator as `use_fast_impl`; 0.6 does not fall back to the official one by itself."""
    return has_compiled_part()


def create_local_process_group(size: int) -> None:
    """Tells Detectron2 which processes are on this machine, `size` of them on each; after init_process_group."""
    from detectron2.utils import comm

    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(size)
        return
    import torch.distributed as dist

    # 0.6 does this in its own launch only. All processes must create all groups.
    groups = [dist.new_group(range(i, i + size)) for i in range(0, dist.get_world_size(), size)]
    comm._LOCAL_PROCESS_GROUP = groups[dist.get_rank() // size]


def distribute_on_cpu() -> None:
    """Makes Detectron2's trainers wrap models for several processes that have no GPU."""
    from functools import partial

    from detectron2.engine import defaults

    defaults.create_ddp_model = partial(defaults.create_ddp_model, device_ids=None)


def replace_data_loader(trainer: Any, data_loader: Iterable) -> None:
    """Gives a SimpleTrainer of Detectron2 another data loader before its first step."""
    if hasattr(trainer, "reset_data_loader"):
        trainer.reset_data_loader(lambda: data_loader)
    else:
        trainer.data_loader = data_loader
        trainer._data_loader_iter = iter(data_loader)


def finish_models(finish: Callable[..., None]) -> None:
    """Lets `finish(model, cfg)` change every model that detectron2.modeling.build_model makes.

    DefaultTrainer, DefaultPredictor and scripts hold references to build_model, which looks up META_ARCH_REGISTRY when
    it runs: so it is given one, with the same content, whose models are finished.
    """
    from detectron2.modeling.meta_arch import build
    from detectron2.utils.registry import Registry

    class Finishing(Registry):
        def get(self, name):
            make = super().get(name)

            def make_and_finish(cfg):
                model = make(cfg)
                finish(model, cfg)
                return model

            return make_and_finish

    registry = Finishing("META_ARCH")
    registry.__dict__ = vars(build.META_ARCH_REGISTRY)  # what is registered with one is in the other
    build.META_ARCH_REGISTRY = registry


def prepare() -> bool:
    """Makes Detectron2 importable beside current NumPy and Pillow; call before the first import from it.

    Returns:
        bool: whether Detectron2 is installed.
    """
    root = find_detectron2()
    if root is None:
        return False
    # Since January 2022 Detectron2 guards this import and does without its compiled part by itself.
    if not has_compiled_part() and _contains(root / "layers" / "deform_conv.py", "\nfrom detectron2 import _C\n"):
        sys.modules.setdefault("detectron2._C", _stand_in())
    # Of the removed names, the last one that Detectron2 stopped using, in July 2023.
    if _contains(root / "data" / "transforms" / "transform.py", "Image.LINEAR"):
        _restore_aliases()
    return True


def _contains(path, text):
    return path.is_file() and text in path.read_text(encoding="utf-8")


def _restore_aliases():
    """Puts back the names that Detectron2 0.6 uses and NumPy 1.24 and Pillow 10 removed, where they are missing."""
    import numpy as np
    from PIL import Image

    # vars(), because hasattr() on a removed NumPy alias warns.
    for alias in (bool, int, float, str):
        vars(np).setdefault(alias.__name__, alias)
    vars(Image).setdefault("LINEAR", Image.BILINEAR)


def _stand_in():
    """Returns a module to be found as `detectron2._C`, every function of which raises when it is called."""
    # With a spec, as importlib.util.find_spec raises for a loaded module that has none.
    module = module_from_spec(ModuleSpec("detectron2._C", loader=None, origin="stand-in by dcnv2_d2.compat"))
    module.__doc__ = "Stands in for Detectron2's compiled part, which is not built here."
    # Detectron2's default_setup logs these.
    module.get_compiler_version = module.get_cuda_version = lambda: "detectron2._C is not built"
    module.has_cuda = lambda: False
    module.__getattr__ = _missing
    return module


def _missing(name):
    # Special names are probed by the import system, inspect, copy and pickle, which expect an AttributeError.
    if name.startswith("__"):
        raise AttributeError(f"module 'detectron2._C' has no attribute {name!r}")
    if name in ("InstanceAnnotation", "COCOevalEvaluateImages", "COCOevalAccumulate"):
        remedy = "Pass use_fast_impl=False to COCOEvaluator"
    else:
        remedy = "dcnv2_d2's own layers do not need it; for this one, build Detectron2 from source: " + INSTALL_HINT

    def missing(*args, **kwargs):
        raise RuntimeError(f"detectron2._C.{name} was called, but this Detectron2 has no compiled part. {remedy}.")

    missing.__name__ = missing.__qualname__ = name
    return missing
