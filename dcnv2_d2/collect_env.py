"""Prints what a bug report needs: `python -m dcnv2_d2.collect_env`."""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from tabulate import tabulate

from . import compat


def _dcnv2_d2() -> str:
    try:
        version = importlib.metadata.version("dcnv2-d2")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    return f"{version} @ {Path(__file__).parent}"


def _extension() -> str:
    spec = importlib.util.find_spec("dcnv2_d2._C")
    return str(spec.origin) if spec else "not found; in a checkout, build it: pip install --no-build-isolation -e ."


def _extension_loads() -> str:
    import torch

    from .ops import _extension

    _extension.check()
    return f"yes; {torch.ops.dcnv2_d2.build_info()}"


def _detectron2() -> str:
    root = compat.find_detectron2()
    if root is None:
        return f"not installed; {compat.INSTALL_HINT}"
    if compat.has_compiled_part():
        return f"{root}, compiled"
    stands_in = "dcnv2_d2 stands in for its compiled part" if "detectron2._C" in sys.modules else "it does without"
    return f"{root}, not compiled; {stands_in}"


def _environment() -> str:
    """Versions, GPU and compilers, in Detectron2's form or, without it, in PyTorch's."""
    if compat.find_detectron2() is None:
        from torch.utils.collect_env import get_pretty_env_info

        return get_pretty_env_info()
    from detectron2.utils.collect_env import collect_env_info

    return collect_env_info()


FACTS = {
    "dcnv2_d2": _dcnv2_d2,
    "dcnv2_d2._C": _extension,
    "dcnv2_d2._C loads": _extension_loads,
    "Detectron2": _detectron2,
}


def collect_env() -> str:
    """The report. What cannot be found out is reported as the reason why, never raised."""
    facts = [(name, " ".join(_tried(fact).split())) for name, fact in FACTS.items()]
    return f"{tabulate(facts)}\n{_tried(_environment)}"


def _tried(fact: Callable[[], str]) -> str:
    try:
        return fact()
    except Exception as e:
        return f"failed: {type(e).__name__}: {e}"


if __name__ == "__main__":
    print(collect_env())
