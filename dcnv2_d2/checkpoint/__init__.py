"""Weights from elsewhere: v1 checkpoints for v2 models, mmdetection's models, blocks with separate predictions."""

from .checkpointer import Checkpointer, UnreadableCheckpoint
from .files import read_checkpoint, read_state_dict
from .joining import add_mask_logits, join_pool_branch, join_prediction_convs
from .mmdetection import Converted, from_mmdetection

__all__ = [
    "Checkpointer",
    "Converted",
    "UnreadableCheckpoint",
    "add_mask_logits",
    "from_mmdetection",
    "join_pool_branch",
    "join_prediction_convs",
    "read_checkpoint",
    "read_state_dict",
]
