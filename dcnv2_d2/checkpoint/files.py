"""Reads checkpoints of other projects without running code that they may hold."""

import pickle

import torch
from torch import Tensor


def read_state_dict(path: str, *, trust: bool = False) -> dict[str, Tensor]:
    """read_checkpoint's weights."""
    return read_checkpoint(path, trust=trust)[0]


def read_checkpoint(path: str, *, trust: bool = False) -> tuple[dict[str, Tensor], str]:
    """Reads the weights of a PyTorch checkpoint, whatever it keeps them under (state_dict, model, or nothing).

    Args:
        path: a file written by torch.save.
        trust: unpickle arbitrary objects, which can run code; only for files from a source you trust.

    Returns:
        The weights, and the text of the config that mmdetection leaves beside them, "" if there is none.

    Raises:
        ValueError: the file is no checkpoint, needs trust, or holds no weights.
        OSError: it cannot be read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=not trust)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, ImportError) as e:
        if not trust and "Unsupported global" in str(e):
            raise ValueError(
                f"{path} holds Python objects beside tensors, and reading them can run code; if you trust its source, "
                "pass trust=True (--trust-pickle)"
            ) from e
        raise ValueError(f"{path} must be a PyTorch checkpoint, got {type(e).__name__}: {str(e)[:200]}") from e
    meta = content.get("meta") if isinstance(content, dict) else None
    texts = [meta.get(key) for key in ("config", "cfg")] if isinstance(meta, dict) else []  # 1.x and 2.x, 3.x
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = isinstance(content, dict) and {k: v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise ValueError(f"{path} must hold a state dict of tensors, got {_describe(content)}")
    weights = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return weights, next((text for text in texts if isinstance(text, str)), "")


def _describe(content: object) -> str:
    if isinstance(content, dict):
        return f"a dict of {', '.join(map(str, list(content)[:5])) or 'nothing'}"
    return f"a {type(content).__name__}"
