"""Slow float64 definitions of the operators, written from their formulas. They share no code with the kernels.

Also here: random inputs for the tests, and the comparison that all of them use.
"""

import inspect

import torch
from torch.nn.modules.utils import _pair

# What a comparison allows, relative to the largest expected value: arithmetic in float32 or better, one rounding at
# the end, and for the half types a matrix product that takes them as they are.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def sampling_points(input, offset, weight, stride, padding, dilation):
    """y, x (Tensor[N, G, K, Ho, Wo]) in input pixels: y = ho*s_h - p_h + i*d_h + dy, tap k = i*kw + j."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = weight.shape[-2:], _pair(stride), _pair(padding), _pair(dilation)
    h, w = input.shape[-2:]
    ho = (h + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    wo = (w + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    assert offset.shape[-2:] == (ho, wo)
    double = {"dtype": torch.float64, "device": input.device}
    n, channels = offset.shape[:2]
    offset = offset.double().reshape(n, channels // (2 * kh * kw), kh * kw, 2, ho, wo)
    tap_y = (torch.arange(kh, **double) * dh).repeat_interleave(kw)
    tap_x = (torch.arange(kw, **double) * dw).repeat(kh)
    y = offset[:, :, :, 0] + tap_y[:, None, None] + (torch.arange(ho, **double) * sh - ph)[:, None]
    x = offset[:, :, :, 1] + tap_x[:, None, None] + (torch.arange(wo, **double) * sw - pw)
    return y, x


def _weigh_columns(columns, weight, bias, mask):
    """out = weight . (mask * columns) + bias, with columns (Tensor[N, G, C/G, K, Ho, Wo])."""
    n, g, c, k, ho, wo = columns.shape
    if mask is not None:
        columns = columns * mask.double().reshape(n, g, 1, k, ho, wo)
    out_channels, channels = weight.shape[:2]
    groups = g * c // channels
    columns = columns.reshape(n, groups, channels, k, ho, wo)
    weight = weight.double().reshape(groups, out_channels // groups, channels, k)
    out = torch.einsum("ngckyx,gock->ngoyx", columns, weight).reshape(n, out_channels, ho, wo)
    return out if bias is None else out + bias.double()[:, None, None]


def deform_conv2d(input, offset, weight, bias=None, stride=1, padding=0, dilation=1, mask=None):
    """The definition: four neighbours by floor, each counted only where it lies in the map. Returns float64.

    Derivatives come from autograd with the floor held constant: 0 for a sample at y <= -1 or y >= H (and NaN), and
    from the right at integers in between. Both are the rules that the operator documents.
    """
    y, x = sampling_points(input, offset, weight, stride, padding, dilation)
    n, g, k, ho, wo = y.shape
    c, h, w = input.shape[1:]
    inside = (y > -1) & (y < h) & (x > -1) & (x < w)
    y, x = torch.where(inside, y, 0.0), torch.where(inside, x, 0.0)
    y0, x0 = y.detach().floor(), x.detach().floor()
    pixels = input.double().reshape(n, g, c // g, h * w)
    columns = torch.zeros(n, g, c // g, k * ho * wo, dtype=torch.float64, device=input.device)
    for yy, wy in ((y0, 1 - (y - y0)), (y0 + 1, y - y0)):
        for xx, wx in ((x0, 1 - (x - x0)), (x0 + 1, x - x0)):
            exists = inside & (yy >= 0) & (yy < h) & (xx >= 0) & (xx < w)
            index = torch.where(exists, yy * w + xx, 0.0).long().reshape(n, g, 1, k * ho * wo)
            values = pixels.gather(3, index.expand(-1, -1, c // g, -1))
            values = torch.where(exists.reshape(index.shape), values, 0.0)
            columns = columns + (wy * wx).reshape(index.shape) * values
    return _weigh_columns(columns.reshape(n, g, c // g, k, ho, wo), weight, bias, mask)


def deform_conv2d_dense(input, offset, weight, bias=None, stride=1, padding=0, dilation=1, mask=None):
    """The paper's equation as printed: x(p) = sum over ALL pixels q of max(0, 1-|q_y-p_y|) max(0, 1-|q_x-p_x|) x(q).

    No floor, no index and no border rule, so no mistake can be common with the definition above. Small maps only;
    derivatives hold away from integer coordinates.
    """
    y, x = sampling_points(input, offset, weight, stride, padding, dilation)
    c, h, w = input.shape[1:]
    near_y = (1 - (y.nan_to_num(1e9)[..., None] - torch.arange(h, device=y.device)).abs()).clamp(min=0)
    near_x = (1 - (x.nan_to_num(1e9)[..., None] - torch.arange(w, device=x.device)).abs()).clamp(min=0)
    pixels = input.double().reshape(len(input), y.shape[1], c // y.shape[1], h, w)
    columns = torch.einsum("ngkpqy,ngkpqx,ngcyx->ngckpq", near_y, near_x, pixels)
    return _weigh_columns(columns, weight, bias, mask)


def deform_conv2d_inputs(
    n=2, c=8, h=11, w=13, o=8, kernel=3, stride=1, padding=1, dilation=1, groups=1, offset_groups=1, reach=3,
    bias=True, mask=True, dtype=torch.float64, offset_dtype=None, device="cpu",
):  # fmt: skip
    """Random (tensors, geometry) for op(**tensors, **geometry).

    Sampling points reach up to `reach` pixels away, over the border too, but keep a tenth of a pixel from the
    integers, where the derivative jumps.
    """
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = map(_pair, (kernel, stride, padding, dilation))
    ho, wo = (h + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (w + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    size = (n, 2 * offset_groups * kh * kw, ho, wo)
    tensors = {
        "input": torch.randn(n, c, h, w),
        "offset": torch.randint(-reach, reach, size) + torch.rand(size) * 0.8 + 0.1,
        "weight": torch.randn(o, c // groups, kh, kw),
        "bias": torch.randn(o) if bias else None,
        "mask": torch.rand(n, size[1] // 2, ho, wo) if mask else None,
    }
    for name, tensor in tensors.items():
        if tensor is not None:
            wanted = offset_dtype if offset_dtype and name in ("offset", "mask") else dtype
            tensors[name] = tensor.to(device, wanted)
    return tensors, {"stride": stride, "padding": padding, "dilation": dilation}


def run(op, tensors, geometry, grad_output=None):
    """Forward and backward: {"output": ..., name of each tensor: its gradient}. grad_output defaults to ones."""
    leaves = {k: None if t is None else t.detach().clone().requires_grad_() for k, t in tensors.items()}
    output = op(**leaves, **geometry)
    output.backward(torch.ones_like(output) if grad_output is None else grad_output.to(output))
    return {"output": output.detach(), **{k: t.grad for k, t in leaves.items() if t is not None}}


def assert_near(actual, expected, tolerance, name="tensor"):
    """max |actual - expected| <= tolerance * max |expected|; NaN never passes."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel():
        error = (actual.double() - expected.double()).abs().max().item()
        scale = expected.double().abs().max().item()
        assert error <= tolerance * scale, f"{name}: off by {error:.3g} where the largest value is {scale:.3g}"


def assert_all_near(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_near(actual[name], expected[name], tolerance, name)


def assert_same(actual, expected, dtype):
    """Equal to the bit, but for the gradient of the input on a GPU, where atomics sum it in any order."""
    assert actual.keys() == expected.keys()
    for name in expected:
        summed = name == "input" and expected[name].is_cuda
        assert_near(actual[name], expected[name], TOLERANCE[dtype] if summed else 0, name)


def opcheck(op, arguments, tolerance):
    """torch.library.opcheck; before torch 2.7 it takes no tolerances."""
    accepted = inspect.signature(torch.library.opcheck).parameters
    torch.library.opcheck(op, arguments, **{k: tolerance for k in ("rtol", "atol") if k in accepted})
