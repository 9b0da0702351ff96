"""The optimizer: Detectron2's parameter groups, with a learning-rate factor for the prediction layers."""

import torch
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

from .layers import DeformConv2d

OPTIMIZERS = {"SGD": torch.optim.SGD, "ADAMW": torch.optim.AdamW}


def build_optimizer(cfg, model: nn.Module) -> torch.optim.Optimizer:
    """As detectron2.solver.build_optimizer, with MODEL.DCNV2.OFFSET_LR_FACTOR and SOLVER.OPTIMIZER.

    The prediction convolutions of deformable layers come in groups of their own, so that the factor shows in
    optimizer.param_groups.

    Raises:
        ValueError: SOLVER.OPTIMIZER is unknown, or the factor is negative.
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
    predictors = {id(p) for m in model.modules() if isinstance(m, DeformConv2d) for p in m.conv_offset.parameters()}
    # Few groups, as optimizers step through them one by one: those with equal options are joined.
    joined = {}
    for group in groups:
        options = {k: v for k, v in group.items() if k != "params"}
        for p in group["params"]:
            own = dict(options)
            if id(p) in predictors:
                own["lr"] = own.get("lr", solver.BASE_LR) * factor
            key = tuple(sorted(own.items())) + (id(p) in predictors,)
            joined.setdefault(key, {**own, "params": []})["params"].append(p)
    options = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV} if solver.OPTIMIZER == "SGD" else {}
    optimizer = maybe_add_gradient_clipping(cfg, OPTIMIZERS[solver.OPTIMIZER])
    return optimizer(list(joined.values()), lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, **options)
