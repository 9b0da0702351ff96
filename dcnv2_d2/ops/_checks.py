"""The checks of each operator's arguments; they raise ValueError or TypeError that names the argument."""

import torch

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_devices(op, input, **tensors):
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{op}: {name} must be on the device of input ({input.device}), got {tensor.device}")


def _check_tensors(op, input, same_dtype=(), **tensors):
    """Dense tensors of a floating dtype, on one device; those of `same_dtype` in the dtype of input."""
    check_devices(op, input, **tensors)
    if input.dtype not in _DTYPES:
        raise TypeError(f"{op}: input must be float64, float32, bfloat16 or float16, got {input.dtype}")
    for name, tensor in {"input": input, **tensors}.items():
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} must have a floating-point dtype, got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise ValueError(f"{op}: {name} must be a dense tensor, got one of layout {tensor.layout}")
        if name in same_dtype and tensor.dtype != input.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of input ({input.dtype}), got {tensor.dtype}")


def _check_sizes(op, name, tensor, expected, meaning):
    if tensor is not None and (tensor.dim() != len(expected) or any(a != b for a, b in zip(tensor.shape, expected))):  # noqa: B905
        raise ValueError(f"{op}: {name} must have the shape {list(expected)} ({meaning}), got {list(tensor.shape)}")


def _check_pair(op, name, pair, least):
    if len(pair) != 2 or min(pair) < least:
        bound = f"not below {least}" if least == 0 else f"above {least - 1}"
        raise ValueError(f"{op}: {name} must be two numbers {bound}, got {list(pair)}")


def _check_map(op, input):
    if input.dim() != 4:
        raise ValueError(f"{op}: input must have the shape [N, C, H, W], got {list(input.shape)}")


def check_deform_conv2d(input, offset, weight, bias, mask, stride, padding, dilation):
    """Returns the size of the result, [N, O, Ho, Wo]."""
    op = "deform_conv2d"
    _check_tensors(op, input, ("weight", "bias"), offset=offset, weight=weight, bias=bias, mask=mask)
    _check_map(op, input)
    if weight.dim() != 4 or 0 in weight.shape:
        shape = list(weight.shape)
        raise ValueError(f"{op}: weight must have the shape [O, C / groups, kh, kw], none of them 0, got {shape}")
    _check_pair(op, "stride", stride, 1)
    _check_pair(op, "padding", padding, 0)
    _check_pair(op, "dilation", dilation, 1)
    if max(*stride, *padding, *dilation) >= 2**30:
        given = f"{list(stride)}, {list(padding)} and {list(dilation)}"
        raise ValueError(f"{op}: stride, padding and dilation must be below 2**30, got {given}")
    (n, c, h, w), (o, channels, kh, kw) = input.shape, weight.shape
    if c == 0 or c % channels:
        raise ValueError(f"{op}: input must have a multiple of weight's {channels} channels (C / groups), got {c}")
    if o % (c // channels):
        raise ValueError(f"{op}: weight must have a multiple of {c // channels} output channels (groups), got {o}")
    free = [s + 2 * p - d * (k - 1) - 1 for s, p, d, k in zip((h, w), padding, dilation, (kh, kw), strict=True)]
    if h == 0 or w == 0 or min(free) < 0:
        raise ValueError(
            f"{op}: input of {h} x {w} with padding {list(padding)} must be at least as large as the dilated kernel, "
            f"got a kernel of {kh} x {kw} with dilation {list(dilation)}"
        )
    size = [f // s + 1 for f, s in zip(free, stride, strict=True)]
    taps = kh * kw
    if offset.dim() != 4 or offset.shape[1] == 0 or offset.shape[1] % (2 * taps):
        raise ValueError(
            f"{op}: offset must have the shape [N, 2 * offset_groups * kh * kw, Ho, Wo], a multiple of {2 * taps} "
            f"channels, got {list(offset.shape)}"
        )
    groups = offset.shape[1] // (2 * taps)
    if c % groups:
        raise ValueError(
            f"{op}: offset must have channels for a number of offset groups that divides the {c} channels of input, "
            f"got {offset.shape[1]} channels, which make {groups} offset groups"
        )
    _check_sizes(op, "offset", offset, [n, 2 * groups * taps, *size], "[N, 2 * offset_groups * kh * kw, Ho, Wo]")
    _check_sizes(op, "mask", mask, [n, groups * taps, *size], "[N, offset_groups * kh * kw, Ho, Wo]")
    _check_sizes(op, "bias", bias, [o], "[O]")
    return [n, o, *size]


def _check_roi_pool(op, input, boxes, offset, mask, output_size, spatial_scale):
    _check_tensors(op, input, boxes=boxes, offset=offset, mask=mask)
    _check_map(op, input)
    if boxes.dim() != 2 or boxes.shape[1] != 5:
        raise ValueError(
            f"{op}: boxes must have the shape [K, 5] (batch index, x1, y1, x2, y2), got {list(boxes.shape)}"
        )
    if input.shape[2] * input.shape[3] == 0 and boxes.shape[0] != 0:
        raise ValueError(f"{op}: input must have pixels to pool from, got {list(input.shape)}")
    _check_pair(op, "output_size", output_size, 1)
    if not spatial_scale > 0:
        raise ValueError(f"{op}: spatial_scale must be above 0, got {spatial_scale}")


def _check_pool_mask(op, boxes, mask, output_size):
    _check_sizes(op, "mask", mask, [boxes.shape[0], 1, *output_size], "[K, 1, Ph, Pw]")


def check_deform_roi_pool(input, boxes, offset, mask, output_size, spatial_scale, sampling_ratio, gamma):
    """Returns the size of the result, [K, C, Ph, Pw]."""
    op = "deform_roi_pool"
    _check_roi_pool(op, input, boxes, offset, mask, output_size, spatial_scale)
    _check_sizes(op, "offset", offset, [boxes.shape[0], 2, *output_size], "[K, 2, Ph, Pw]")
    _check_pool_mask(op, boxes, mask, output_size)
    return [boxes.shape[0], input.shape[1], *output_size]


def check_deform_ps_roi_pool(input, boxes, offset, mask, output_size, spatial_scale, sampling_ratio, gamma, group_size):
    """Returns the size of the result, [K, C / group_size**2, Ph, Pw]."""
    op = "deform_ps_roi_pool"
    _check_roi_pool(op, input, boxes, offset, mask, output_size, spatial_scale)
    if sampling_ratio <= 0:
        raise ValueError(f"{op}: sampling_ratio must be above 0, got {sampling_ratio}")
    if group_size <= 0:
        raise ValueError(f"{op}: group_size must be above 0, got {group_size}")
    channels, groups, k = input.shape[1], group_size**2, boxes.shape[0]
    if channels % groups:
        raise ValueError(f"{op}: input must have a multiple of group_size**2 = {groups} channels, got {channels}")
    if offset is not None:
        if offset.dim() != 4 or offset.shape[0] != k or 0 in offset.shape[1:] or offset.shape[1] % 2:
            raise ValueError(f"{op}: offset must have the shape [{k}, 2 * classes, Qh, Qw], got {list(offset.shape)}")
        classes = offset.shape[1] // 2
        if channels // groups % classes:
            raise ValueError(
                f"{op}: offset must have channels for a number of classes that divides the {channels // groups} "
                f"channels of the result, got {offset.shape[1]} channels, which make {classes} classes"
            )
    _check_pool_mask(op, boxes, mask, output_size)
    return [k, channels // groups, *output_size]


def check_batch_index(op, input, boxes):
    """Each box must be of an image that is there; on the CPU only, where to look costs little."""
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(boxes):
        boxes = functorch.get_unwrapped(boxes)
    if boxes.device.type != "cpu" or functorch.is_batchedtensor(boxes):
        return
    index = boxes[:, 0]
    wrong = ~((index >= 0) & (index < input.shape[0]))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{op}: boxes must have a batch index from 0 to {input.shape[0] - 1} in their first column, "
            f"got {index[row].item()} in row {row}"
        )


def check_grad(op, grad, input, size, meaning):
    _check_tensors(op, input, ("grad",), grad=grad)
    _check_sizes(op, "grad", grad, size, meaning)
