"""The optimizer: Detectron2's parameter groups, with a learning-rate factor for the prediction layers."""

import re

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import (
    get_default_optimizer_params,
    maybe_add_gradient_clipping,
    reduce_param_groups,
)
from torch import nn

from .layers import DeformConv2d

OPTIMIZERS = {"SGD": torch.optim.SGD, "ADAMW": torch.optim.AdamW}


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """As detectron2.solver.build_optimizer, with MODEL.DCNV2.OFFSET_LR_FACTOR, SOLVER.LR_FACTORS and OPTIMIZER.

    The factor shows in optimizer.param_groups, where parameters with equal options are in one group.

    Raises:
        ValueError: SOLVER.OPTIMIZER is unknown, a factor is negative, or LR_FACTORS finds no parameter.
    """
    solver, factor = cfg.SOLVER, cfg.MODEL.DCNV2.OFFSET_LR_FACTOR
    if solver.OPTIMIZER not in OPTIMIZERS:
        raise ValueError(f"SOLVER.OPTIMIZER must be one of {', '.join(OPTIMIZERS)}, got {solver.OPTIMIZER!r}")
    if not factor >= 0:
        raise ValueError(f"MODEL.DCNV2.OFFSET_LR_FACTOR must not be negative, got {factor}")
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    factors = {p: factor for m in model.modules() if isinstance(m, DeformConv2d) for p in m.conv_offset.parameters()}
    for pattern, by_name in solver.LR_FACTORS:
        found = [p for name, p in model.named_parameters() if re.search(pattern, name)]
        if not found:
            raise ValueError(f"SOLVER.LR_FACTORS must find parameters of the model, got {pattern!r}, which finds none")
        if not by_name >= 0:
            raise ValueError(f"SOLVER.LR_FACTORS must not be negative, got {by_name} for {pattern!r}")
        factors |= {p: factors.get(p, 1.0) * by_name for p in found}
    scaled = [
        {"params": [p], "lr": group["lr"] * factors[p]} for group in groups for p in group["params"] if p in factors
    ]
    groups = reduce_param_groups(groups + scaled)  # of the options of a parameter, the last count
    options = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV} if solver.OPTIMIZER == "SGD" else {}
    optimizer = maybe_add_gradient_clipping(cfg, OPTIMIZERS[solver.OPTIMIZER])
    return optimizer(groups, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, **options)
