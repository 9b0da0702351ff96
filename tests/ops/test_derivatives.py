"""Derivatives of the operators beyond the plain gradient: second order, forward mode, torch.func's transforms."""

import pytest
import torch
from dcnv2_d2 import ops
from dcnv2_d2.layers import ModulatedDeformConv2d, ModulatedDeformRoIPool
from torch.autograd import forward_ad

from ..reference import assert_near, deform_conv2d_inputs
from ..reference import deform_conv2d as define_conv
from ..reference_pool import deform_roi_pool as define_pool
from ..reference_pool import deform_roi_pool_inputs
from ..reference_ps_pool import deform_ps_roi_pool as define_ps_pool
from ..reference_ps_pool import deform_ps_roi_pool_inputs

SMALL = {"n": 2, "c": 2, "h": 4, "w": 3}
CONV = {**SMALL, "o": 2, "kernel": (2, 1), "padding": 0, "reach": 2}
CASES = {
    "conv": lambda: (ops.deform_conv2d, define_conv, *deform_conv2d_inputs(**CONV)),
    "conv-groups": lambda: (
        ops.deform_conv2d,
        define_conv,
        *deform_conv2d_inputs(**{**CONV, "c": 4, "padding": (1, 0)}, stride=(2, 1), dilation=(2, 1), groups=2,
                              offset_groups=2, bias=False),
    ),
    "conv-v1": lambda: (ops.deform_conv2d, define_conv, *deform_conv2d_inputs(**CONV, mask=False)),
    "pool": lambda: (ops.deform_roi_pool, define_pool, *deform_roi_pool_inputs(**SMALL, k=2, output_size=(2, 1))),
    "pool-adaptive": lambda: (
        ops.deform_roi_pool,
        define_pool,
        *deform_roi_pool_inputs(**SMALL, k=2, output_size=2, sampling_ratio=-1, spatial_scale=1.0),
    ),
    "pool-plain": lambda: (
        ops.deform_roi_pool,
        define_pool,
        *deform_roi_pool_inputs(**SMALL, k=2, output_size=2, offset=False),
    ),
    "pool-v1": lambda: (
        ops.deform_roi_pool, define_pool, *deform_roi_pool_inputs(**SMALL, k=2, output_size=2, mask=False)
    ),
    "ps-pool": lambda: (
        ops.deform_ps_roi_pool,
        define_ps_pool,
        *deform_ps_roi_pool_inputs(**{**SMALL, "c": 2}, k=2, output_size=(2, 3), group_size=2, classes=2, parts=(1, 2)),
    ),
    "ps-pool-plain": lambda: (
        ops.deform_ps_roi_pool,
        define_ps_pool,
        *deform_ps_roi_pool_inputs(**{**SMALL, "c": 2}, k=2, output_size=2, offset=False),
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("case", CASES)


def prepared(case):
    """(f, definition, names, values): both functions of the differentiable tensors alone."""
    op, define, tensors, geometry = CASES[case]()
    names = [name for name, t in tensors.items() if t is not None]

    def of(function):
        return lambda *values: function(**{**tensors, **dict(zip(names, values, strict=True))}, **geometry)

    return of(op), of(define), names, [tensors[name] for name in names]


def requiring_grad(values):
    return [v.clone().requires_grad_() for v in values]


@EVERY
def test_second_derivatives_by_differences(case):
    f, _, _, values = prepared(case)
    assert torch.autograd.gradgradcheck(f, requiring_grad(values))


@EVERY
def test_third_derivatives_are_the_definitions(case):
    f, define, names, values = prepared(case)
    directions = [torch.randn_like(v) for v in values]
    results = []
    for function in (f, define):
        leaves = requiring_grad(values)
        result = function(*leaves).pow(3).sum()
        for _ in range(2):
            gradients = torch.autograd.grad(result, leaves, create_graph=True)
            result = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
        results.append(torch.autograd.grad(result, leaves))
    for name, actual, expected in zip(names, *results, strict=True):
        assert expected.abs().max() > 0, name
        assert_near(actual, expected, 1e-10, name)


@pytest.mark.parametrize("wanted", range(5))
@EVERY
def test_second_derivative_of_one_gradient_by_all(case, wanted):
    f, define, names, values = prepared(case)
    if wanted >= len(values):
        pytest.skip("fewer tensors")
    results = []
    for function in (f, define):
        leaves = requiring_grad(values)
        (gradient,) = torch.autograd.grad(function(*leaves).square().sum(), leaves[wanted], create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), leaves, materialize_grads=True))
    for name, actual, expected in zip(names, *results, strict=True):
        assert_near(actual, expected, 1e-11, name)


@EVERY
def test_forward_mode_by_differences(case):
    f, _, _, values = prepared(case)
    assert torch.autograd.gradcheck(f, requiring_grad(values), check_forward_ad=True, check_backward_ad=False)
    # The derivative of the backward operator in forward mode.
    assert torch.autograd.gradgradcheck(
        f, requiring_grad(values), check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False
    )


@EVERY
def test_forward_mode_with_one_tangent_leaves_the_value(case):
    f, _, _, values = prepared(case)
    expected = f(*values)
    for i, value in enumerate(values):
        with forward_ad.dual_level():
            out = f(*values[:i], forward_ad.make_dual(value, torch.ones_like(value)), *values[i + 1 :])
            primal, tangent = forward_ad.unpack_dual(out)
        assert_near(primal, expected, 1e-12)
        assert tangent.abs().max() > 0


@EVERY
def test_func_jvp_and_jacobians(case):
    f, define, names, values = prepared(case)
    tangents = tuple(torch.randn_like(v) for v in values)
    out, tangent = torch.func.jvp(f, tuple(values), tangents)
    step = 1e-6
    moved = [f(*(v + s * step * t for v, t in zip(values, tangents, strict=True))) for s in (1, -1)]
    assert_near(out, f(*values), 1e-12)
    assert_near(tangent, (moved[0] - moved[1]) / (2 * step), 1e-6)
    argnums = tuple(range(len(values)))
    forward, reverse = (jac(f, argnums)(*values) for jac in (torch.func.jacfwd, torch.func.jacrev))
    leaves = requiring_grad(values)
    expected = torch.autograd.functional.jacobian(define, tuple(leaves))
    for name, *actual, wanted in zip(names, forward, reverse, expected, strict=True):
        for jacobian in actual:
            assert_near(jacobian, wanted, 1e-11, name)


@EVERY
@pytest.mark.parametrize("outer", ["jacfwd", "jacrev"])
@pytest.mark.parametrize("inner", ["jacfwd", "jacrev"])
def test_func_second_derivatives(case, outer, inner):
    f, define, _, values = prepared(case)
    outer, inner = getattr(torch.func, outer), getattr(torch.func, inner)
    position = 1 if len(values) > 1 else 0  # the offset, if there is one

    def of_one(function):
        return lambda v: function(*values[:position], v, *values[position + 1 :]).square().sum()

    # A part of the offset alone: a Hessian has many elements.
    base = values[position]
    part = base.flatten()[:6]

    def of_part(function):
        return lambda v: of_one(function)(torch.cat([v, base.flatten()[6:]]).view_as(base))

    expected = torch.autograd.functional.hessian(of_part(define), part)
    assert_near(outer(inner(of_part(f)))(part), expected, 1e-10)


@EVERY
def test_func_grad_and_vjp_are_autograds(case):
    f, _, names, values = prepared(case)
    leaves = requiring_grad(values)
    out = f(*leaves)
    cotangent = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, cotangent)
    argnums = tuple(range(len(values)))
    by_grad = torch.func.grad(lambda *v: (f(*v) * cotangent).sum(), argnums)(*values)
    by_vjp = torch.func.vjp(f, *values)[1](cotangent)
    for name, *actual, wanted in zip(names, by_grad, by_vjp, expected, strict=True):
        for gradient in actual:
            assert_near(gradient, wanted, 1e-12, name)


@EVERY
@pytest.mark.parametrize("dim", [0, -1])
def test_vmap_is_a_loop(case, dim, recwarn):
    f, _, names, values = prepared(case)
    for batched in [*([i] for i in range(len(values))), list(range(len(values)))]:
        stacked = [torch.stack([v, v * 0.9, v * 1.1], dim) if i in batched else v for i, v in enumerate(values)]
        in_dims = tuple(dim if i in batched else None for i in range(len(values)))
        per_sample = [[v.select(dim, j) if i in batched else v for i, v in enumerate(stacked)] for j in range(3)]
        actual = torch.func.vmap(f, in_dims)(*stacked)
        assert_near(actual, torch.stack([f(*v) for v in per_sample]), 1e-12, str(batched))
        argnums = tuple(range(len(values)))
        gradient = torch.func.grad(lambda *v: f(*v).square().sum(), argnums)
        actual = torch.func.vmap(gradient, in_dims)(*stacked)
        for i, name in enumerate(names):
            assert_near(actual[i], torch.stack([gradient(*v)[i] for v in per_sample]), 1e-11, name)
    assert not [w for w in recwarn if "batching rule" in str(w.message)]


def test_vmap_over_boxes():
    _, _, tensors, geometry = CASES["pool"]()
    boxes = geometry.pop("boxes")
    many = torch.stack([boxes, boxes.flip(0)])
    actual = torch.func.vmap(lambda b: ops.deform_roi_pool(boxes=b, **tensors, **geometry))(many)
    assert_near(actual, torch.stack([ops.deform_roi_pool(boxes=b, **tensors, **geometry) for b in many]), 1e-12)


def test_per_sample_gradients_and_jvp_of_layers():
    conv = ModulatedDeformConv2d(3, 4, 3, padding=1).double()
    pool = ModulatedDeformRoIPool(4, 2, hidden_dims=(8,)).double()
    for module in (conv.conv_offset, pool.branch[-1]):
        torch.nn.init.normal_(module.weight, std=0.1)
        torch.nn.init.normal_(module.bias, std=0.1)
    model, boxes = torch.nn.ModuleDict({"conv": conv, "pool": pool}), torch.tensor([[0, 0.7, 0.8, 5.3, 6.1]]).double()
    parameters = dict(model.named_parameters())

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            return self.parts["pool"](self.parts["conv"](x[None]), boxes).square().sum()

    loss, x = Loss(), torch.randn(3, 3, 7, 6).double()
    own = {f"parts.{k}": v.detach() for k, v in parameters.items()}

    def of(parameters, x):
        return torch.func.functional_call(loss, parameters, (x,))

    actual = torch.func.vmap(torch.func.grad(of), (None, 0))(own, x)
    for i in range(3):
        expected = torch.autograd.grad(loss(x[i]), list(parameters.values()))
        for name, gradient in zip(own, expected, strict=True):
            assert_near(actual[name][i], gradient, 1e-10, name)
    direction, step = {k: torch.randn_like(v) for k, v in own.items()}, 1e-6
    _, tangent = torch.func.jvp(lambda p: of(p, x[0]), (own,), (direction,))
    moved = [of({k: v + s * step * direction[k] for k, v in own.items()}, x[0]) for s in (1, -1)]
    assert_near(tangent, (moved[0] - moved[1]) / (2 * step), 1e-5)


@pytest.mark.parametrize("case", ["conv", "conv-groups", "conv-v1"])  # rounded boxes may put samples where values jump
def test_a_gradient_penalty_in_half_precision(case):
    f, define, names, values = prepared(case)
    halves = [v.to(torch.bfloat16) for v in values]
    results = []
    for function, dtype in ((f, torch.bfloat16), (define, torch.float64)):
        leaves = [v.to(dtype).requires_grad_() for v in halves]
        gradients = torch.autograd.grad(function(*leaves).double().square().sum(), leaves, create_graph=True)
        penalty = sum(g.double().square().sum() for g in gradients)
        results.append(torch.autograd.grad(penalty, leaves))
    for name, actual, expected in zip(names, *results, strict=True):
        assert actual.dtype == torch.bfloat16
        assert_near(actual, expected, 3e-2, name)
