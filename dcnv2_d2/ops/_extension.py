"""Loads the compiled operators; without them, declares the operators, which then run as definitions.py has them."""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import torch

# As in csrc/library.cpp, where the shapes are.
SCHEMAS = (
    "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, "
    "int[2] stride, int[2] padding, int[2] dilation) -> Tensor",
    "deform_conv2d_backward(Tensor grad, Tensor input, Tensor offset, Tensor weight, Tensor? mask, "
    "int[2] stride, int[2] padding, int[2] dilation, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    "deform_roi_pool(Tensor input, Tensor boxes, Tensor? offset, Tensor? mask, int[2] output_size, "
    "float spatial_scale, int sampling_ratio, float gamma) -> Tensor",
    "deform_roi_pool_backward(Tensor grad, Tensor input, Tensor boxes, Tensor? offset, Tensor? mask, "
    "int[2] output_size, float spatial_scale, int sampling_ratio, float gamma, bool[3] wanted) "
    "-> (Tensor, Tensor, Tensor)",
    "deform_ps_roi_pool(Tensor input, Tensor boxes, Tensor? offset, Tensor? mask, int[2] output_size, "
    "float spatial_scale, int sampling_ratio, float gamma, int group_size) -> Tensor",
    "deform_ps_roi_pool_backward(Tensor grad, Tensor input, Tensor boxes, Tensor? offset, Tensor? mask, "
    "int[2] output_size, float spatial_scale, int sampling_ratio, float gamma, int group_size, bool[3] wanted) "
    "-> (Tensor, Tensor, Tensor)",
)


def _load() -> str | None:
    """Loads dcnv2_d2._C; returns why that cannot be done, or None."""
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
    return None


error = _load()
if error is not None:
    _library = torch.library.Library("dcnv2_d2", "DEF")
    for schema in SCHEMAS:
        _library.define(schema)


def check() -> None:
    """Raises RuntimeError if the compiled operators are missing."""
    if error is not None:
        raise RuntimeError(error)
