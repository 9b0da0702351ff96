"""Random calls of every operator: each agrees with the float64 definition or raises an error that names its argument.

All numbers are multiples of small powers of two, so that positions are exact: samples that lie on a pixel or on the
border, where derivatives and values jump, lie there for the kernel and for the definition alike.

`pytest tests/ops/test_fuzz.py --hypothesis-profile=nightly` runs 5,000 examples of each test instead of 70.
"""

import math

import pytest
import torch
from dcnv2_d2 import ops
from hypothesis import given
from hypothesis import strategies as st

from ..reference import TOLERANCE, run
from ..reference import deform_conv2d as define_conv
from ..reference_pool import deform_roi_pool as define_pool
from ..reference_ps_pool import deform_ps_roi_pool as define_ps_pool

WILD = [math.nan, math.inf, -math.inf, 1e30, -1e30, 2.0**31, -(2.0**31), 65504.0]
DEFINITIONS = {
    "deform_conv2d": define_conv,
    "deform_roi_pool": define_pool,
    "deform_ps_roi_pool": define_ps_pool,
}


def numbers(draw, size, step, reach, wild=0.0, replacements=WILD):
    """A tensor of multiples of step up to reach, a share of whose elements is replaced by some of `replacements`."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    count = round(reach / step)
    values = torch.randint(-count, count + 1, size, generator=generator).double() * step
    replaced = torch.rand(size, generator=generator) < wild
    chosen = torch.randint(len(replacements), size, generator=generator)
    return torch.where(replaced, torch.tensor(replacements, dtype=torch.float64)[chosen], values)


def layouts(draw, tensor):
    """The same values in another memory layout."""
    kind = draw(st.sampled_from(["contiguous", "channels_last", "strided", "transposed"]))
    if kind == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if kind == "strided":
        return torch.stack([tensor, tensor + 1], -1)[..., 0]
    if kind == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    return tensor


shares = st.sampled_from([0.0, 0.0, 0.1, 1.0])  # of wild elements
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@st.composite
def conv_calls(draw):
    small = st.integers(1, 3)
    groups, offset_groups = draw(small), draw(small)
    c, o = math.lcm(groups, offset_groups) * draw(small), groups * draw(small)
    kh, kw, sh, sw, dh, dw = (draw(small) for _ in range(6))
    ph, pw = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    h = draw(st.integers(max(1, dh * (kh - 1) + 1 - 2 * ph), 9))
    w = draw(st.integers(max(1, dw * (kw - 1) + 1 - 2 * pw), 9))
    n, ho, wo = (
        draw(st.integers(0, 2)),
        (h + 2 * ph - dh * (kh - 1) - 1) // sh + 1,
        (w + 2 * pw - dw * (kw - 1) - 1) // sw + 1,
    )
    tensors = {
        "input": layouts(draw, numbers(draw, (n, c, h, w), 0.25, 2)),
        "offset": layouts(draw, numbers(draw, (n, 2 * offset_groups * kh * kw, ho, wo), 0.25, 4, draw(shares))),
        "weight": numbers(draw, (o, c // groups, kh, kw), 0.25, 1),
        "bias": draw(st.sampled_from([None, numbers(draw, (o,), 0.25, 1)])),
        "mask": draw(st.sampled_from([None, numbers(draw, (n, offset_groups * kh * kw, ho, wo), 0.25, 1)])),
    }
    return "deform_conv2d", tensors, {"stride": (sh, sw), "padding": (ph, pw), "dilation": (dh, dw)}


def rois(draw, n, k, upright):
    # Not 1e30: offsets can take a box of that size back into the map, to where rounding decides.
    boxes = numbers(draw, (k, 5), 2, 24, draw(shares), [math.nan, math.inf, -math.inf])
    if upright:
        boxes[:, 3:] = boxes[:, 1:3] + boxes[:, 3:].abs()
    boxes[:, 0] = torch.randint(n, (k,), generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    return boxes


@st.composite
def pool_calls(draw):
    n, k, power = draw(st.integers(1, 2)), draw(st.integers(0, 3)), st.sampled_from([1, 2, 4])
    ph, pw = draw(power), draw(power)
    tensors = {
        "input": layouts(draw, numbers(draw, (n, draw(st.integers(1, 5)), *(draw(st.integers(1, 9)),) * 2), 0.25, 2)),
        "offset": draw(st.sampled_from([None, numbers(draw, (k, 2, ph, pw), 0.5, 4, draw(shares))])),
        "mask": draw(st.sampled_from([None, numbers(draw, (k, 1, ph, pw), 0.25, 1)])),
    }
    geometry = {
        "boxes": rois(draw, n, k, upright=draw(st.booleans())),
        "output_size": (ph, pw),
        "spatial_scale": draw(st.sampled_from([1.0, 0.5, 0.25])),
        "sampling_ratio": draw(power),
        "gamma": draw(st.sampled_from([0.125, 0.5, -0.25])),
    }
    return "deform_roi_pool", tensors, geometry


@st.composite
def ps_pool_calls(draw):
    n, k, power = draw(st.integers(1, 2)), draw(st.integers(0, 3)), st.sampled_from([1, 2, 4])
    group, classes, ph, pw = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(power), draw(power)
    channels = classes * draw(st.integers(1, 2)) * group**2
    parts = draw(power), draw(power)
    tensors = {
        "input": layouts(draw, numbers(draw, (n, channels, *(draw(st.integers(1, 9)),) * 2), 0.25, 2)),
        "offset": draw(st.sampled_from([None, numbers(draw, (k, 2 * classes, *parts), 0.5, 4, draw(shares))])),
        "mask": draw(st.sampled_from([None, numbers(draw, (k, 1, ph, pw), 0.25, 1)])),
    }
    geometry = {
        # The 0.1 pixels that an inverted box has are no power of two.
        "boxes": rois(draw, n, k, upright=tensors["offset"] is not None),
        "output_size": (ph, pw),
        "spatial_scale": draw(st.sampled_from([1.0, 0.5, 0.25])),
        "sampling_ratio": draw(power),
        "gamma": draw(st.sampled_from([0.125, 0.5, -0.25])),
        "group_size": group,
    }
    return "deform_ps_roi_pool", tensors, geometry


def assert_agrees(actual, expected, tolerance):
    """Relative to 1 where all values are small: what cancels leaves its rounding."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert actual[name].shape == wanted.shape, name
        scale = wanted.double().abs().max().clamp(min=1).item() if wanted.numel() else 1
        torch.testing.assert_close(actual[name].double(), wanted.double(), rtol=0, atol=tolerance * scale, msg=name)


CALLS = pytest.mark.parametrize("calls", [conv_calls, pool_calls, ps_pool_calls])


@CALLS
@given(data=st.data(), dtype=dtypes)
def test_agrees_with_the_definition(calls, data, dtype):
    name, tensors, geometry = data.draw(calls())
    tensors = {key: t if t is None else t.to(dtype) for key, t in tensors.items()}
    doubles = {key: t if t is None else t.double() for key, t in tensors.items()}
    with torch.no_grad():
        expected_output = DEFINITIONS[name](**doubles, **geometry)
    grad = numbers(data.draw, expected_output.shape, 0.25, 1)
    expected = run(DEFINITIONS[name], doubles, geometry, grad)
    assert_agrees(run(getattr(ops, name), tensors, geometry, grad), expected, 8 * TOLERANCE[dtype])


def breakages(tensors, geometry):
    """Ways to make a call wrong: what, and the arguments that an error may name."""
    for key, tensor in tensors.items():
        if tensor is not None:
            yield key, tensor[None]
            yield key, tensor.to(torch.int64)
            yield key, torch.cat([tensor, tensor[:1] if len(tensor) else tensor.new_zeros(1, *tensor.shape[1:])])
            if tensor.dim() > 1:
                yield key, torch.cat([tensor, tensor[:, :1]], 1)
    for key, value in geometry.items():
        if key == "boxes":
            yield key, value[:, :4]
            yield key, torch.cat([value, torch.tensor([[9.0, 0, 0, 4, 4]], dtype=value.dtype)])
        elif key in ("stride", "dilation", "output_size", "group_size"):
            yield key, 0
            yield key, -1
        elif key == "padding":
            yield key, -1
        elif key == "spatial_scale":
            yield key, math.nan


@CALLS
@given(data=st.data())
def test_a_wrong_argument_gives_right_numbers_or_an_error_that_names_it(calls, data):
    name, tensors, geometry = data.draw(calls())
    key, value = data.draw(st.sampled_from(list(breakages(tensors, geometry))))
    tensors = {**tensors, key: value} if key in tensors else tensors
    geometry = {**geometry, key: value} if key in geometry else geometry
    try:
        output = getattr(ops, name)(**tensors, **geometry)
    except (ValueError, TypeError) as e:
        assert str(e).startswith(f"{name}: "), e
        assert any(word in str(e) for word in (key, *tensors, *geometry)), e
    else:  # one more output channel of the weight, or box, may fit
        expected = DEFINITIONS[name](**{k: t if t is None else t.double() for k, t in tensors.items()}, **geometry)
        assert_agrees({"output": output}, {"output": expected}, 1e-11)


def test_every_operator_is_fuzzed():
    assert set(ops.__all__) == set(DEFINITIONS)
