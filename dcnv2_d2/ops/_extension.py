"""Loads the compiled operators. Without them importing the package works; the first use raises, with the reason."""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import torch


def _load() -> str | None:
    """Loads dcnv2_d2._C and the rules that go with it; returns why that cannot be done, or None."""
    remedy = "run in the project's folder: pip install --no-build-isolation -e ."
    spec = importlib.util.find_spec("dcnv2_d2._C")
    if spec is None:
        here = Path(__file__).resolve().parents[2]
        hidden = PathFinder.find_spec("dcnv2_d2", [path for path in sys.path if Path(path).resolve() != here])
        if hidden and hidden.origin:
            return (
                f"the folder dcnv2_d2 in {here}, which has no compiled operators, hides the installed package in "
                f"{Path(hidden.origin).parents[1]}; run in another folder, or {remedy.removeprefix('run ')}"
            )
        return f"dcnv2_d2's compiled operators (dcnv2_d2._C) are not built; {remedy}"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as e:
        return (
            f"dcnv2_d2's compiled operators ({spec.origin}) do not load with torch {torch.__version__}: {e}; "
            f"to build them for it, {remedy}"
        )
    from . import _registrations  # noqa: F401  needs the operators' schemas

    return None


error = _load()


def check() -> None:
    """Raises RuntimeError if the compiled operators are missing; a line that torch.compile can follow."""
    if error is not None:
        raise RuntimeError(error)
