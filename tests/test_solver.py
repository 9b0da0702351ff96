"""The optimizer's parameter groups."""

import math

import pytest
import torch
from dcnv2_d2 import add_dcnv2_config
from dcnv2_d2.layers import DeformConv2d, ModulatedDeformConv2d
from dcnv2_d2.solver import build_optimizer
from detectron2.config import get_cfg
from detectron2.layers import Conv2d
from detectron2.solver import build_lr_scheduler
from torch import nn

BASE_LR = 0.5


def make_cfg(**changes):
    cfg = get_cfg()
    add_dcnv2_config(cfg)
    cfg.SOLVER.BASE_LR = BASE_LR
    cfg.SOLVER.WEIGHT_DECAY = 0.03
    cfg.merge_from_list([item for key, value in changes.items() for item in (key.replace("__", "."), value)])
    return cfg


def make_model():
    conv = Conv2d(4, 4, 3, norm=nn.BatchNorm2d(4))
    return nn.Sequential(
        nn.Conv2d(3, 4, 3).requires_grad_(False),
        ModulatedDeformConv2d.from_conv(conv),
        nn.Sequential(DeformConv2d(4, 4, 3), nn.GroupNorm(2, 4)),
        nn.Linear(4, 2),
    )


def options(optimizer, model, key):
    """The option of every parameter, by the parameter's name; a parameter in two groups is an error."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(names[id(p)], group[key]) for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["SGD", "ADAMW"])
@pytest.mark.parametrize("factor", [0.1, 1.0, 0.0, 2.0])
def test_factor_of_exactly_the_prediction_layers(factor, kind):
    model = make_model()
    cfg = make_cfg(MODEL__DCNV2__OFFSET_LR_FACTOR=factor, SOLVER__OPTIMIZER=kind)
    rates = options(build_optimizer(cfg, model), model, "lr")
    assert rates.keys() == trainable(model) and len(rates) == 14
    predictors = {f"{layer}.conv_offset.{p}" for layer in ("1", "2.0") for p in ("weight", "bias")}
    assert rates == {name: pytest.approx(BASE_LR * (factor if name in predictors else 1)) for name in rates}


def test_paper_s_factor_is_the_default():
    model = make_model()
    rates = options(build_optimizer(make_cfg(), model), model, "lr")
    assert {name for name, lr in rates.items() if lr == pytest.approx(0.05)} == {n for n in rates if "conv_offset" in n}


def test_few_groups():
    optimizer = build_optimizer(make_cfg(), make_model())
    assert len(optimizer.param_groups) == 3  # ordinary, norm, prediction


def test_weight_decay():
    model = make_model()
    cfg = make_cfg(SOLVER__WEIGHT_DECAY_NORM=0.007)
    decay = options(build_optimizer(cfg, model), model, "weight_decay")
    assert {name for name in decay if decay[name] == 0.007} == {
        "1.norm.weight",
        "1.norm.bias",
        "2.1.weight",
        "2.1.bias",
    }
    assert set(decay.values()) == {0.007, 0.03}


def test_bias_options_are_kept():
    model = make_model()
    optimizer = build_optimizer(make_cfg(SOLVER__BIAS_LR_FACTOR=3.0, SOLVER__WEIGHT_DECAY_BIAS=0.011), model)
    rates, decay = options(optimizer, model, "lr"), options(optimizer, model, "weight_decay")
    for name in rates:
        bias, predictor = name.endswith("bias"), "conv_offset" in name
        assert rates[name] == pytest.approx(BASE_LR * (3 if bias else 1) * (0.1 if predictor else 1)), name
        assert decay[name] == (0.011 if bias else 0 if name in ("1.norm.weight", "2.1.weight") else 0.03), name


def test_kinds_and_their_options():
    sgd = build_optimizer(make_cfg(SOLVER__MOMENTUM=0.8, SOLVER__NESTEROV=True), make_model())
    assert type(sgd) is torch.optim.SGD and {(g["momentum"], g["nesterov"]) for g in sgd.param_groups} == {(0.8, True)}
    adamw = build_optimizer(make_cfg(SOLVER__OPTIMIZER="ADAMW"), make_model())
    assert type(adamw) is torch.optim.AdamW
    assert {g["weight_decay"] for g in adamw.param_groups} == {0.03, 0.0}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"SOLVER__OPTIMIZER": "RMSPROP"}, "SOLVER.OPTIMIZER must be one of SGD, ADAMW, got 'RMSPROP'"),
        ({"MODEL__DCNV2__OFFSET_LR_FACTOR": -0.1}, "OFFSET_LR_FACTOR must not be negative, got -0.1"),
        ({"MODEL__DCNV2__OFFSET_LR_FACTOR": math.nan}, "OFFSET_LR_FACTOR must not be negative, got nan"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(make_cfg(**changes), make_model())


def step(cfg, grad):
    """How far one step moves every parameter when all gradients have this value."""
    model = make_model().double()
    optimizer = build_optimizer(cfg, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, grad)
    optimizer.step()
    return optimizer, {name: before[name] - p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("factor", [0.1, 0.0])
@pytest.mark.parametrize("clip", [True, False])
def test_a_step_of_sgd(clip, factor):
    cfg = make_cfg(
        SOLVER__WEIGHT_DECAY=0.0,
        SOLVER__CLIP_GRADIENTS__ENABLED=clip,
        SOLVER__CLIP_GRADIENTS__CLIP_TYPE="value",
        SOLVER__CLIP_GRADIENTS__CLIP_VALUE=0.25,
        MODEL__DCNV2__OFFSET_LR_FACTOR=factor,
    )
    optimizer, moved = step(cfg, 8.0)
    assert isinstance(optimizer, torch.optim.SGD)
    for name, distance in moved.items():
        rate = 0 if name.startswith("0.") else BASE_LR * (factor if "conv_offset" in name else 1)
        assert distance.unique().numpy() == pytest.approx(rate * (0.25 if clip else 8.0), abs=1e-12), name


@pytest.mark.parametrize("kind, cls", [("SGD", torch.optim.SGD), ("ADAMW", torch.optim.AdamW)])
def test_clipping_by_norm(kind, cls):
    cfg = make_cfg(
        SOLVER__OPTIMIZER=kind,
        SOLVER__CLIP_GRADIENTS__ENABLED=True,
        SOLVER__CLIP_GRADIENTS__CLIP_TYPE="norm",
        SOLVER__CLIP_GRADIENTS__CLIP_VALUE=1.0,
    )
    optimizer, _ = step(cfg, 100.0)
    assert isinstance(optimizer, cls)
    norms = [p.grad.norm().item() for group in optimizer.param_groups for p in group["params"]]
    assert norms == pytest.approx([1.0] * 14, rel=1e-4)


@pytest.mark.filterwarnings("ignore:Detected call of")  # there is no training here
def test_schedule_keeps_the_factor():
    model = make_model()
    cfg = make_cfg(SOLVER__MAX_ITER=10, SOLVER__WARMUP_ITERS=4, SOLVER__STEPS=(8,))
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    seen = set()
    for _ in range(10):
        rates = options(optimizer, model, "lr")
        seen.add(rates["3.weight"])
        assert rates["1.conv_offset.weight"] == pytest.approx(0.1 * rates["3.weight"])
        scheduler.step()
    assert len(seen) > 4


def test_factors_by_name_are_multiplied():
    """Also with that of the prediction layers, and with Detectron2's of biases."""
    model = make_model()
    factors = [[r"^1\.", 3.0], [r"conv_offset\.weight", 0.5], ["^3", 2.0]]
    cfg = make_cfg(SOLVER__LR_FACTORS=factors, SOLVER__BIAS_LR_FACTOR=10.0, MODEL__DCNV2__OFFSET_LR_FACTOR=0.1)
    rates = {name: rate / BASE_LR for name, rate in options(build_optimizer(cfg, model), model, "lr").items()}
    assert rates == {
        "1.weight": pytest.approx(3.0),
        "1.bias": pytest.approx(30.0),
        "1.conv_offset.weight": pytest.approx(0.15),
        "1.conv_offset.bias": pytest.approx(3.0),
        "1.norm.weight": pytest.approx(3.0),
        "1.norm.bias": pytest.approx(30.0),
        "2.0.weight": pytest.approx(1.0),
        "2.0.bias": pytest.approx(10.0),
        "2.0.conv_offset.weight": pytest.approx(0.05),
        "2.0.conv_offset.bias": pytest.approx(1.0),
        "2.1.weight": pytest.approx(1.0),
        "2.1.bias": pytest.approx(10.0),
        "3.weight": pytest.approx(2.0),
        "3.bias": pytest.approx(20.0),
    }


@pytest.mark.parametrize(
    "factors, message",
    [
        ([["no_such_layer", 2.0]], "LR_FACTORS must find parameters of the model, got 'no_such_layer'"),
        ([["weight", -1.0]], "LR_FACTORS must not be negative, got -1.0 for 'weight'"),
    ],
)
def test_bad_factors_by_name(factors, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(make_cfg(SOLVER__LR_FACTORS=factors), make_model())
