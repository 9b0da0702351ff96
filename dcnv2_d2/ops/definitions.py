"""The operators in plain PyTorch: slower than the kernels, as exact, on any device, differentiable any number of times.

They run where there is no kernel, in forward mode, and for derivatives of the second order and above. The functions
take and give what torch.ops.dcnv2_d2.* of their names do, and make no checks.

A map is laid out as rows of channels, one a pixel, with a last row of zeros for what lies outside. All that touches it
is linear in rows and weights: gathering rows by weight, scattering to them, dot products with them. Work goes in
chunks, so that memory beyond the results is bounded.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

_aten = torch.ops.aten
CHUNK = 2**24  # elements


def _is_recorded() -> bool:
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


# --- Samples. `index`, `weight` [M, 4]: the rows of the four neighbours of each, and their weights. Samples are summed
# in bags; `bag` [M], ascending, says which; None: each is one of its own.


def _gather(rows, index):
    return F.embedding(index, rows)  # whose derivative is a better one than indexing has


def _scatter(values, index, count):
    """Sums of those values [M, C] that have the same index [M] -> Tensor[count, C]"""
    if len(index) == 0:  # whose derivative the other has not
        return values.new_zeros(count, values.shape[1]).index_add(0, index, values)
    return _aten.embedding_dense_backward(values, index, count, -1, False)


def _embedding_bags(index, bag, bags):
    """As PyTorch's embedding bags want them: the indices, where each bag begins, the bag of each index."""
    every, step = torch.arange(bags, device=index.device), index.shape[1]
    starts = every if bag is None else torch.searchsorted(bag, every)
    return index.flatten(), starts * step, (every if bag is None else bag).repeat_interleave(step)


def _use_embedding_bags(rows):
    """They make no copy of the samples, but PyTorch cannot differentiate them twice, nor has them on every device."""
    return rows.device.type == "cpu" and not _is_recorded()


def _gather_samples(rows, index, weight, bag, bags):
    """rows [P, C] -> Tensor[bags, C]"""
    if _use_embedding_bags(rows):
        indices, starts, _ = _embedding_bags(index, bag, bags)
        return F.embedding_bag(indices, rows, starts, mode="sum", per_sample_weights=weight.flatten())
    samples = (weight.unsqueeze(1) @ _gather(rows, index)).squeeze(1)
    return samples if bag is None else _scatter(samples, bag, bags)


def _scatter_samples(values, index, weight, bag, count):
    """values [bags, C] -> Tensor[count, C]"""
    if _use_embedding_bags(values):
        indices, starts, of_index = _embedding_bags(index, bag, len(values))
        sizes = torch.bincount(of_index, minlength=len(values))
        return _aten._embedding_bag_dense_backward(
            values, indices, of_index, sizes, starts, count, False, 0, weight.flatten()
        )
    samples = values if bag is None else _gather(values, bag)
    return _scatter((weight.unsqueeze(2) * samples.unsqueeze(1)).flatten(0, 1), index.flatten(), count)


def _dot_samples(rows, index, values, bag):
    """Products of values [bags, C] with each neighbour of their samples -> Tensor[M, 4]"""
    if _use_embedding_bags(rows):
        indices, starts, of_index = _embedding_bags(index, bag, len(values))
        return _aten._embedding_bag_per_sample_weights_backward(values, rows, indices, starts, of_index, 0).view_as(
            index
        )
    samples = values if bag is None else _gather(values, bag)
    return (_gather(rows, index) @ samples.unsqueeze(2)).squeeze(2)


def _weights(ly, lx):
    """Of the neighbours: (y low, x low), (y low, x high), (y high, x low), (y high, x high)"""
    return torch.stack([(1 - ly) * (1 - lx), (1 - ly) * lx, ly * (1 - lx), ly * lx], -1)


def _slopes(ly, lx, dots):
    """Derivatives of (weights * dots).sum(-1) by y and by x"""
    d0, d1, d2, d3 = dots.unbind(-1)
    return (1 - lx) * (d2 - d0) + lx * (d3 - d1), (1 - ly) * (d1 - d0) + ly * (d3 - d2)


# --- Rows and chunks


def _sum_type(input):
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _cast(dtype, *tensors):
    return [None if t is None else t.to(dtype) for t in tensors]


def _rows(map, classes, groups=1):
    """Tensor[N, C, H, W], C counting (class, channel, group) -> rows [N * H * W * groups * classes + 1, channels]"""
    n, c, h, w = map.shape
    channels = c // groups // classes
    rows = map.reshape(n, classes, channels, groups, h, w).permute(0, 4, 5, 3, 1, 2)
    return F.pad(rows.reshape(n * h * w * groups * classes, channels), (0, 0, 0, 1))


def _from_rows(rows, shape, classes, groups=1):
    n, c, h, w = shape
    rows = rows[:-1].reshape(n, h, w, groups, classes, c // groups // classes)
    return rows.permute(0, 4, 5, 3, 1, 2).reshape(shape)


def _most() -> int:
    """Elements of the columns at a time. What is recorded holds several of their size."""
    return CHUNK // 4 if _is_recorded() else CHUNK


def _slices(count, cost, most):
    """Slices of 0 .. count - 1, of members that cost so many elements each; one at least."""
    step = max(most // max(cost, 1), 1)
    return [slice(i, min(i + step, count)) for i in range(0, max(count, 1), step)]


def _add(total, values):
    return values if total is None else [a + b for a, b in zip(total, values, strict=True)]


def _cat(parts, dim=0):
    """Parts, each a list of tensors -> the list of the whole tensors"""
    return [torch.cat(p, dim) for p in zip(*parts, strict=True)]


def _pull(f, tensors, cotangents):
    """Derivatives by each of the tensors of (f(*tensors) * cotangents).sum(); None for a tensor that is None."""
    given = [i for i, t in enumerate(tensors) if t is not None]

    def of_given(*values):
        return tuple(f(*(values[given.index(i)] if i in given else None for i in range(len(tensors)))))

    _, pull = torch.func.vjp(of_given, *(tensors[i] for i in given))
    derivatives = iter(pull(tuple(cotangents)))
    return [next(derivatives) if t is not None else None for t in tensors]


def _given(*tensors):
    return [t for t in tensors if t is not None]


def _as_returned(results, tensors, wanted):
    """Results as the backward operators return them: in the tensor's dtype, and an empty one where none is wanted."""
    results = iter(results)
    return tuple(
        next(results).to(t.dtype) if w and t is not None else tensors[0].new_empty(0)
        for t, w in zip(tensors, wanted, strict=True)
    )


def _only_wanted(cotangents, tensors, wanted, dtype):
    return [c.to(dtype) if w and t is not None else None for c, t, w in zip(cotangents, tensors, wanted, strict=True)]


# --- deform_conv2d


class _Conv:
    """The sizes of a call. Its tensors are in the type of the sums; M counts images, lines, columns, taps, groups."""

    def __init__(self, input, offset, weight, stride, padding, dilation):
        self.shape, self.size, self.kernel = input.shape, offset.shape[2:], weight.shape[2:]
        self.taps = self.kernel[0] * self.kernel[1]
        self.groups = input.shape[1] // weight.shape[1]
        self.offset_groups = offset.shape[1] // (2 * self.taps)
        self.stride, self.padding, self.dilation = stride, padding, dilation

    def each(self, f, maps, lined, most):
        """Joins what f(rows, lined, first line) returns for each part: some images, or some lines of one.

        Args:
            f: returns lists of tensors: to be added up for the image, to be joined by lines, to be added up.
            maps (Tensor[N, C, H, W]): f is given their rows.
            lined (Tensor[N, *, Ho, Wo] or None): f is given their part.
            most: elements of a part's columns.
        """
        line = self.shape[1] * self.taps * self.size[1]
        of_images, joined, total = [], [], None
        for images in _slices(self.shape[0], line * self.size[0], most):
            here = [m[images] for m in maps]
            rows = [_rows(m, self.offset_groups) for m in here]
            of_image, parts = None, []
            for lines in _slices(self.size[0], line * len(here[0]), most):
                result = f(rows, [None if t is None else t[images, :, lines] for t in lined], lines.start)
                of_image, total = _add(of_image, result[0]), _add(total, result[2])
                parts.append(result[1])
            of_images.append([_from_rows(r, here[0].shape, self.offset_groups) for r in of_image])
            joined.append(_cat(parts, 2))
        return _cat(of_images), _cat(joined), total

    def _taps(self, axis, first, count, device):
        """Tensor[count, taps]: where the taps of output pixels lie without offset, in input pixels"""
        tap = torch.arange(self.taps, device=device)
        tap = tap % self.kernel[1] if axis else tap // self.kernel[1]
        pixel = torch.arange(first, first + count, device=device)[:, None]
        return pixel * self.stride[axis] - self.padding[axis] + tap * self.dilation[axis]

    def locate(self, offset, first_line):
        """index [M, 4], ly, lx [M] for the offset of some lines"""
        (h, w), g = self.shape[2:], self.offset_groups
        n, _, lines, columns = offset.shape
        at = offset.reshape(n, g, self.taps, 2, lines, columns).permute(0, 4, 5, 2, 1, 3)
        y = at[..., 0] + self._taps(0, first_line, lines, offset.device)[:, None, :, None]
        x = at[..., 1] + self._taps(1, 0, columns, offset.device)[:, :, None]
        inside = (y > -1) & (y < h) & (x > -1) & (x < w)  # not so for NaN
        y, x = torch.where(inside, y, 0.0), torch.where(inside, x, 0.0)
        low_y, low_x = y.floor(), x.floor()
        ly, lx = y - low_y, x - low_x
        image = torch.arange(n, device=offset.device).view(n, 1, 1, 1, 1)
        group = torch.arange(g, device=offset.device)
        index = []
        for yy in (low_y.long(), low_y.long() + 1):
            for xx in (low_x.long(), low_x.long() + 1):
                exists = inside & (yy >= 0) & (yy < h) & (xx >= 0) & (xx < w)
                index.append(torch.where(exists, ((image * h + yy) * w + xx) * g + group, n * h * w * g))
        return torch.stack(index, -1).reshape(-1, 4), ly.reshape(-1), lx.reshape(-1)

    def modulation(self, mask):
        """Tensor[N, G * K, lines, Wo] -> Tensor[M, 1]"""
        if mask is None:
            return 1
        n, _, lines, columns = mask.shape
        mask = mask.reshape(n, self.offset_groups, self.taps, lines, columns)
        return mask.permute(0, 3, 4, 2, 1).reshape(-1, 1)

    def from_samples(self, values, shape):
        """Tensor[M] -> of the shape of some lines of a mask; Tensor[M, 2] -> of an offset"""
        n, channels, lines, columns = shape
        of_sample = channels // (self.taps * self.offset_groups)
        values = values.reshape(n, lines, columns, self.taps, self.offset_groups, of_sample)
        return values.permute(0, 4, 3, 5, 1, 2).reshape(shape)

    # The product: for each group [pixels, taps * channels] @ [taps * channels, outputs].

    def matrices(self, weight):
        o, c = weight.shape[:2]
        weight = weight.reshape(self.groups, o // self.groups, c, self.taps)
        return weight.permute(0, 3, 2, 1).reshape(self.groups, self.taps * c, o // self.groups)

    def from_matrices(self, matrices, shape):
        o, c = shape[:2]
        return matrices.reshape(self.groups, self.taps, c, o // self.groups).permute(0, 3, 2, 1).reshape(shape)

    def columns(self, samples):
        c = self.shape[1] // self.groups
        pixels = len(samples) // (self.taps * self.offset_groups)
        samples = samples.reshape(pixels, self.taps, self.groups, c).permute(2, 0, 1, 3)
        return samples.reshape(self.groups, pixels, self.taps * c)

    def from_columns(self, columns):
        c = self.shape[1] // self.groups
        samples = columns.shape[1] * self.taps * self.offset_groups
        columns = columns.reshape(*columns.shape[:2], self.taps, c).permute(1, 2, 0, 3)
        return columns.reshape(samples, self.shape[1] // self.offset_groups)

    def forward(self, rows, offset, weight, mask, first_line):
        index, ly, lx = self.locate(offset, first_line)
        samples = _gather_samples(rows, index, _weights(ly, lx) * self.modulation(mask), None, len(index))
        out = (self.columns(samples) @ self.matrices(weight)).permute(1, 0, 2)
        n, _, lines, columns = offset.shape
        return out.reshape(n, lines, columns, len(weight)).permute(0, 3, 1, 2)

    def backward(self, grad, rows, offset, weight, mask, first_line, wanted):
        """The gradients of those of rows, offset, weight and mask that are wanted"""
        index, ly, lx = self.locate(offset, first_line)
        weights, modulation = _weights(ly, lx), self.modulation(mask)
        grad = grad.permute(0, 2, 3, 1).reshape(-1, self.groups, len(weight) // self.groups).transpose(0, 1)
        by_rows, by_offset, by_weight, by_mask = wanted
        if by_rows or by_offset or by_mask:
            values = self.from_columns(grad @ self.matrices(weight).mT)
        if by_offset or by_mask:
            dots = _dot_samples(rows, index, values, None)
        grads = []
        if by_rows:
            grads.append(_scatter_samples(values, index, weights * modulation, None, len(rows)))
        if by_offset:
            slopes = torch.stack(_slopes(ly, lx, dots), -1)
            grads.append(self.from_samples(slopes * modulation, offset.shape))
        if by_weight:
            samples = _gather_samples(rows, index, weights * modulation, None, len(index))
            grads.append(self.from_matrices(self.columns(samples).mT @ grad, weight.shape))
        if by_mask:
            grads.append(self.from_samples((weights * dots).sum(1), mask.shape))
        return grads


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    call = _Conv(input, offset, weight, stride, padding, dilation)
    dtype = input.dtype
    input, offset, weight, bias, mask = _cast(_sum_type(input), input, offset, weight, bias, mask)

    def part(rows, lined, first_line):
        return [], [call.forward(*rows, lined[0], weight, lined[1], first_line)], []

    _, (out,), _ = call.each(part, [input], [offset, mask], _most())
    return (out if bias is None else out + bias[:, None, None]).to(dtype)


def deform_conv2d_backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    call = _Conv(input, offset, weight, stride, padding, dilation)
    tensors, wanted = (input, offset, weight, mask), [*wanted[:3], wanted[3] and mask is not None]
    grad, input, offset, weight, mask = _cast(_sum_type(input), grad, *tensors)

    def part(rows, lined, first_line):
        grads = iter(call.backward(lined[0], *rows, lined[1], weight, lined[2], first_line, wanted))
        of_rows, of_offset, of_weight, of_mask = ([next(grads)] if w else [] for w in wanted)
        return of_rows, of_offset + of_mask, of_weight

    of_input, lined, of_weight = call.each(part, [input], [grad, offset, mask], _most())
    return _as_returned([*of_input, *lined[: wanted[1]], *of_weight, *lined[wanted[1] :]], tensors, wanted)


def deform_conv2d_double_backward(
    cotangents: Sequence[Any],
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    """Derivatives by grad, input, offset, weight and mask of the results of deform_conv2d_backward * cotangents."""
    call = _Conv(input, offset, weight, stride, padding, dilation)
    tensors, wanted = (input, offset, weight, mask), [*wanted[:3], wanted[3] and mask is not None]
    dtype = _sum_type(input)
    of_input, of_offset, of_weight, of_mask = _only_wanted(cotangents, tensors, wanted, dtype)
    results = grad, *tensors
    grad, input, offset, weight, mask = _cast(dtype, *results)

    def part(rows, lined, first_line):
        def backward(grad, rows, offset, weight, mask):
            return call.backward(grad, rows, offset, weight, mask, first_line, wanted)

        grad, offset, mask, *of_lined = lined
        by_grad, by_rows, by_offset, by_weight, by_mask = _pull(
            backward,
            (grad, rows[0], offset, weight, mask),
            _given(*rows[1:], of_lined[0], of_weight, of_lined[1]),
        )
        return [by_rows], _given(by_grad, by_offset, by_mask), [by_weight]

    (by_input,), lined, (by_weight,) = call.each(
        part, _given(input, of_input), [grad, offset, mask, of_offset, of_mask], CHUNK // 16
    )
    by_grad, by_offset, by_mask = lined if mask is not None else (*lined, None)
    derivatives = by_grad, by_input, by_offset, by_weight, by_mask
    return [None if d is None or t is None else d.to(t.dtype) for d, t in zip(derivatives, results, strict=True)]


# --- deform_roi_pool, deform_ps_roi_pool


class _Axis:
    """Of each bag along one axis: where its samples lie (start + i * step), and which of them can lie on the map."""

    def __init__(self, begin, size, number, bins, sampling_ratio, corner, gamma, extent):
        lost = ~(begin.isfinite() & size.isfinite())
        size, begin = torch.where(lost, 0.0, size), torch.where(lost, torch.nan, begin)
        self.grid = torch.full_like(size, sampling_ratio) if sampling_ratio > 0 else (size / bins).ceil()
        self.begin, self.size, self.number = begin, size, number * size / bins
        self.step = size / bins / self.grid
        self.half = 0.0 if corner else self.step / 2
        self.gamma, self.extent, self.sampling_ratio = gamma, extent, sampling_ratio

    def flatten(self, bins):
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.expand(bins).reshape(-1))
        return self

    def start(self, shift, part):
        half = self.half if isinstance(self.half, float) else self.half[part]
        return self.begin[part] + self.size[part] * (self.gamma * shift) + self.number[part] + half

    def window(self, shift):
        """The first sample and how many: all, if their number is given. Of a large adaptive grid most lie outside."""
        if self.sampling_ratio > 0:
            count = torch.full_like(self.step, self.sampling_ratio, dtype=torch.long)
            return torch.zeros_like(count), count
        start = self.start(shift, slice(None)).detach()
        a, b = (-1 - start) / self.step, (self.extent - start) / self.step
        low, high = torch.where(self.step > 0, a, b), torch.where(self.step > 0, b, a)
        # -2 and + 3 leave room for rounding.
        first, last = (low - 2).clamp(min=0).trunc(), torch.minimum(high + 3, self.grid).trunc()
        first, last = torch.where(self.step == 0, 0.0, first), torch.where(self.step == 0, self.grid, last)
        some = (last > first) & ((high >= low) | (self.step == 0))  # not so for NaN
        return torch.where(some, first, 0.0).long(), torch.where(some, last - first, 0.0).long()


class _Pool:
    """The sizes of a call. Its tensors are in the type of the sums; bags count boxes, bins, classes of channels."""

    def __init__(self, input, boxes, offset, output_size, gamma, sampling_ratio, group_size=1):
        self.shape, self.size, self.groups = input.shape, output_size, group_size**2
        self.classes = 1 if offset is None else offset.shape[1] // 2
        self.parts = output_size if offset is None else offset.shape[2:]
        self.bins = (len(boxes), *output_size, self.classes)
        self.bags = len(boxes) * output_size[0] * output_size[1] * self.classes
        self.channels = input.shape[1] // self.groups // self.classes

        def count(n, dims):
            return torch.arange(n, device=boxes.device).view(-1, *[1] * dims)

        (ph, pw), (n, _, h, w) = output_size, input.shape
        self.to_parts = [torch.arange(p, device=boxes.device) * q // p for p, q in zip(self.size, self.parts)]  # noqa: B905
        self.axes = []
        for axis, extent in enumerate((h, w)):
            begin, size = (t.view(-1, 1, 1, 1) for t in self.side(boxes[:, 2 - axis], boxes[:, 4 - axis]))
            number = count(self.size[axis], 2 - axis)
            args = begin, size, number, self.size[axis], sampling_ratio, self.corner, gamma, extent
            self.axes.append(_Axis(*args).flatten(self.bins))
        image = boxes[:, 0].view(-1, 1, 1, 1)
        exists = (image >= 0) & (image < n)
        image = torch.where(exists, image, 0.0).long()
        group = count(ph, 2) * group_size // ph * group_size + count(pw, 1) * group_size // pw
        first = (image * h * w * self.groups + group) * self.classes + count(self.classes, 0)
        self.exists, self.first = exists.expand(self.bins).reshape(-1), first.expand(self.bins).reshape(-1)

    # Tensors as the operator has them <-> by bags

    def shifts(self, offset):
        """Tensor[K, 2 * classes, Qh, Qw] or None -> Tensor[bags, 2], (x, y)"""
        if offset is None:
            return self.axes[0].step.new_zeros(self.bags, 2)
        k = len(offset)
        shifts = offset.reshape(k, self.classes, 2, *self.parts)
        shifts = shifts.index_select(3, self.to_parts[0]).index_select(4, self.to_parts[1])
        return shifts.permute(0, 3, 4, 1, 2).reshape(self.bags, 2)

    def from_shifts(self, shifts):
        shifts = shifts.reshape(*self.bins, 2).permute(0, 3, 4, 1, 2)
        for dim in (3, 4):
            size = [*shifts.shape]
            size[dim] = self.parts[dim - 3]
            shifts = shifts.new_zeros(size).index_add(dim, self.to_parts[dim - 3], shifts)
        return shifts.reshape(self.bins[0], 2 * self.classes, *self.parts)

    def modulation(self, mask):
        """Tensor[K, 1, Ph, Pw] -> Tensor[bags]"""
        return None if mask is None else mask.reshape(*self.bins[:3], 1).expand(self.bins).reshape(-1)

    def from_modulation(self, modulation):
        return modulation.reshape(self.bins).sum(3).unsqueeze(1)

    def rows_of(self, output):
        """Tensor[K, channels, Ph, Pw] -> Tensor[bags, channels of a class]"""
        output = output.reshape(self.bins[0], self.classes, self.channels, *self.size)
        return output.permute(0, 3, 4, 1, 2).reshape(self.bags, self.channels)

    def from_rows(self, rows):
        rows = rows.reshape(*self.bins, self.channels).permute(0, 3, 4, 1, 2)
        return rows.reshape(self.bins[0], self.classes * self.channels, *self.size)

    def each(self, f, maps, shifts, *by_bag, most=None):
        """Joins what f(rows, shifts, ..., part) returns for some bags at a time.

        f returns lists of tensors: to be added up for the map, to be joined. The tensors by bag are handed to it in
        parts, the maps as rows.
        """
        rows = [_rows(m, self.classes, self.groups) for m in maps]
        self.windows = [axis.window(shifts[:, 1 - i]) for i, axis in enumerate(self.axes)]
        ends = [0, *((self.windows[0][1] * self.windows[1][1] + 1) * self.channels).cumsum(0).tolist()]
        most, begin, total, parts = most or _most(), 0, None, []
        while begin < self.bags or not parts:
            end = min(max(bisect_right(ends, ends[begin] + most) - 1, begin + 1), self.bags)
            part = slice(begin, end)
            result = f(rows, *(None if t is None else t[part] for t in (shifts, *by_bag)), part)
            total, begin = _add(total, result[0]), end
            parts.append(result[1])
        return [_from_rows(t, self.shape, self.classes, self.groups) for t in total], _cat(parts)

    def locate(self, shifts, part):
        """index [M, 4], ly, lx, whether between two pixels along y, along x, bag [M], and the divisor of each bag"""
        (first_y, count_y), (first_x, count_x) = [(first[part], count[part]) for first, count in self.windows]
        counts = count_y * count_x
        bag = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        number = torch.arange(len(bag), device=counts.device) - (counts.cumsum(0) - counts)[bag]
        numbers = first_y[bag] + number // count_x[bag], first_x[bag] + number % count_x[bag]
        counted, places = self.exists[part][bag], []
        for i, axis in enumerate(self.axes):
            start = axis.start(shifts[:, 1 - i], part).index_select(0, bag)
            at = start + numbers[i] * axis.step[part][bag]
            counted = counted & (at >= -self.reach) & (at <= axis.extent - 1 + self.reach)  # not so for NaN
            between = (at > 0) & (at < axis.extent - 1)
            at_pixel = torch.where(between, at, 0.0)
            low = at_pixel.floor()
            last = torch.where((at >= axis.extent - 1) & (at > 0), axis.extent - 1, 0)
            places.append((low.long() + last, at_pixel - low, between))
        (y, ly, between_y), (x, lx, between_x) = places
        (_, _, h, w), step = self.shape, self.groups * self.classes
        index = []
        for yy, y_there in ((y, counted), (y + 1, counted & between_y)):
            for xx, there in ((x, y_there), (x + 1, y_there & between_x)):
                row = self.first[part][bag] + (yy * w + xx) * step
                index.append(torch.where(there, row, self.shape[0] * h * w * step))
        return torch.stack(index, -1), ly, lx, between_y, between_x, bag, self.divisor(part, bag, counted)

    def forward(self, rows, shifts, modulation, part):
        index, ly, lx, _, _, bag, divisor = self.locate(shifts, part)
        factor = 1 / divisor if modulation is None else modulation / divisor
        weights = _weights(ly, lx) * factor.index_select(0, bag).unsqueeze(1)
        return _gather_samples(rows, index, weights, bag, len(shifts))

    def backward(self, grad, rows, shifts, modulation, part, wanted):
        """The gradients of those of rows, shifts and modulation that are wanted"""
        index, ly, lx, between_y, between_x, bag, divisor = self.locate(shifts, part)
        factor, weights = 1 / divisor if modulation is None else modulation / divisor, _weights(ly, lx)
        by_rows, by_shifts, by_modulation = wanted
        grads = []
        if by_rows:
            modulated = weights * factor.index_select(0, bag).unsqueeze(1)
            grads.append(_scatter_samples(grad, index, modulated, bag, len(rows)))
        if by_shifts or by_modulation:
            dots = _dot_samples(rows, index, grad, bag)
        if by_shifts:
            slope_y, slope_x = _slopes(ly, lx, dots)
            slopes = torch.stack([torch.where(between_x, slope_x, 0.0), torch.where(between_y, slope_y, 0.0)], 1)
            moves = torch.stack([axis.gamma * axis.size[part] for axis in self.axes[::-1]], 1)
            grads.append(_scatter(slopes, bag, len(shifts)) * moves * factor.unsqueeze(1))
        if by_modulation:
            grads.append(_scatter((weights * dots).sum(1, keepdim=True), bag, len(shifts)).squeeze(1) / divisor)
        return grads


class _RoIPool(_Pool):
    reach, corner = 1.0, False

    def __init__(self, input, boxes, offset, output_size, spatial_scale, sampling_ratio, gamma):
        self.spatial_scale = spatial_scale
        super().__init__(input, boxes, offset, output_size, gamma, sampling_ratio)

    def side(self, low, high):
        begin = low * self.spatial_scale - 0.5
        return begin, high * self.spatial_scale - 0.5 - begin

    def divisor(self, part, bag, counted):
        samples = self.axes[0].grid[part] * self.axes[1].grid[part]
        return torch.where(samples > 1, samples, 1.0)


class _PSRoIPool(_Pool):
    reach, corner = 0.5, True

    def __init__(self, input, boxes, offset, output_size, spatial_scale, sampling_ratio, gamma, group_size):
        self.spatial_scale = spatial_scale
        super().__init__(input, boxes, offset, output_size, gamma, sampling_ratio, group_size)

    def side(self, low, high):
        low, high = (torch.copysign((t.abs() + 0.5).floor(), t) for t in (low, high))  # halves away from zero
        begin = low * self.spatial_scale - 0.5
        size = (high + 1) * self.spatial_scale - 0.5 - begin
        return begin, torch.where(size < 0.1, 0.1, size)

    def divisor(self, part, bag, counted):
        count = _scatter(counted.to(self.axes[0].step.dtype).unsqueeze(1), bag, part.stop - part.start)
        return count.squeeze(1).clamp(min=1)


def _pool(kind, input, boxes, offset, mask, geometry):
    dtype = input.dtype
    input, boxes, offset, mask = _cast(_sum_type(input), input, boxes, offset, mask)
    call = kind(input, boxes.detach(), offset, *geometry)

    def part(rows, shifts, modulation, part):
        return [], [call.forward(*rows, shifts, modulation, part)]

    _, (out,) = call.each(part, [input], call.shifts(offset), call.modulation(mask))
    return call.from_rows(out).to(dtype)


def _pool_backward(kind, grad, input, boxes, offset, mask, geometry, wanted):
    tensors = input, offset, mask
    wanted = [w and t is not None for w, t in zip(wanted, tensors, strict=True)]
    grad, input, boxes, offset, mask = _cast(_sum_type(input), grad, input, boxes, offset, mask)
    call = kind(input, boxes.detach(), offset, *geometry)

    def part(rows, shifts, modulation, grad, part):
        grads = call.backward(grad, *rows, shifts, modulation, part, wanted)
        return grads[: wanted[0]], grads[wanted[0] :]

    of_input, by_bag = call.each(part, [input], call.shifts(offset), call.modulation(mask), call.rows_of(grad))
    of_offset = [call.from_shifts(by_bag[0])] if wanted[1] else []
    of_mask = [call.from_modulation(by_bag[-1])] if wanted[2] else []
    return _as_returned([*of_input, *of_offset, *of_mask], tensors, wanted)


def _pool_double_backward(kind, cotangents, grad, input, boxes, offset, mask, geometry, wanted):
    tensors = input, offset, mask
    wanted = [w and t is not None for w, t in zip(wanted, tensors, strict=True)]
    dtype, results = _sum_type(input), (grad, *tensors)
    of_input, of_offset, of_mask = _only_wanted(cotangents, tensors, wanted, dtype)
    grad, input, boxes, offset, mask = _cast(dtype, grad, input, boxes, offset, mask)
    call = kind(input, boxes.detach(), offset, *geometry)

    def part(rows, shifts, modulation, grad, of_shifts, of_modulation, part):
        def backward(grad, rows, shifts, modulation):
            return call.backward(grad, rows, shifts, modulation, part, wanted)

        by_grad, by_rows, by_shifts, by_modulation = _pull(
            backward, (grad, rows[0], shifts, modulation), _given(*rows[1:], of_shifts, of_modulation)
        )
        return [by_rows], _given(by_grad, by_shifts, by_modulation)

    (by_input,), (by_grad, by_shifts, *by_modulation) = call.each(
        part,
        _given(input, of_input),
        call.shifts(offset),
        call.modulation(mask),
        call.rows_of(grad),
        None if of_offset is None else call.shifts(of_offset),
        call.modulation(of_mask),
        most=CHUNK // 16,
    )
    derivatives = (
        call.from_rows(by_grad),
        by_input,
        None if offset is None else call.from_shifts(by_shifts),
        call.from_modulation(*by_modulation) if by_modulation else None,
    )
    return [None if d is None or t is None else d.to(t.dtype) for d, t in zip(derivatives, results, strict=True)]


def deform_roi_pool(input: Tensor, boxes: Tensor, offset: Tensor | None, mask: Tensor | None, *geometry: Any) -> Tensor:
    return _pool(_RoIPool, input, boxes, offset, mask, geometry)


def deform_roi_pool_backward(
    grad: Tensor, input: Tensor, boxes: Tensor, offset: Tensor | None, mask: Tensor | None, *geometry_and_wanted: Any
) -> tuple[Tensor, ...]:
    *geometry, wanted = geometry_and_wanted
    return _pool_backward(_RoIPool, grad, input, boxes, offset, mask, geometry, wanted)


def deform_roi_pool_double_backward(
    cotangents: Sequence[Any],
    grad: Tensor,
    input: Tensor,
    boxes: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    *geometry_and_wanted: Any,
) -> Sequence[Tensor | None]:
    """Derivatives by grad, input, offset and mask of the results of deform_roi_pool_backward * cotangents."""
    *geometry, wanted = geometry_and_wanted
    return _pool_double_backward(_RoIPool, cotangents, grad, input, boxes, offset, mask, geometry, wanted)


def deform_ps_roi_pool(
    input: Tensor, boxes: Tensor, offset: Tensor | None, mask: Tensor | None, *geometry: Any
) -> Tensor:
    return _pool(_PSRoIPool, input, boxes, offset, mask, geometry)


def deform_ps_roi_pool_backward(
    grad: Tensor, input: Tensor, boxes: Tensor, offset: Tensor | None, mask: Tensor | None, *geometry_and_wanted: Any
) -> tuple[Tensor, ...]:
    *geometry, wanted = geometry_and_wanted
    return _pool_backward(_PSRoIPool, grad, input, boxes, offset, mask, geometry, wanted)


def deform_ps_roi_pool_double_backward(
    cotangents: Sequence[Any],
    grad: Tensor,
    input: Tensor,
    boxes: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    *geometry_and_wanted: Any,
) -> Sequence[Tensor | None]:
    """Derivatives by grad, input, offset and mask of the results of deform_ps_roi_pool_backward * cotangents."""
    *geometry, wanted = geometry_and_wanted
    return _pool_double_backward(_PSRoIPool, cotangents, grad, input, boxes, offset, mask, geometry, wanted)
