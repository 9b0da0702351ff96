"""Slow float64 definitions of deformable RoI pooling, written from its formula. They share no code with the kernels.

x1, y1, x2, y2 = box * spatial_scale - 0.5;  rw = x2 - x1;  rh = y2 - y1
gh = S if S > 0 else ceil(rh / Ph);  gw likewise;  n = max(gh * gw, 1)
Y = y1 + gamma * rh * offset[k, 1, ph, pw] + ph * rh / Ph + (iy + 0.5) * rh / Ph / gh;  X with rw and offset[k, 0]
out[k, :, ph, pw] = mask[k, 0, ph, pw] / n * sum over iy < gh, ix < gw of bilinear(input[b], Y, X)
bilinear: 0 if Y < -1 or Y > H (or X), otherwise Y clamped into [0, H - 1] and X into [0, W - 1]
"""

import math

import torch
from torch.nn.modules.utils import _pair
from torchvision.ops import roi_align

from .reference import TOLERANCE, assert_all_near, run


def _axis_points(low, high, offset, bins, dim, sampling_ratio, gamma):
    """Positions along one axis (Tensor[Ph, Pw, g]), bins being numbered along dim 0 (y) or 1 (x) of offset [Ph, Pw]."""
    size = high - low
    if not math.isfinite(size):
        return offset[..., None][..., :0]  # every sample would be at inf or NaN, which is outside any map
    grid = sampling_ratio if sampling_ratio > 0 else max(math.ceil(size / bins), 0)
    number = torch.arange(bins, dtype=torch.float64, device=offset.device)
    number = number[:, None] if dim == 0 else number
    within = (torch.arange(grid, dtype=torch.float64, device=offset.device) + 0.5) / max(grid, 1)
    return low + (gamma * size * offset + number * (size / bins))[..., None] + within * (size / bins)


def sampling_points(box, offset, output_size, spatial_scale, sampling_ratio, gamma):
    """Y (Tensor[Ph, Pw, gh]) and X (Tensor[Ph, Pw, gw]) of a box (four numbers) with its offset (Tensor[2, Ph, Pw])."""
    ph, pw = _pair(output_size)
    x1, y1, x2, y2 = (v * spatial_scale - 0.5 for v in box)
    y = _axis_points(y1, y2, offset[1], ph, 0, sampling_ratio, gamma)
    return y, _axis_points(x1, x2, offset[0], pw, 1, sampling_ratio, gamma)


def _neighbours(position, size):
    """(index, weight, inside) for the two pixels beside each position; derivatives are 0 where clamped or outside."""
    inside = (position >= -1) & (position <= size)
    position = torch.where(inside & (position > 0), position, 0.0).clamp(max=size - 1)  # at 0 it counts as clamped
    low = position.detach().floor()
    near = position - low
    return (low.long(), 1 - near, inside), ((low + 1).clamp(max=size - 1).long(), near, inside)


def deform_roi_pool(input, boxes, offset, output_size, spatial_scale=1.0, sampling_ratio=-1, gamma=0.1, mask=None):
    """The definition, box by box and sample by sample; boxes Tensor[K, 5]. Returns float64, derivatives by autograd."""
    (ph, pw), (h, w), c = _pair(output_size), input.shape[-2:], input.shape[1]
    shifts = torch.zeros(len(boxes), 2, ph, pw, device=input.device) if offset is None else offset
    shifts = shifts.double()
    # Not a sample, but an input without samples still has a gradient: zeros.
    nothing = sum(t[:0].double().sum() for t in (input, offset, mask) if t is not None)
    out = torch.zeros(len(boxes), c, ph, pw, dtype=torch.float64, device=input.device) + nothing
    pooled = []
    for k, (image, *box) in enumerate(boxes.tolist()):
        y, x = sampling_points(box, shifts[k], output_size, spatial_scale, sampling_ratio, gamma)
        total = out[k]
        for row, weight_y, inside_y in _neighbours(y, h):
            for column, weight_x, inside_x in _neighbours(x, w):
                pixels = input[int(image)].double()[:, row[..., :, None], column[..., None, :]]
                pixels = torch.where(inside_y[..., :, None] & inside_x[..., None, :], pixels, 0.0)
                total = total + (pixels * weight_y[..., :, None] * weight_x[..., None, :]).sum((-2, -1))
        pooled.append(total / max(y.shape[-1] * x.shape[-1], 1))
    out = torch.stack(pooled) if pooled else out
    return out if mask is None else out * mask.double()


def shifted_roi_align(input, boxes, offset, output_size, spatial_scale=1.0, sampling_ratio=-1, gamma=0.1, mask=None):
    """Torchvision's: bin (ph, pw) is that bin of roi_align on the box translated by gamma * (w * dx, h * dy).

    Differentiable by input and mask only. A box inverted along one axis only is beyond roi_align's adaptive grid.
    """
    (ph, pw), k, c = _pair(output_size), len(boxes), input.shape[1]
    rois = boxes.double()[:, None, None].repeat(1, ph, pw, 1)
    if offset is not None:
        size = boxes.double()[:, 3:] - boxes.double()[:, 1:3]
        rois[..., 1:] += (gamma * size[:, :, None, None] * offset.detach().double()).movedim(1, -1).repeat(1, 1, 1, 2)
    rois = rois.reshape(-1, 5)
    pooled = roi_align(input.double(), rois, (ph, pw), spatial_scale, sampling_ratio, aligned=True)
    own = pooled.view(k, ph * pw, c, ph * pw).diagonal(dim1=1, dim2=3).reshape(k, c, ph, pw)
    return own if mask is None else own * mask.double()


def offset_differences(op, tensors, geometry, grad_output, step=1e-4):
    """The gradient by offset from central differences of op: exact where no sample is within a step of a whole pixel.

    A bin depends on its own offset only, so two evaluations per axis are enough.
    """
    gradient = torch.empty_like(tensors["offset"], dtype=torch.float64)
    for axis in range(2):
        up, down = tensors["offset"].double().clone(), tensors["offset"].double().clone()
        up[:, axis] += step
        down[:, axis] -= step
        change = op(**{**tensors, "offset": up}, **geometry) - op(**{**tensors, "offset": down}, **geometry)
        gradient[:, axis] = (grad_output * change).sum(1) / (2 * step)
    return gradient


def run_shifted_roi_align(tensors, geometry, grad_output):
    """reference.run for shifted_roi_align, with the gradient by offset from differences."""
    result = run(shifted_roi_align, tensors, geometry, grad_output)
    if tensors["offset"] is not None:
        result["offset"] = offset_differences(shifted_roi_align, tensors, geometry, grad_output.double())
    return result


def _too_near(points, margin):
    """Which bins (Tensor[Ph, Pw]) have a sample within margin of a whole pixel: of a jump of the derivative."""
    return ((points - points.round()).abs() < margin).any(-1)


def deform_roi_pool_inputs(
    n=2, c=8, h=11, w=13, k=6, output_size=(3, 5), spatial_scale=0.5, sampling_ratio=2, gamma=0.1, reach=3.0,
    offset=True, mask=True, boxes=None, dtype=torch.float64, offset_dtype=None, boxes_dtype=None, margin=0.005,
    device="cpu",
):  # fmt: skip
    """Random (tensors, geometry) for op(**tensors, **geometry); the boxes are in geometry, having no gradient.

    Boxes reach over the border, and offsets about `reach` * gamma of a box farther. No sample is within `margin` of a
    whole pixel, where derivatives and, at the border, values jump. Given boxes (rows of five) stay as they are.
    """
    ph, pw = _pair(output_size)
    offset_dtype, boxes_dtype = offset_dtype or dtype, boxes_dtype or dtype
    size = torch.tensor([w, h], dtype=torch.float64) / spatial_scale

    def random_boxes():
        center, extent = (torch.rand(k, 2) * 1.2 - 0.1) * size, (torch.rand(k, 2) * 0.9 + 0.1) * size
        image = torch.randint(n, (k, 1))
        return torch.cat([image, center - extent / 2, center + extent / 2], 1).to(boxes_dtype)

    given = boxes is not None
    boxes = torch.tensor(boxes, dtype=boxes_dtype).view(-1, 5) if given else random_boxes()
    k = len(boxes)
    shifts = (torch.randn(k, 2, ph, pw) * reach if offset else torch.zeros(k, 2, ph, pw)).to(offset_dtype)
    pending = list(range(k)) if margin else []
    for _ in range(200):
        fresh_boxes = boxes if given else random_boxes()
        fresh_shifts = (torch.randn(k, 2, ph, pw) * reach).to(shifts)
        near = {}
        for i in pending:
            y, x = sampling_points(
                boxes[i, 1:].tolist(), shifts[i].double(), output_size, spatial_scale, sampling_ratio, gamma
            )
            near[i] = torch.stack([_too_near(x, margin), _too_near(y, margin)])
            if offset:
                shifts[i] = torch.where(near[i], fresh_shifts[i], shifts[i])
            elif near[i].any():
                boxes[i] = fresh_boxes[i]
        pending = [i for i in pending if near[i].any()]
        if not pending:
            break
    assert not pending, f"boxes {pending} have a sample at a whole pixel whatever the offset"
    tensors = {
        "input": torch.randn(n, c, h, w).to(device, dtype),
        "offset": shifts.to(device) if offset else None,
        "mask": torch.rand(k, 1, ph, pw).to(device, offset_dtype) if mask else None,
    }
    geometry = {"boxes": boxes.to(device), "output_size": output_size, "spatial_scale": spatial_scale}
    return tensors, {**geometry, "sampling_ratio": sampling_ratio, "gamma": gamma}


def random_grad(tensors, geometry):
    size = (len(geometry["boxes"]), tensors["input"].shape[1], *_pair(geometry["output_size"]))
    return torch.randn(size, device=tensors["input"].device).to(tensors["input"])


def check(op, tensors, geometry, tolerance=None):
    """Output and all gradients of op against the definition in float64, evaluated on the same rounded values."""
    grad = random_grad(tensors, geometry)
    doubles = {k: t if t is None else t.double() for k, t in tensors.items()}
    expected = run(deform_roi_pool, doubles, geometry, grad)
    assert_all_near(run(op, tensors, geometry, grad), expected, tolerance or TOLERANCE[grad.dtype])
