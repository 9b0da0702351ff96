"""What PyTorch must know of each operator beside its kernels: shapes alone (fake), derivatives, autocast, fall back."""

import functools
import warnings

import torch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch._prims_common import suggest_memory_format
from torch.autograd import Function, forward_ad

from . import _checks, _extension, definitions

_ops = torch.ops.dcnv2_d2
_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
_library = torch.library.Library("dcnv2_d2", "IMPL")


def _register_autocast(name, run):
    """Under autocast, calls run(cast, ...), where cast(tensor) gives the tensor in the autocast dtype."""

    def for_device(device_type):
        def cast(tensor):
            if tensor is None or tensor.dtype == torch.float64:  # PyTorch's own operators leave float64 alone too
                return tensor
            return tensor.to(torch.get_autocast_dtype(device_type))

        def kernel(*args):
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
                return run(cast, *args)

        return kernel

    _library.impl(name, for_device("cpu"), "AutocastCPU")
    _library.impl(name, for_device("cuda"), "AutocastCUDA")


def _register_autograd(name, tensors, define, differentiate):
    """Runs the kernel and gives it the derivative `differentiate`; forward mode runs the definition.

    Not by torch.library.register_autograd, whose operators drop the tangents of forward mode without a word.

    Args:
        tensors: how many of the arguments are tensors (or None), the first ones.
        define: the operator, made of operators of PyTorch.
        differentiate: (ctx, *gradients) -> gradients of the tensors; ctx has saved_tensors and, as ctx.rest, the rest.
    """
    op, below = getattr(_ops, name).default, torch._C._after_autograd_keyset

    def run(keyset, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & below, *args)

    class Differentiable(Function):
        @staticmethod
        def forward(ctx, keyset, *args):
            ctx.save_for_backward(*args[:tensors])
            ctx.rest = args[tensors:]
            if not torch._C._are_functorch_transforms_active():
                return run(keyset, *args)
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):  # for the outer transforms
                return run(keyset, *args)

        @staticmethod
        def backward(ctx, *grads):
            return None, *differentiate(ctx, *grads), *[None] * len(ctx.rest)

    def kernel(keyset, *args):
        given = [t for t in args[:tensors] if t is not None]
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in given):
            return define(*args)
        if torch.is_grad_enabled() and any(t.requires_grad for t in given):
            if not torch._C._are_functorch_transforms_active():
                return Differentiable.apply(keyset, *args)
            # Function.apply would hand the call to the transforms, which are what called this kernel.
            with enable_single_level_autograd_function():
                return super(Function, Differentiable).apply(keyset, *args)
        return run(keyset, *args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def _register_vmap(name):
    """One call for each sample; any of the tensors may have the mapped dimension."""
    op = getattr(_ops, name).default

    def rule(info, in_dims, *args):
        def sample(i):
            return [a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)]

        results = [op(*sample(i)) for i in range(info.batch_size)]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(r) for r in zip(*results, strict=True)), (0,) * len(results[0])

    torch.library.register_vmap(f"dcnv2_d2::{name}", rule)


@functools.cache
def _warn(device_type):
    reason = _extension.error
    if reason is None:
        reason = f"dcnv2_d2's compiled operators have no kernels for {device_type}"
        if device_type == "cuda":
            reason += "; to build them, run in the project's folder: FORCE_CUDA=1 pip install --no-build-isolation -e ."
    warnings.warn(f"{reason}\nThey run as plain PyTorch now: the same results, but slower.", stacklevel=2)


def _register_fall_back(name, define, laid_out):
    """For devices without a kernel. laid_out: the argument after which the first result is laid out."""

    def kernel(*args):
        _warn(args[0].device.type)
        with torch.no_grad():
            results = define(*args)
        first, *others = results if isinstance(results, tuple) else (results,)
        if first.dim() == 4:  # a gradient may not be wanted
            first = first.contiguous(memory_format=suggest_memory_format(args[laid_out]))
        return (first, *(t.contiguous() for t in others)) if others else first

    _library.impl(name, kernel, "CompositeExplicitAutograd")


def _empty(size, like):
    return like.new_empty(size).to(memory_format=suggest_memory_format(like))


def _empty_gradients(input, others, wanted):
    none = input.new_empty(0)
    rest = [t.new_empty(t.shape) if w and t is not None else none for t, w in zip(others, wanted[1:], strict=True)]
    return _empty(input.shape, input) if wanted[0] else none, *rest


def _given(grads, wanted):
    return (g if w else None for g, w in zip(grads, wanted, strict=True))


# --- deform_conv2d


def _define_conv(*args):
    _checks.check_deform_conv2d(*args)
    return definitions.deform_conv2d(*args)


def _define_conv_backward(grad, input, offset, weight, mask, *rest):
    size = _checks.check_deform_conv2d(input, offset, weight, None, mask, *rest[:-1])
    _checks.check_grad("deform_conv2d", grad, input, size, "[N, O, Ho, Wo]")
    return definitions.deform_conv2d_backward(grad, input, offset, weight, mask, *rest)


def _differentiate_conv(ctx, grad):
    input, offset, weight, _, mask = ctx.saved_tensors
    _, needs_input, needs_offset, needs_weight, needs_bias, needs_mask = ctx.needs_input_grad[:6]
    wanted = [needs_input, needs_offset, needs_weight, needs_mask]
    grads = _ops.deform_conv2d_backward.default(grad, input, offset, weight, mask, *ctx.rest, wanted)
    grad_input, grad_offset, grad_weight, grad_mask = _given(grads, wanted)
    return grad_input, grad_offset, grad_weight, grad.sum((0, 2, 3)) if needs_bias else None, grad_mask


def _differentiate_conv_backward(ctx, *cotangents):
    return definitions.deform_conv2d_double_backward(cotangents, *ctx.saved_tensors, *ctx.rest)


@torch.library.register_fake("dcnv2_d2::deform_conv2d")
def _(input, offset, weight, bias, mask, stride, padding, dilation):
    _checks.check_devices("deform_conv2d", input, offset=offset, weight=weight, bias=bias, mask=mask)
    size = [
        (input.shape[i + 2] + 2 * padding[i] - dilation[i] * (weight.shape[i + 2] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    return _empty((input.shape[0], weight.shape[0], *size), input)


@torch.library.register_fake("dcnv2_d2::deform_conv2d_backward")
def _(grad, input, offset, weight, mask, *rest):
    return _empty_gradients(input, (offset, weight, mask), rest[-1])


_register_autograd("deform_conv2d", 5, _define_conv, _differentiate_conv)
_register_autograd("deform_conv2d_backward", 5, _define_conv_backward, _differentiate_conv_backward)
_register_vmap("deform_conv2d")
_register_vmap("deform_conv2d_backward")
_register_fall_back("deform_conv2d", _define_conv, laid_out=0)
_register_fall_back("deform_conv2d_backward", _define_conv_backward, laid_out=1)
_register_autocast(
    "deform_conv2d",
    # Offset and mask keep their dtype: half precision would lose sub-pixel positions on large maps.
    lambda cast, input, offset, weight, bias, mask, *geometry: _ops.deform_conv2d.default(
        cast(input), offset, cast(weight), cast(bias), mask, *geometry
    ),
)


# --- deform_roi_pool, deform_ps_roi_pool


def _register_roi_pool(name, check, pooled_channels):
    """pooled_channels(input, *geometry): the number of channels of the result."""
    op, backward_op = getattr(_ops, name).default, getattr(_ops, f"{name}_backward").default

    def define(*args):
        check(*args)
        _checks.check_batch_index(name, *args[:2])
        return getattr(definitions, name)(*args)

    def define_backward(grad, *args):
        _checks.check_grad(name, grad, args[0], check(*args[:-1]), "[K, channels, Ph, Pw]")
        _checks.check_batch_index(name, *args[:2])
        return getattr(definitions, f"{name}_backward")(grad, *args)

    def differentiate(ctx, grad):
        _, needs_input, _, needs_offset, needs_mask = ctx.needs_input_grad[:5]
        wanted = [needs_input, needs_offset, needs_mask]
        grads = backward_op(grad, *ctx.saved_tensors, *ctx.rest, wanted)
        grad_input, grad_offset, grad_mask = _given(grads, wanted)
        return grad_input, None, grad_offset, grad_mask

    def differentiate_backward(ctx, *cotangents):
        double_backward = getattr(definitions, f"{name}_double_backward")
        by_grad, by_input, by_offset, by_mask = double_backward(cotangents, *ctx.saved_tensors, *ctx.rest)
        return by_grad, by_input, None, by_offset, by_mask

    def fake(input, boxes, offset, mask, output_size, *geometry):
        _checks.check_devices(name, input, boxes=boxes, offset=offset, mask=mask)
        return _empty((boxes.shape[0], pooled_channels(input, *geometry), *output_size), input)

    def fake_backward(grad, input, boxes, offset, mask, *rest):
        return _empty_gradients(input, (offset, mask), rest[-1])

    torch.library.register_fake(f"dcnv2_d2::{name}", fake)
    torch.library.register_fake(f"dcnv2_d2::{name}_backward", fake_backward)
    _register_autograd(name, 4, define, differentiate)
    _register_autograd(f"{name}_backward", 5, define_backward, differentiate_backward)
    _register_vmap(name)
    _register_vmap(f"{name}_backward")
    _register_fall_back(name, define, laid_out=0)
    _register_fall_back(f"{name}_backward", define_backward, laid_out=1)
    _register_autocast(name, lambda cast, input, *rest: op(cast(input), *rest))


_register_roi_pool("deform_roi_pool", _checks.check_deform_roi_pool, lambda input, *geometry: input.shape[1])
_register_roi_pool(
    "deform_ps_roi_pool",
    _checks.check_deform_ps_roi_pool,
    lambda input, *geometry: input.shape[1] // geometry[-1] ** 2,
)
