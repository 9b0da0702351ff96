"""What dcnv2_d2.ops.deform_conv2d promises besides its numbers: registration, export, dtypes, formats, errors."""

import inspect
import re

import pytest
import torch
import torchvision
from dcnv2_d2.ops import deform_conv2d
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from ..devices import needs_cuda
from ..reference import TOLERANCE, assert_all_near, assert_near, assert_same, deform_conv2d_inputs, opcheck, run
from ..reference import deform_conv2d as definition

UNEQUAL = {"kernel": (3, 5), "stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)}
HALVES = [torch.float16, torch.bfloat16]


def registered(input, offset, weight, bias=None, stride=1, padding=0, dilation=1, mask=None):
    """The registered operator behind the function's signature."""
    geometry = [list(_pair(p)) for p in (stride, padding, dilation)]
    return torch.ops.dcnv2_d2.deform_conv2d(input, offset, weight, bias, mask, *geometry)


def positional(tensors, geometry):
    geometry = [list(_pair(geometry[k])) for k in ("stride", "padding", "dilation")]
    return (*(tensors[k] for k in ("input", "offset", "weight", "bias", "mask")), *geometry)


def requiring_grad(tensors):
    return {k: None if t is None else t.requires_grad_() for k, t in tensors.items()}


def test_signature_is_torchvisions():
    ours, theirs = (inspect.signature(f).parameters for f in (deform_conv2d, torchvision.ops.deform_conv2d))
    assert list(ours) == list(theirs)
    for name in ours:
        # Torchvision writes (1, 1) where we may write 1.
        assert ours[name].kind == theirs[name].kind
        assert _pair(ours[name].default) == _pair(theirs[name].default), name


def test_schema():
    schema = torch.ops.dcnv2_d2.deform_conv2d.default._schema
    expected = ["input", "offset", "weight", "bias", "mask", "stride", "padding", "dilation"]
    assert [a.name for a in schema.arguments] == expected
    assert not schema.is_mutable
    assert hasattr(torch.ops.dcnv2_d2, "deform_conv2d_backward")


def test_function_and_operator_agree(device):
    tensors, geometry = deform_conv2d_inputs(**UNEQUAL, device=device)
    expected = run(registered, tensors, geometry)
    actual = run(deform_conv2d, tensors, geometry)
    assert_same(actual, expected, torch.float64)


@pytest.mark.parametrize(
    "config",
    [
        {"groups": 2, "offset_groups": 1},
        {"groups": 2, "offset_groups": 2, "bias": False},
        {"groups": 2, "offset_groups": 4, "mask": False},
        {"groups": 1, "offset_groups": 2, "bias": False, "mask": False},
        {"groups": 4, "offset_groups": 1, "n": 2, "kernel": 1, "stride": (2, 1), "padding": 0},
    ],
    ids=str,
)
def test_gradcheck_and_opcheck(config, device):
    config = {"n": 1, "c": 4, "o": 4, "h": 4, "w": 5, "reach": 2, **UNEQUAL, **config}
    tensors, geometry = deform_conv2d_inputs(**config, device=device)
    arguments = positional(requiring_grad(tensors), geometry)
    assert torch.autograd.gradcheck(registered_positional, arguments, nondet_tol=1e-12 if device == "cuda" else 0.0)
    torch.library.opcheck(torch.ops.dcnv2_d2.deform_conv2d.default, arguments)


def registered_positional(*arguments):
    return torch.ops.dcnv2_d2.deform_conv2d(*arguments)


@pytest.mark.parametrize(
    "config",
    [
        {"n": 3, "dtype": torch.float32},
        {"n": 3, "dtype": torch.bfloat16, "offset_dtype": torch.float32},
        {"n": 0, "dtype": torch.float32, "mask": False},
        {"n": 2, "c": 12, "o": 6, "groups": 3, "offset_groups": 2, **UNEQUAL},
    ],
    ids=str,
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck(config, memory_format, device):
    tensors, geometry = deform_conv2d_inputs(**config, device=device)
    tensors["input"] = tensors["input"].contiguous(memory_format=memory_format)
    arguments = positional(requiring_grad(tensors), geometry)
    # bfloat16: the traced graph may round sums at other places than the eager one.
    tolerance = TOLERANCE[config.get("dtype", torch.float64)]
    opcheck(torch.ops.dcnv2_d2.deform_conv2d.default, arguments, tolerance)


# Compilation and export.


class Layer(nn.Module):
    """A prediction convolution and the convolution it serves: the operator as models use it."""

    def __init__(self, stride=(2, 1), offset_groups=2):
        super().__init__()
        self.geometry = {"stride": stride, "padding": (1, 2), "dilation": (1, 2)}
        self.predict = nn.Conv2d(4, 3 * offset_groups * 9, 3, **self.geometry)
        self.weight = nn.Parameter(torch.randn(6, 2, 3, 3))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x):
        predicted = self.predict(x)
        split = predicted.shape[1] // 3 * 2
        offset, mask = predicted[:, :split], predicted[:, split:].sigmoid()
        return deform_conv2d(x, offset, self.weight, self.bias, mask=mask, **self.geometry).relu()


def assert_same_step(model, compiled, x):
    """Same output, same gradients of the parameters."""
    expected, actual = model(x), compiled(x)
    assert_near(actual, expected, 1e-5)
    gradients = [torch.autograd.grad(out.square().mean(), list(model.parameters())) for out in (expected, actual)]
    for expected, actual in zip(*gradients, strict=True):
        assert_near(actual, expected, 1e-4)


@pytest.mark.parametrize("dynamic", [True, False, None])
def test_compiles_whole(dynamic, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = Layer().to(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter)
    shapes = [(2, 4, 9, 12), (3, 4, 14, 7), (5, 4, 21, 33)]
    for shape in shapes:
        assert_same_step(model, compiled, torch.randn(shape, device=device))
    assert counter.frame_count == {True: 1, False: 3, None: 2}[dynamic]


def test_compiles_under_autocast(device):
    torch._dynamo.reset()
    model = Layer().to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 9, 12, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        expected, actual = model(x), compiled(x)
    assert expected.dtype == actual.dtype == torch.bfloat16
    assert_near(actual, expected, 1e-2)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiles_with_inductor(memory_format, device):
    # The operator alone: anything else, even the sum over a bias gradient, has inductor compile C++ for half a minute.
    torch._dynamo.reset()
    tensors, geometry = deform_conv2d_inputs(c=12, o=6, bias=False, dtype=torch.float32, device=device)
    tensors["input"] = tensors["input"].contiguous(memory_format=memory_format)
    compiled = torch.compile(deform_conv2d, fullgraph=True)
    assert_all_near(run(compiled, tensors, geometry), run(deform_conv2d, tensors, geometry), 1e-6)


def test_exports_with_dynamic_shapes(device):
    model = Layer().to(device)
    dims = {0: torch.export.Dim("n", min=1, max=64), 2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w", min=4)}
    program = torch.export.export(model, (torch.randn(2, 4, 9, 12, device=device),), dynamic_shapes=(dims,))
    assert [n.target for n in program.graph.nodes].count(torch.ops.dcnv2_d2.deform_conv2d.default) == 1
    for shape in [(2, 4, 9, 12), (1, 4, 30, 5), (5, 4, 4, 64), (33, 4, 7, 8)]:
        x = torch.randn(shape, device=device)
        assert torch.equal(program.module()(x), model(x)), shape


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fake_tensors_foresee_the_output(memory_format):
    tensors, geometry = deform_conv2d_inputs(c=12, o=6, groups=3, offset_groups=2, dtype=torch.bfloat16, **UNEQUAL)
    tensors["input"] = tensors["input"].contiguous(memory_format=memory_format)
    real = deform_conv2d(**tensors, **geometry)
    with FakeTensorMode() as mode:
        fake = deform_conv2d(**{k: mode.from_tensor(t) for k, t in tensors.items()}, **geometry)
    meta = deform_conv2d(**{k: t.to("meta") for k, t in tensors.items()}, **geometry)
    for other in (fake, meta):
        assert (other.shape, other.stride(), other.dtype) == (real.shape, real.stride(), real.dtype)


# Dtypes and formats.


@pytest.mark.parametrize("requires", ["all", "input"])
@pytest.mark.parametrize("mask_dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("offset_dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_every_gradient_keeps_its_dtype(dtype, offset_dtype, mask_dtype, requires, device):
    tensors, geometry = deform_conv2d_inputs(c=4, h=5, w=4, dtype=dtype, offset_dtype=offset_dtype, device=device)
    tensors["mask"] = tensors["mask"].to(mask_dtype)
    leaves = requiring_grad(tensors if requires == "all" else {"input": tensors["input"]})
    out = deform_conv2d(**{**tensors, **leaves}, **geometry)
    out.sum().backward()
    assert out.dtype == dtype
    assert {k: t.grad.dtype for k, t in leaves.items()} == {k: t.dtype for k, t in leaves.items()}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("offset_dtype", [torch.float32, *HALVES], ids=str)
def test_autocast_casts_what_conv2d_casts(dtype, offset_dtype, device):
    # 300.4 pixels to the left is no number of a half type, so a rounded offset would show.
    tensors, geometry = deform_conv2d_inputs(c=12, o=6, w=400, groups=2, dtype=torch.float32, device=device)
    tensors["offset"][..., 320:] -= 300
    tensors |= {k: tensors[k].to(offset_dtype) for k in ("offset", "mask")}

    def autocast(**arguments):
        with torch.autocast(device, dtype=dtype):
            return deform_conv2d(**arguments)

    def by_hand(input, weight, bias, **rest):
        return deform_conv2d(input.to(dtype), weight=weight.to(dtype), bias=bias.to(dtype), **rest)

    actual, expected = run(autocast, tensors, geometry), run(by_hand, tensors, geometry)
    assert actual["output"].dtype == dtype
    assert_same(actual, expected, dtype)
    assert {k: actual[k].dtype for k in tensors} == {k: t.dtype for k, t in tensors.items()}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_reconciles_dtypes_and_can_be_left(dtype, device):
    tensors, geometry = deform_conv2d_inputs(dtype=torch.float32, device=device)
    mixed = {**tensors, "input": tensors["input"].to(dtype)}
    with torch.autocast(device, dtype=dtype):
        plain = F.conv2d(mixed["input"], tensors["weight"], tensors["bias"], padding=1)
        assert deform_conv2d(**mixed, **geometry).dtype == plain.dtype == dtype
        with torch.autocast(device, enabled=False):
            inner = deform_conv2d(**tensors, **geometry)
    assert torch.equal(inner, deform_conv2d(**tensors, **geometry))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_within_the_rounding_of_the_type(dtype, device):
    tensors, geometry = deform_conv2d_inputs(c=32, o=16, dtype=torch.float32, device=device)
    with torch.autocast(device, dtype=dtype):
        out = deform_conv2d(**tensors, **geometry)
    assert_near(out, definition(**tensors, **geometry), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_output_has_the_memory_format_of_the_input(dtype, device):
    tensors, geometry = deform_conv2d_inputs(c=6, o=10, dtype=dtype, device=device)
    channels_last = {**tensors, "input": tensors["input"].contiguous(memory_format=torch.channels_last)}
    window = {**tensors, "input": F.pad(tensors["input"], (1, 2, 2, 1))[..., 2:-1, 1:-2]}
    plain, last, windowed = (run(deform_conv2d, t, geometry) for t in (tensors, channels_last, window))
    assert plain["output"].is_contiguous() and windowed["output"].is_contiguous()
    assert last["output"].is_contiguous(memory_format=torch.channels_last)
    assert_all_near(last, plain, TOLERANCE[dtype])


# Errors.


def broken(name, *words, **changes):
    """A case for test_errors: changes to valid arguments, the argument to be named, numbers to be told."""
    case = "-".join(f"{k} {tuple(v.shape) if torch.is_tensor(v) else v}" for k, v in changes.items())
    return pytest.param(changes, name, words, id=f"{name}-{case}")


# Valid: input (2, 8, 9, 10), weight (6, 4, 3, 3), offset (2, 36, 9, 10), bias (6,), mask (2, 18, 9, 10).
ERRORS = [
    broken("input", "3|8, 9, 10", input=torch.zeros(8, 9, 10)),
    broken("input", "5|1, 2, 8, 9, 10", input=torch.zeros(1, 2, 8, 9, 10)),
    broken("weight", "3|6, 4, 9", weight=torch.zeros(6, 4, 9)),
    broken("offset", "3|36, 9, 10", offset=torch.zeros(36, 9, 10)),
    broken("mask", "3|18, 9, 10", mask=torch.zeros(18, 9, 10)),
    broken("bias", "6", "2|1, 6", bias=torch.zeros(1, 6)),
    broken("bias", "6", "7", bias=torch.zeros(7)),
    broken("bias", "6", "1", bias=torch.zeros(1)),
    broken("offset", "18", "35", offset=torch.zeros(2, 35, 9, 10), mask=None),
    broken("offset", "18", "9", offset=torch.zeros(2, 9, 9, 10), mask=None),
    broken("offset", "18", "0", offset=torch.zeros(2, 0, 9, 10), mask=None),
    broken("offset", "9", "7", offset=torch.zeros(2, 36, 7, 10)),
    broken("offset", "10", "11", offset=torch.zeros(2, 36, 9, 11)),
    broken("offset", "9", "10", offset=torch.zeros(2, 36, 10, 9)),
    broken("offset", "2", "1", offset=torch.zeros(1, 36, 9, 10)),
    broken("mask", "18", "9", mask=torch.zeros(2, 9, 9, 10)),
    broken("mask", "18", "36", mask=torch.zeros(2, 36, 9, 10)),
    broken("mask", "10", "1", mask=torch.zeros(2, 18, 9, 1)),
    broken("mask", "2", "1", mask=torch.zeros(1, 18, 9, 10)),
    broken("input|weight", "8", "3", weight=torch.zeros(6, 3, 3, 3)),
    broken("input|weight", "8", "16", weight=torch.zeros(6, 16, 3, 3)),
    broken("weight", "5", "2", weight=torch.zeros(5, 4, 3, 3), bias=None),
    broken("offset", "8", "3", offset=torch.zeros(2, 54, 9, 10), mask=None),
    broken("offset", "8", "16", offset=torch.zeros(2, 288, 9, 10), mask=None),
    broken("stride", "0", stride=0),
    broken("stride", "-1", stride=(1, -1)),
    broken("padding", "-1", padding=-1),
    broken("padding", "-2", padding=(1, -2)),
    broken("dilation", "0", dilation=0),
    broken("dilation", "-1", dilation=(-1, 1)),
    # (2 - 3) / 2 + 1 is 0 for floor and 1 for C's division.
    broken("input|weight|kernel|output", "2", "3|0", input=torch.zeros(2, 8, 2, 10), offset=torch.zeros(2, 36, 1, 4),
           mask=None, stride=2, padding=0),
    broken("input|weight|kernel|output", "2", "3|0", input=torch.zeros(2, 8, 10, 2), offset=torch.zeros(2, 36, 4, 0),
           mask=None, stride=2, padding=0),
    broken("input|weight|kernel|output", "13|5, 6", dilation=(5, 6), input=torch.zeros(2, 8, 9, 9),
           offset=torch.zeros(2, 36, 1, 0), mask=None),
    broken("weight|kernel", "0", weight=torch.zeros(6, 4, 0, 3)),
    broken("input", "int64", input=torch.zeros(2, 8, 9, 10, dtype=torch.int64)),
    broken("input|weight|bias", "int64", input=torch.zeros(2, 8, 9, 10, dtype=torch.int64),
           weight=torch.zeros(6, 4, 3, 3, dtype=torch.int64), bias=None),
    broken("offset", "int32", offset=torch.zeros(2, 36, 9, 10, dtype=torch.int32)),
    broken("mask", "bool", mask=torch.zeros(2, 18, 9, 10, dtype=torch.bool)),
    broken("weight", "float64", weight=torch.zeros(6, 4, 3, 3, dtype=torch.float64)),
    broken("weight", "float16", input=torch.zeros(2, 8, 9, 10, dtype=torch.float16), bias=None),
    broken("bias", "bfloat16", bias=torch.zeros(6, dtype=torch.bfloat16)),
]  # fmt: skip
ENTRIES = {"function": deform_conv2d, "operator": registered}
SPELLINGS = {"int64": "int64|Long", "int32": "int32|Int", "bool": "bool|Bool", "float64": "float64|Double",
             "float16": "float16|Half", "bfloat16": "bfloat16|BFloat16"}  # fmt: skip


def valid():
    tensors, geometry = deform_conv2d_inputs(c=8, o=6, h=9, w=10, groups=2, offset_groups=2, dtype=torch.float32)
    return {**tensors, **geometry}


def message_of(op, arguments, kinds=ValueError):
    with pytest.raises(kinds) as caught:
        op(**arguments)
    return str(caught.value)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("changes, name, words", ERRORS)
def test_errors(changes, name, words, entry):
    arguments = {**valid(), **changes}
    kinds = (ValueError, TypeError) if SPELLINGS.keys() & set(words) else ValueError
    message = message_of(ENTRIES[entry], arguments, kinds)
    for word in (name, *words):
        assert re.search(rf"(?<![\w-])({SPELLINGS.get(word, word)})(?!\d)", message), f"no {word!r} in: {message}"


def test_the_arguments_that_errors_start_from_are_valid():
    assert deform_conv2d(**valid()).shape == (2, 6, 9, 10)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["input", "offset", "weight", "bias", "mask"])
@pytest.mark.parametrize("other", ["meta", "cuda"])
def test_errors_of_devices(name, other, entry):
    arguments = valid()
    if other == "meta":
        arguments[name] = arguments[name].to("meta")
        message = message_of(ENTRIES[entry], arguments)
    else:
        with FakeTensorMode() as mode:
            arguments = {k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in arguments.items()}
            arguments[name] = torch.empty(arguments[name].shape, device="cuda")
            message = message_of(ENTRIES[entry], arguments)
    for word in ("cpu", other):
        assert word in message, message
    # With a lone input elsewhere, any of the others may be the one reported.
    assert name == "input" or re.search(rf"\b{name}\b", message), message


@needs_cuda
@pytest.mark.parametrize("name", ["offset", "weight", "bias", "mask"])
def test_errors_of_cuda_devices(name):
    # vision #8744: an offset left on the CPU was an illegal access.
    arguments = valid()
    arguments = {k: v.cuda() if torch.is_tensor(v) and k != name else v for k, v in arguments.items()}
    assert re.search(rf"\b{name}\b", message_of(deform_conv2d, arguments))
