"""What PyTorch must know of each operator beside its kernels: shapes alone (fake), derivatives, autocast."""

import torch

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


def _check_devices(name, input, **others):
    """Kernels check their own tensors; a lone meta tensor, or one of another device while tracing, ends up here."""
    for argument, tensor in others.items():
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{name}: {argument} must be on the device of input ({input.device}), got {tensor.device}")


def _refuse_double_backward(name):
    def backward(ctx, *grads):
        raise RuntimeError(f"{name} cannot be differentiated twice (double backward): its backward has no derivative")

    return backward


# --- deform_conv2d


@torch.library.register_fake("dcnv2_d2::deform_conv2d")
def _(input, offset, weight, bias, mask, stride, padding, dilation):
    _check_devices("deform_conv2d", input, offset=offset, weight=weight, bias=bias, mask=mask)
    size = [
        (input.shape[i + 2] + 2 * padding[i] - dilation[i] * (weight.shape[i + 2] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    output = input.new_empty((input.shape[0], weight.shape[0], *size))
    return output.to(memory_format=torch._prims_common.suggest_memory_format(input))


@torch.library.register_fake("dcnv2_d2::deform_conv2d_backward")
def _(grad, input, offset, weight, mask, stride, padding, dilation, wanted):
    layout = torch._prims_common.suggest_memory_format(input)
    return (
        input.new_empty(input.shape).to(memory_format=layout) if wanted[0] else input.new_empty(0),
        offset.new_empty(offset.shape) if wanted[1] else input.new_empty(0),
        weight.new_empty(weight.shape) if wanted[2] else input.new_empty(0),
        mask.new_empty(mask.shape) if wanted[3] and mask is not None else input.new_empty(0),
    )


def _save_deform_conv2d(ctx, inputs, output):
    input, offset, weight, bias, mask, *ctx.geometry = inputs
    ctx.save_for_backward(input, offset, weight, mask)


def _deform_conv2d_backward(ctx, grad):
    input, offset, weight, mask = ctx.saved_tensors
    needs_input, needs_offset, needs_weight, needs_bias, needs_mask = ctx.needs_input_grad[:5]
    wanted = [needs_input, needs_offset, needs_weight, needs_mask]
    grads = _ops.deform_conv2d_backward(grad, input, offset, weight, mask, *ctx.geometry, wanted)
    grad_input, grad_offset, grad_weight, grad_mask = (g if w else None for g, w in zip(grads, wanted, strict=True))
    grad_bias = grad.sum((0, 2, 3)) if needs_bias else None
    return grad_input, grad_offset, grad_weight, grad_bias, grad_mask, None, None, None


torch.library.register_autograd("dcnv2_d2::deform_conv2d", _deform_conv2d_backward, setup_context=_save_deform_conv2d)
torch.library.register_autograd("dcnv2_d2::deform_conv2d_backward", _refuse_double_backward("deform_conv2d"))
_register_autocast(
    "deform_conv2d",
    # Offset and mask keep their dtype: half precision would lose sub-pixel positions on large maps.
    lambda cast, input, offset, weight, bias, mask, *geometry: _ops.deform_conv2d(
        cast(input), offset, cast(weight), cast(bias), mask, *geometry
    ),
)


# --- deform_roi_pool, deform_ps_roi_pool


def _register_roi_pool(name, pooled_channels):
    """pooled_channels(input, *geometry): the number of channels of the result."""
    op, backward_op = getattr(_ops, name), getattr(_ops, f"{name}_backward")

    def fake(input, boxes, offset, mask, output_size, *geometry):
        _check_devices(name, input, boxes=boxes, offset=offset, mask=mask)
        output = input.new_empty((boxes.shape[0], pooled_channels(input, *geometry), *output_size))
        return output.to(memory_format=torch._prims_common.suggest_memory_format(input))

    def fake_backward(grad, input, boxes, offset, mask, *geometry_and_wanted):
        wanted = geometry_and_wanted[-1]
        layout = torch._prims_common.suggest_memory_format(input)
        return (
            input.new_empty(input.shape).to(memory_format=layout) if wanted[0] else input.new_empty(0),
            offset.new_empty(offset.shape) if wanted[1] and offset is not None else input.new_empty(0),
            mask.new_empty(mask.shape) if wanted[2] and mask is not None else input.new_empty(0),
        )

    def save(ctx, inputs, output):
        input, boxes, offset, mask, *ctx.geometry = inputs
        ctx.save_for_backward(input, boxes, offset, mask)

    def backward(ctx, grad):
        needs_input, _, needs_offset, needs_mask = ctx.needs_input_grad[:4]
        wanted = [needs_input, needs_offset, needs_mask]
        grads = backward_op(grad, *ctx.saved_tensors, *ctx.geometry, wanted)
        grad_input, grad_offset, grad_mask = (g if w else None for g, w in zip(grads, wanted, strict=True))
        return grad_input, None, grad_offset, grad_mask, *(None for _ in ctx.geometry)

    torch.library.register_fake(f"dcnv2_d2::{name}", fake)
    torch.library.register_fake(f"dcnv2_d2::{name}_backward", fake_backward)
    torch.library.register_autograd(f"dcnv2_d2::{name}", backward, setup_context=save)
    torch.library.register_autograd(f"dcnv2_d2::{name}_backward", _refuse_double_backward(name))
    _register_autocast(name, lambda cast, input, *rest: op(cast(input), *rest))


_register_roi_pool("deform_roi_pool", lambda input, *geometry: input.shape[1])
_register_roi_pool("deform_ps_roi_pool", lambda input, *geometry: input.shape[1] // geometry[-1] ** 2)
