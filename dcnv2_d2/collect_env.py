"""Prints the versions and paths that a bug report needs: `python -m dcnv2_d2.collect_env`."""

import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from pathlib import Path

from . import compat


def _dcnv2_d2():
    try:
        version = importlib.metadata.version("dcnv2-d2")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    return f"{version} @ {Path(__file__).parent}"


def _extension():
    spec = importlib.util.find_spec("dcnv2_d2._C")
    return spec.origin if spec else "not found; in a checkout, build it: pip install --no-build-isolation -e ."


def _extension_loads():
    import torch

    from .ops import _extension

    _extension.check()
    return f"yes; {torch.ops.dcnv2_d2.build_info()}"


def _torch():
    import torch

    return f"{torch.__version__} ({f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'})"


def _gpus():
    from torch import cuda

    if not cuda.is_available():
        return "none available"
    properties = [cuda.get_device_properties(i) for i in range(cuda.device_count())]
    return ", ".join(f"{p.name} (compute capability {p.major}.{p.minor})" for p in properties)


def _detectron2():
    root = compat.find_detectron2()
    return f"{_version('detectron2')} @ {root}" if root else f"not installed; {compat.INSTALL_HINT}"


def _detectron2_extension():
    if compat.find_detectron2() is None:
        return "not installed"
    if compat.has_compiled_part():
        return "built"
    return f"not built; {'dcnv2_d2 stands in for it' if 'detectron2._C' in sys.modules else 'Detectron2 does without'}"


def _version(module):
    # Imported, not looked up: a package that is installed but cannot be imported is worth reporting.
    return importlib.import_module(module).__version__


FACTS = {
    "dcnv2_d2": _dcnv2_d2,
    "dcnv2_d2._C": _extension,
    "dcnv2_d2._C loads": _extension_loads,
    "Python": lambda: f"{platform.python_version()} on {platform.platform()}",
    "PyTorch": _torch,
    "GPU": _gpus,
    "torchvision": lambda: _version("torchvision"),
    "Detectron2": _detectron2,
    "detectron2._C": _detectron2_extension,
    "NumPy": lambda: _version("numpy"),
    "Pillow": lambda: _version("PIL"),
}


def collect_env() -> str:
    """Returns the table as a string. What cannot be found out is reported as the reason why, never raised."""
    lines = []
    for name, fact in FACTS.items():
        try:
            value = fact()
        except Exception as e:
            value = " ".join(f"failed: {type(e).__name__}: {e}".split())
        lines.append(f"{name:<{max(map(len, FACTS))}}  {value}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(collect_env())
