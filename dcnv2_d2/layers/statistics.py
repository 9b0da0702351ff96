"""How far the layers bend: offset statistics in Detectron2's event storage, and a warning when offsets run away."""

import logging

import torch
from torch import Tensor, nn

NOT_SCRIPTABLE = "dcnv2_d2's layers cannot be scripted by torch.jit.script; use torch.jit.trace or torch.export"
PERIOD = 20  # iterations: Detectron2's own writers run as often, and reading a number stalls a GPU


def is_watched(layer: nn.Module, x: Tensor) -> bool:
    """Whether a forward pass is one of a training that statistics may be taken of: not one of a tracer, which has no
    values, nor the second one that activation checkpointing makes, in the backward pass."""
    return (
        layer.training
        and isinstance(x, Tensor)  # torch.fx traces with stand-ins
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._current_graph_task_id() == -1
    )


@torch.no_grad()
def record_statistics(name: str, offset: Tensor, mask: Tensor | None, limit: float, unit: str) -> None:
    """Writes `<name>/offset_mean`, `offset_max` (of the absolute value) and `mask_mean`.

    Does nothing outside a Detectron2 training loop. Warns when the mean offset passes the limit, the sign of a
    diverging layer.

    Args:
        offset, mask: what the layer predicted, of any shape; the offset in the given unit.
        limit: a mean offset that no sane layer has.
        unit: of the offset, in the plural, for the warning.
    """
    storage = _event_storage()
    if storage is None or storage.iter % PERIOD or offset.numel() == 0:
        return
    distance = offset.detach().float().abs()
    mean = distance.mean().item()
    storage.put_scalar(f"{name}/offset_mean", mean, smoothing_hint=False)
    storage.put_scalar(f"{name}/offset_max", distance.max().item(), smoothing_hint=False)
    if mask is not None:
        storage.put_scalar(f"{name}/mask_mean", mask.detach().float().mean().item(), smoothing_hint=False)
    if not mean <= limit:
        logging.getLogger(__name__).warning(
            "%s: the mean offset is %.1f %s, above %.1f; training diverges. "
            "Lower the learning rate (for convolutions, MODEL.DCNV2.OFFSET_LR_FACTOR), or clip gradients.",
            name, mean, unit, limit,
        )  # fmt: skip


def _event_storage():
    try:
        from detectron2.utils.events import get_event_storage

        return get_event_storage()
    except (ImportError, AssertionError):  # no Detectron2, or no training loop
        return None
