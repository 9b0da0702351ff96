"""Slow float64 definitions of deformable position-sensitive RoI pooling. They share no code with the kernels.

x1 = round(box x1) * spatial_scale - 0.5;  rw = max((round(box x2) + 1) * spatial_scale - 0.5 - x1, 0.1);  y likewise
X = x1 + gamma * rw * offset[k, 2 * l, qh, qw] + pw * rw / Pw + ix * rw / Pw / S;  Y with rh and offset[k, 2 * l + 1]
counted: -0.5 <= Y <= H - 0.5 and -0.5 <= X <= W - 0.5;  n = how many samples of the bin are
out[k, c, ph, pw] = mask[k, 0, ph, pw] / n * sum over those of bilinear(input[b, (c * G + gh) * G + gw], Y, X), or 0
bilinear: Y clamped into [0, H - 1], X into [0, W - 1]
gh = floor(ph * G / Ph);  qh = floor(ph / Ph * Qh);  likewise w;  class l = floor(c / (C' / classes))
round: halves away from zero
"""

import math

import torch
from torch.nn.modules.utils import _pair
from torchvision.ops import roi_align

from .reference import TOLERANCE, assert_all_near, run


def round_away(value):
    return math.copysign(math.floor(abs(value) + 0.5), value) if math.isfinite(value) else value


def _side(low, high, spatial_scale):
    low = round_away(low) * spatial_scale - 0.5
    size = (round_away(high) + 1) * spatial_scale - 0.5 - low
    return low, 0.1 if size < 0.1 else size


def sampling_points(box, offset, output_size, spatial_scale, sampling_ratio, gamma):
    """Y, X (Tensor[classes, Ph, Pw, S]) of a box (four numbers) with its offset (Tensor[2 * classes, Qh, Qw])."""
    (ph, pw), s = _pair(output_size), sampling_ratio
    rows = [int(i * offset.shape[1] // ph) for i in range(ph)]
    columns = [int(j * offset.shape[2] // pw) for j in range(pw)]
    per_bin = offset.double()[:, rows][:, :, columns]
    x1, rw = _side(box[0], box[2], spatial_scale)
    y1, rh = _side(box[1], box[3], spatial_scale)

    def count(n, dims):
        return torch.arange(n, dtype=torch.float64, device=offset.device)[(slice(None), *(None,) * dims)]

    y = y1 + gamma * rh * per_bin[1::2, ..., None] + count(ph, 2) * rh / ph + count(s, 0) * rh / ph / s
    x = x1 + gamma * rw * per_bin[0::2, ..., None] + count(pw, 1) * rw / pw + count(s, 0) * rw / pw / s
    return y, x


def _neighbours(position, size):
    """((index, weight) of the low pixel, of the high one); clamped, with derivative 0 there."""
    position = position.nan_to_num(0, 0, 0)
    position = torch.where(position > 0, position, 0.0).clamp(max=size - 1)  # at 0 it counts as clamped
    low = position.detach().floor()
    near = position - low
    return (low.long(), 1 - near), ((low + 1).clamp(max=size - 1).long(), near)


def _groups(output_size, group_size, device):
    """Which of the G * G input channels of an output channel serves each bin (Tensor[Ph, Pw])."""
    ph, pw = (torch.arange(n, device=device) * group_size // n for n in _pair(output_size))
    return ph[:, None] * group_size + pw


def _no_offset(boxes, output_size, device):
    return torch.zeros(len(boxes), 2, *_pair(output_size), dtype=torch.float64, device=device)


def deform_ps_roi_pool(
    input, boxes, offset, output_size, spatial_scale=1.0, sampling_ratio=4, gamma=0.1, group_size=1, mask=None
):
    """The definition, box by box and sample by sample; boxes Tensor[K, 5]. Returns float64, derivatives by autograd."""
    (ph, pw), (h, w), device = _pair(output_size), input.shape[-2:], input.device
    shifts = _no_offset(boxes, output_size, device) if offset is None else offset.double()
    classes, channels = shifts.shape[1] // 2, input.shape[1] // group_size**2
    planes = input.double().view(len(input), classes, channels // classes, group_size**2, h, w)
    of_class = torch.arange(classes, device=device).view(classes, 1, 1, 1, 1)
    of_group = _groups(output_size, group_size, device).view(ph, pw, 1, 1)
    # Not a sample, but an input without samples still has a gradient: zeros.
    nothing = sum(t[:0].double().sum() for t in (input, offset, mask) if t is not None)
    pooled = [torch.zeros(0, channels, ph, pw, dtype=torch.float64, device=device)]
    for k, (image, *box) in enumerate(boxes.tolist()):
        sides = (*_side(box[0], box[2], spatial_scale), *_side(box[1], box[3], spatial_scale))
        if not all(map(math.isfinite, sides)):  # every sample would be at inf or NaN, which is outside any map
            pooled.append(pooled[0].new_zeros(1, channels, ph, pw))
            continue
        y, x = sampling_points(box, shifts[k], output_size, spatial_scale, sampling_ratio, gamma)
        counted = ((y >= -0.5) & (y <= h - 0.5))[..., :, None] & ((x >= -0.5) & (x <= w - 0.5))[..., None, :]
        total = torch.zeros(classes, ph, pw, channels // classes, dtype=torch.float64, device=device)
        for row, weight_y in _neighbours(y, h):
            for column, weight_x in _neighbours(x, w):
                pixels = planes[int(image)][of_class, :, of_group, row[..., :, None], column[..., None, :]]
                weight = torch.where(counted, weight_y[..., :, None] * weight_x[..., None, :], 0.0)
                total = total + torch.where(counted[..., None], pixels * weight[..., None], 0.0).sum((-3, -2))
        mean = total / counted.sum((-2, -1)).clamp(min=1)[..., None]
        pooled.append(mean.permute(0, 3, 1, 2).reshape(1, channels, ph, pw))
    out = torch.cat(pooled) + nothing
    return out if mask is None else out * mask.double()


def shifted_roi_align(
    input, boxes, offset, output_size, spatial_scale=1.0, sampling_ratio=4, gamma=0.1, group_size=1, mask=None
):
    """Torchvision's: with every sample inside the map, a bin is that of roi_align on a box of its own.

    That box has the size of the RoI and is moved by the bin's offset, and by half a step to the left and up, because
    samples lie in the corner of their cell, not in its middle. Not differentiable by offset.
    """
    (ph, pw), k, device = _pair(output_size), len(boxes), input.device
    shifts = _no_offset(boxes, output_size, device) if offset is None else offset.detach().double()
    classes, channels = shifts.shape[1] // 2, input.shape[1] // group_size**2
    rois = torch.empty(k, classes, ph, pw, 5, dtype=torch.float64, device=device)
    for i, (image, *box) in enumerate(boxes.tolist()):
        y, x = sampling_points(box, shifts[i], output_size, spatial_scale, sampling_ratio, gamma)
        assert y.min() > 0 and y.max() < input.shape[2] - 1 and x.min() > 0 and x.max() < input.shape[3] - 1
        for axis, (low, high, points, dim, bins) in enumerate([(box[0], box[2], x, 2, pw), (box[1], box[3], y, 1, ph)]):
            size = _side(low, high, spatial_scale)[1]
            number = torch.arange(bins, dtype=torch.float64, device=device).view(
                [bins if d == dim else 1 for d in range(3)]
            )
            begin = points[..., 0] - number * size / bins - size / bins / sampling_ratio / 2
            rois[i, ..., 1 + axis] = (begin + 0.5) / spatial_scale
            rois[i, ..., 3 + axis] = (begin + size + 0.5) / spatial_scale
        rois[i, ..., 0] = image
    pooled = roi_align(input.double(), rois.view(-1, 5), (ph, pw), spatial_scale, sampling_ratio, aligned=True)
    own = pooled.view(k, classes, ph * pw, input.shape[1], ph * pw).diagonal(dim1=2, dim2=4)  # [K, classes, C, bins]
    own = own.reshape(k, classes, classes, channels // classes, group_size**2, ph * pw).diagonal(dim1=1, dim2=2)
    own = own.permute(0, 4, 1, 2, 3).reshape(k, channels, group_size**2, ph * pw)
    group = _groups(output_size, group_size, device).view(1, 1, 1, ph * pw).expand(k, channels, 1, -1)
    out = own.gather(2, group).view(k, channels, ph, pw)
    return out if mask is None else out * mask.double()


def offset_differences(op, tensors, geometry, grad_output, step=1e-5):
    """The gradient by offset from central differences of op, one element at a time of every box at once."""
    gradient = torch.zeros_like(tensors["offset"], dtype=torch.float64)
    for index in range(gradient[0].numel()):
        change = 0.0
        for sign in (1, -1):
            moved = tensors["offset"].double().clone()
            moved.flatten(1)[:, index] += sign * step
            change = change + sign * op(**{**tensors, "offset": moved}, **geometry)
        gradient.flatten(1)[:, index] = (grad_output * change).sum((1, 2, 3)) / (2 * step)
    return gradient


def _touches_a_jump(points, size, offset):
    """Whether a sample lies where values jump, or, of use for derivatives only, at a whole pixel."""
    margin = 0.003
    jump = ((points + 0.5).abs() < margin) | ((points - size + 0.5).abs() < margin)
    return bool((jump | (offset & ((points - points.round()).abs() < margin))).any())


def deform_ps_roi_pool_inputs(
    n=2, c=4, h=11, w=13, k=6, output_size=(3, 5), spatial_scale=0.37, sampling_ratio=3, gamma=0.1, group_size=1,
    classes=1, parts=None, reach=2.0, inside=False, offset=True, mask=True, boxes=None, dtype=torch.float64,
    offset_dtype=None, boxes_dtype=None, margin=True, device="cpu",
):  # fmt: skip
    """Random (tensors, geometry) for op(**tensors, **geometry); the boxes are in geometry, having no gradient.

    `c` counts the channels of the result. Boxes reach over the border, or, with `inside`, keep all samples off it. No
    sample is where values or derivatives jump, unless margin is False. Given boxes (rows of five) stay as they are.
    """
    ph, pw = _pair(output_size)
    qh, qw = _pair(parts or output_size)
    offset_dtype, boxes_dtype = offset_dtype or dtype, boxes_dtype or dtype
    size = torch.tensor([w, h], dtype=torch.float64) / spatial_scale

    def random_box():
        center, extent = (torch.rand(2) * 1.2 - 0.1) * size, (torch.rand(2) * 0.9 + 0.1) * size
        if inside:
            center, extent = (torch.rand(2) * 0.2 + 0.4) * size, (torch.rand(2) * 0.3 + 0.05) * size
        return torch.cat([torch.randint(n, (1,)), center - extent / 2, center + extent / 2]).to(boxes_dtype)

    rows, shifts = [], []
    for i in range(k if boxes is None else len(boxes)):
        for _ in range(3000):
            box = random_box() if boxes is None else torch.tensor(boxes[i], dtype=boxes_dtype)
            shift = (torch.randn(2 * classes, qh, qw) * (0.3 if inside else reach) * offset).to(offset_dtype)
            y, x = sampling_points(
                box[1:].tolist(), shift if offset else torch.zeros(2, ph, pw), output_size, spatial_scale,
                sampling_ratio, gamma,
            )  # fmt: skip
            good = not (_touches_a_jump(y, h, offset) or _touches_a_jump(x, w, offset))
            within = y.min() > 0 and y.max() < h - 1 and x.min() > 0 and x.max() < w - 1
            if not margin or (good and (within or not inside)):
                break
        else:
            raise AssertionError(f"box {i} has a sample where values or derivatives jump whatever is drawn")
        rows.append(box)
        shifts.append(shift)
    shifts = torch.stack(shifts) if shifts else torch.zeros(0, 2 * classes, qh, qw, dtype=offset_dtype)
    boxes = torch.stack(rows) if rows else torch.zeros(0, 5, dtype=boxes_dtype)
    tensors = {
        "input": torch.randn(n, c * group_size**2, h, w).to(device, dtype),
        "offset": shifts.to(device) if offset else None,
        "mask": torch.rand(len(rows), 1, ph, pw).to(device, offset_dtype) if mask else None,
    }
    geometry = {
        "boxes": boxes.to(device), "output_size": output_size, "spatial_scale": spatial_scale,
        "sampling_ratio": sampling_ratio, "gamma": gamma, "group_size": group_size,
    }  # fmt: skip
    return tensors, geometry


def random_grad(tensors, geometry):
    channels = tensors["input"].shape[1] // geometry["group_size"] ** 2
    size = (len(geometry["boxes"]), channels, *_pair(geometry["output_size"]))
    return torch.randn(size, device=tensors["input"].device).to(tensors["input"])


def check(op, tensors, geometry, tolerance=None):
    """Output and all gradients of op against the definition in float64, evaluated on the same rounded values."""
    grad = random_grad(tensors, geometry)
    doubles = {k: t if t is None else t.double() for k, t in tensors.items()}
    expected = run(deform_ps_roi_pool, doubles, geometry, grad)
    assert_all_near(run(op, tensors, geometry, grad), expected, tolerance or TOLERANCE[grad.dtype])
