"""Joint predictions against the separate ones that they were made of."""

import pytest
import torch
from dcnv2_d2.checkpoint import join_pool_branch, join_prediction_convs
from dcnv2_d2.layers import DeformConv2d, ModulatedDeformConv2d
from dcnv2_d2.ops import deform_conv2d
from torch import nn

from ..reference import assert_near


def fill(module):
    for p in module.parameters():
        nn.init.normal_(p, 0, 0.3)
    return module.double()


def packs(inputs=12, hidden=16, bins=9):
    offset = nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2 * bins)
    )
    mask = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, bins), nn.Sigmoid())
    return fill(offset), fill(mask)


def prefixed(prefix, module):
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def test_joint_pool_branch_equals_the_separate_ones():
    offset, mask = packs()
    joined = join_pool_branch(prefixed("offset_fc", offset) | prefixed("mask_fc", mask))
    assert {name: tuple(tensor.shape) for name, tensor in joined.items()} == {
        **{"branch.0.weight": (32, 12), "branch.0.bias": (32,), "branch.2.weight": (32, 32), "branch.2.bias": (32,)},
        **{"branch.4.weight": (27, 32), "branch.4.bias": (27,)},
    }
    branch = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 27)).double()
    branch.load_state_dict({name.removeprefix("branch."): tensor for name, tensor in joined.items()})
    x = torch.randn(50, 12, dtype=torch.float64)
    actual, expected = branch(x), torch.cat([offset(x), torch.logit(mask(x))], dim=1)
    assert expected[:, :18].std() > 0.1 and expected[:, 18:].std() > 0.1
    assert_near(actual, expected, 1e-6)


def test_v1_pool_branch_is_renamed():
    offset, _ = packs()
    joined = join_pool_branch(prefixed("offset_fc", offset))
    assert joined.keys() == {f"branch.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert all(joined[f"branch.{name}"] is not None for name in offset.state_dict())


def separate_block(x, state, modulated):
    """The block by its own definition: rows of all taps, then columns."""
    prediction = nn.functional.conv2d(x, state["p_conv.weight"], state["p_conv.bias"], padding=1)
    offset = torch.empty_like(prediction)
    for tap in range(9):
        offset[:, 2 * tap], offset[:, 2 * tap + 1] = prediction[:, tap], prediction[:, 9 + tap]
    mask = None
    if modulated:
        mask = nn.functional.conv2d(x, state["m_conv.weight"], state["m_conv.bias"], padding=1).sigmoid()
    return deform_conv2d(x, offset, state["conv.weight"], state.get("conv.bias"), padding=1, mask=mask)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("modulated", [True, False])
def test_separate_predictions(modulated, bias):
    block = nn.Module()
    block.conv = nn.Conv2d(4, 6, 3, stride=3, bias=bias)
    block.p_conv = nn.Conv2d(4, 18, 3, padding=1)
    if modulated:
        block.m_conv = nn.Conv2d(4, 9, 3, padding=1)
    source = fill(block).state_dict()
    others = {"layer1.0.weight": torch.randn(3), "fc.bias": torch.randn(2)}
    joined = join_prediction_convs(prefixed("layer2.0.conv2", block) | others)
    assert joined.items() >= others.items()
    layer = (ModulatedDeformConv2d if modulated else DeformConv2d)(4, 6, 3, padding=1, bias=bias).double()
    mine = {n.removeprefix("layer2.0.conv2."): t for n, t in joined.items() if n not in others}
    layer.load_state_dict(mine, strict=True)
    x = torch.randn(2, 4, 11, 9, dtype=torch.float64)
    assert_near(layer(x), separate_block(x, source, modulated), 1e-12)


def test_what_is_not_such_a_block():
    with pytest.raises(ValueError, match="must have blocks with p_conv, got none"):
        join_prediction_convs({"conv.weight": torch.zeros(1)})
    predictor = {"a.p_conv.weight": torch.zeros(50, 4, 3, 3), "a.p_conv.bias": torch.zeros(50)}
    with pytest.raises(ValueError, match="a.conv.weight must be that of a 3x3 convolution, got 5x5"):
        join_prediction_convs(predictor | {"a.conv.weight": torch.zeros(4, 4, 5, 5)})
    with pytest.raises(ValueError, match="a.conv.weight must be .*, got none"):
        join_prediction_convs(predictor)
