"""What dcnv2_d2.ops.deform_ps_roi_pool promises besides its numbers: registration, export, dtypes, formats, errors."""

import inspect
import re

import pytest
import torch
from dcnv2_d2.ops import deform_ps_roi_pool, deform_roi_pool
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from ..devices import needs_cuda
from ..reference import TOLERANCE, assert_all_near, assert_near, opcheck, run
from ..reference_ps_pool import check, deform_ps_roi_pool_inputs, random_grad
from ..reference_ps_pool import deform_ps_roi_pool as definition

HALVES = [torch.float16, torch.bfloat16]
FORMATS = [torch.contiguous_format, torch.channels_last]
GIVEN = [{"offset": o, "mask": m} for o in (True, False) for m in (True, False)]


def positional(
    input, boxes, offset, output_size, spatial_scale=1.0, sampling_ratio=4, gamma=0.1, group_size=1, mask=None
):
    return input, boxes, offset, mask, list(_pair(output_size)), spatial_scale, sampling_ratio, gamma, group_size


def registered(*args, **kwargs):
    """The registered operator behind the function's signature."""
    return torch.ops.dcnv2_d2.deform_ps_roi_pool(*positional(*args, **kwargs))


def requiring_grad(tensors):
    return {k: None if t is None else t.requires_grad_() for k, t in tensors.items()}


def test_signature_is_deform_roi_pools_with_a_group_size():
    ours, family = (dict(inspect.signature(f).parameters) for f in (deform_ps_roi_pool, deform_roi_pool))
    assert [k for k in ours if k != "group_size"] == list(family)
    defaults = {k: p.default for k, p in ours.items() if p.default is not p.empty}
    assert defaults == {"spatial_scale": 1.0, "sampling_ratio": 4, "gamma": 0.1, "group_size": 1, "mask": None}


def test_schema():
    op = torch.ops.dcnv2_d2.deform_ps_roi_pool.default
    assert [a.name for a in op._schema.arguments] == [
        "input", "boxes", "offset", "mask", "output_size", "spatial_scale", "sampling_ratio", "gamma", "group_size"
    ]  # fmt: skip
    assert not op._schema.is_mutable
    assert hasattr(torch.ops.dcnv2_d2, "deform_ps_roi_pool_backward")


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_function_and_operator_agree(given, device):
    tensors, geometry = deform_ps_roi_pool_inputs(**given, device=device)
    assert_all_near(run(deform_ps_roi_pool, tensors, geometry), run(registered, tensors, geometry), 1e-12)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(
    "config",
    [
        *GIVEN,
        {"group_size": 2, "classes": 2, "parts": 2},
        {"dtype": torch.float32, "n": 3, "output_size": 1},
        {"dtype": torch.bfloat16, "offset_dtype": torch.float32, "boxes_dtype": torch.float32},
        {"k": 0, "dtype": torch.float32, "group_size": 2},
        {"k": 0, "mask": False, "offset": False},
    ],
    ids=str,
)
def test_opcheck(config, memory_format, device):
    tensors, geometry = deform_ps_roi_pool_inputs(**{"k": 3, "h": 5, "w": 6, **config}, device=device)
    tensors["input"] = tensors["input"].contiguous(memory_format=memory_format)
    arguments = positional(**requiring_grad(tensors), **geometry)
    # bfloat16: the traced graph may round sums at other places than the eager one.
    tolerance = TOLERANCE[config.get("dtype", torch.float64)]
    opcheck(torch.ops.dcnv2_d2.deform_ps_roi_pool.default, arguments, tolerance)


@pytest.mark.parametrize("wanted", ["input", "offset", "mask"])
def test_a_single_gradient_on_its_own(wanted, device):
    tensors, geometry = deform_ps_roi_pool_inputs(device=device)
    expected = run(deform_ps_roi_pool, tensors, geometry)[wanted]
    leaf = tensors[wanted].requires_grad_()
    deform_ps_roi_pool(**tensors, **geometry).sum().backward()
    assert_near(leaf.grad, expected, 1e-12)
    assert all(t.grad is None for k, t in tensors.items() if k != wanted)


def test_boxes_have_no_gradient(device):
    tensors, geometry = deform_ps_roi_pool_inputs(device=device)
    geometry["boxes"].requires_grad_()
    run(deform_ps_roi_pool, tensors, geometry)
    assert geometry["boxes"].grad is None


@pytest.mark.parametrize("given", GIVEN, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("n, listed", [(0, False), (2, False), (2, True)])
def test_no_boxes(n, listed, memory_format, given, device):
    tensors, geometry = deform_ps_roi_pool_inputs(k=0, group_size=2, **given, dtype=torch.float32, device=device)
    tensors["input"] = tensors["input"][:n].contiguous(memory_format=memory_format)
    if listed:
        geometry["boxes"] = [geometry["boxes"][:, 1:]] * n
    result = run(deform_ps_roi_pool, tensors, geometry)
    output = result.pop("output")
    assert output.shape == (0, 4, 3, 5) and output.dtype == torch.float32
    assert {k: t.shape for k, t in result.items()} == {k: t.shape for k, t in tensors.items() if t is not None}
    assert not result["input"].any()


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_to_the_bit_on_the_cpu(dtype, memory_format):
    # Ten boxes of each image lie over each other: many samples add to the same pixels; parts serve several bins.
    tensors, geometry = deform_ps_roi_pool_inputs(
        n=3, c=70, k=30, output_size=7, parts=3, classes=2, group_size=2, margin=False, dtype=dtype
    )
    tensors["input"] = tensors["input"].contiguous(memory_format=memory_format)
    first = run(deform_ps_roi_pool, tensors, geometry)
    for _ in range(3):
        again = run(deform_ps_roi_pool, tensors, geometry)
        assert [k for k in first if not torch.equal(first[k], again[k])] == []


# Compilation and export.


class Pool(nn.Module):
    """Modulated pooling as in mmdetection: offsets and mask predicted from plain pooling; groups, coarse parts."""

    def __init__(self):
        super().__init__()
        self.geometry = {"output_size": (2, 3), "spatial_scale": 0.5, "sampling_ratio": 2, "group_size": 2}
        self.predict = nn.Linear(3 * 6, 2 * 2 + 6)

    def forward(self, x, boxes):
        plain = deform_ps_roi_pool(x, boxes, None, **self.geometry)
        predicted = self.predict(plain.flatten(1))
        offset, mask = predicted[:, :4].view(-1, 2, 1, 2), predicted[:, 4:].sigmoid().view(-1, 1, 2, 3)
        return deform_ps_roi_pool(x, boxes, offset, **self.geometry, mask=mask).relu()


def image_and_boxes(k, h=9, w=12, device="cpu"):
    tensors, geometry = deform_ps_roi_pool_inputs(
        c=3, h=h, w=w, k=k, group_size=2, margin=False, dtype=torch.float32, device=device
    )
    return tensors["input"], geometry["boxes"]


def assert_same_step(model, compiled, x, boxes):
    """Same output, same gradients of the image and of the parameters."""
    results = []
    for module in (model, compiled):
        image = x.detach().clone().requires_grad_()
        out = module(image, boxes)
        results.append([out, *torch.autograd.grad(out.square().sum(), [image, *model.parameters()])])
    for expected, actual in zip(*results, strict=True):
        assert_near(actual, expected, 1e-4)


@pytest.mark.parametrize("dynamic", [True, None])
def test_compiles_whole_for_any_number_of_boxes(dynamic, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = Pool().to(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter)
    graphs = []
    for k in (7, 10, 300):  # no other size, which PyTorch would take for the same number
        assert_same_step(model, compiled, *image_and_boxes(k, device=device))
        graphs.append(counter.frame_count)
    assert 0 < graphs[0 if dynamic else 1] == graphs[2]
    for k in (0, 1):  # which PyTorch always compiles for themselves
        assert_same_step(model, compiled, *image_and_boxes(k, device=device))


def test_compiles_whole_with_a_list_of_boxes_and_under_autocast(device):
    torch._dynamo.reset()
    model, (x, boxes) = Pool().to(device), image_and_boxes(8, device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_step(model, compiled, x, [boxes[:3, 1:], boxes[3:, 1:]])
    with torch.autocast(device, dtype=torch.bfloat16):
        expected, actual = model(x, boxes), compiled(x, boxes)
    assert expected.dtype == actual.dtype == torch.bfloat16
    assert_near(actual, expected, 1e-2)


def test_exports_with_dynamic_shapes(device):
    model = Pool().to(device)
    dims = ({2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w", min=4)}, {0: torch.export.Dim("k", max=2**20)})
    program = torch.export.export(model, image_and_boxes(6, device=device), dynamic_shapes=dims)
    assert [n.target for n in program.graph.nodes].count(torch.ops.dcnv2_d2.deform_ps_roi_pool.default) == 2
    for k, h, w in [(6, 9, 12), (1, 30, 5), (300, 4, 64), (0, 9, 12)]:
        arguments = image_and_boxes(k, h, w, device=device)
        assert torch.equal(program.module()(*arguments), model(*arguments)), (k, h, w)


# Dtypes and formats.


@pytest.mark.parametrize("boxes_dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("offset_dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_boxes_offset_and_mask_of_another_dtype(dtype, offset_dtype, boxes_dtype, device):
    tensors, geometry = deform_ps_roi_pool_inputs(
        c=5, k=4, output_size=(3, 2), dtype=dtype, offset_dtype=offset_dtype, boxes_dtype=boxes_dtype, device=device
    )
    check(deform_ps_roi_pool, tensors, geometry, tolerance=max(TOLERANCE[dtype], TOLERANCE[offset_dtype]))
    result = run(deform_ps_roi_pool, tensors, geometry)
    assert {k: result[k].dtype for k in tensors} == {k: t.dtype for k, t in tensors.items()}
    assert result["output"].dtype == dtype
    # The rounding of an offset's gradient is no excuse for the output.
    assert_near(result["output"], definition(**tensors, **geometry), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("other_dtype", [torch.float32, *HALVES], ids=str)
def test_autocast_casts_the_input_only(dtype, other_dtype, device):
    # A position near 300 is rounded by the half types to a quarter of a pixel or worse, so rounded boxes would show.
    dtypes = {"dtype": torch.float32, "offset_dtype": other_dtype, "boxes_dtype": torch.float32}
    tensors, geometry = deform_ps_roi_pool_inputs(w=400, spatial_scale=0.9, **dtypes, device=device)

    def autocast(**arguments):
        with torch.autocast(device, dtype=dtype):
            return deform_ps_roi_pool(**arguments)

    def by_hand(input, **rest):
        return deform_ps_roi_pool(input.to(dtype), **rest)

    actual, expected = run(autocast, tensors, geometry), run(by_hand, tensors, geometry)
    assert actual["output"].dtype == dtype and torch.equal(actual["output"], expected["output"])
    assert_all_near(actual, expected, TOLERANCE[dtype])
    assert {k: actual[k].dtype for k in tensors} == {k: t.dtype for k, t in tensors.items()}
    assert_near(actual["output"], definition(**tensors, **geometry), TOLERANCE[dtype])


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "a window": lambda t: F.pad(t, (1, 2, 2, 1))[..., 2:-1, 1:-2],
    "channel slice": lambda t: torch.cat([t.flip(1), t, t], 1)[:, t.shape[1] : 2 * t.shape[1]],
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["input", "offset", "mask", "grad_output", "all"])
def test_layouts(name, layout, device):
    tensors, geometry = deform_ps_roi_pool_inputs(c=6, group_size=2, device=device)
    tensors["grad_output"] = random_grad(tensors, geometry)
    laid = {k: LAYOUTS[layout](t) if name in (k, "all") else t for k, t in tensors.items()}
    assert name == "mask" or any(not t.is_contiguous() for t in laid.values())

    def run_with(grad_output, **values):
        leaves = {k: t.detach().requires_grad_() for k, t in values.items()}
        out = deform_ps_roi_pool(**leaves, **geometry)
        return {"output": out, **dict(zip(leaves, torch.autograd.grad(out, leaves.values(), grad_output), strict=True))}

    assert_all_near(run_with(**laid), run_with(**{k: t.contiguous() for k, t in laid.items()}), 1e-12)


def test_layouts_of_boxes(device):
    tensors, geometry = deform_ps_roi_pool_inputs(device=device)
    expected, boxes = deform_ps_roi_pool(**tensors, **geometry), geometry.pop("boxes")
    for laid in (boxes.T.contiguous().T, boxes.repeat_interleave(2, 0)[::2], torch.cat([-boxes, boxes], 1)[:, 5:]):
        assert not laid.is_contiguous() and torch.equal(laid, boxes)
        assert torch.equal(deform_ps_roi_pool(**tensors, **geometry, boxes=laid), expected)


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_output_has_the_memory_format_of_the_input(dtype, group_size, device):
    tensors, geometry = deform_ps_roi_pool_inputs(dtype=dtype, group_size=group_size, device=device)
    plain = run(deform_ps_roi_pool, tensors, geometry)
    assert plain["output"].is_contiguous()
    for name in ("channels_last", "permuted", "a window"):
        result = run(deform_ps_roi_pool, {**tensors, "input": LAYOUTS[name](tensors["input"])}, geometry)
        expected = torch.channels_last if name == "channels_last" else torch.contiguous_format
        assert result["output"].is_contiguous(memory_format=expected), name
        assert_all_near(result, plain, TOLERANCE[dtype])


# Errors.


def broken(name, *words, **changes):
    """A case for test_errors: changes to valid arguments, the argument to be named, words to be told."""
    flat = [(k, v) for k, vs in changes.items() for v in (vs if isinstance(vs, list) else [vs])]
    case = "-".join(f"{k} {tuple(v.shape) if torch.is_tensor(v) else v}" for k, v in flat)
    return pytest.param(changes, name, words, id=f"{name}-{case}")


# Valid: input (2, 24, 9, 10), group_size 2, boxes (3, 5), offset (3, 4, 2, 3), mask (3, 1, 4, 6), output_size (4, 6).
ERRORS = [
    broken("input", "24, 9, 10", input=torch.zeros(24, 9, 10)),
    broken("input", "4", "22", input=torch.zeros(2, 22, 9, 10)),
    broken("input", "9", "24", group_size=3),
    broken("boxes", "5", "4", boxes=torch.zeros(3, 4)),
    broken("boxes", "5", r"1|\(?5,?\)?", boxes=torch.zeros(5)),
    broken("offset", "3", "2, 2, 3", offset=torch.zeros(2, 2, 3)),
    broken("offset", "3", "1, 4, 2, 3", offset=torch.zeros(1, 4, 2, 3)),
    broken("offset", "3, 2", "3, 3, 2, 3", offset=torch.zeros(3, 3, 2, 3)),
    broken("offset", "0", offset=torch.zeros(3, 0, 2, 3)),
    broken("offset", "0", offset=torch.zeros(3, 4, 0, 3)),
    broken("offset", "6", "8", "4", offset=torch.zeros(3, 8, 2, 3)),  # 4 classes of 6 channels
    broken("mask", "3", "3, 4, 6", mask=torch.zeros(3, 4, 6), offset=None),
    broken("mask", "1", "2", mask=torch.zeros(3, 2, 4, 6)),
    broken("mask", "3", "2", mask=torch.zeros(2, 1, 4, 6), offset=None),
    broken("mask", "4", "5", mask=torch.zeros(3, 1, 5, 6)),
    broken("offset|boxes", "3", "2", boxes=torch.zeros(2, 5)),
    broken("output_size", "0", output_size=(4, 0)),
    broken("output_size", "-1", output_size=(-1, 6), offset=None, mask=None),
    broken("spatial_scale", "0", spatial_scale=0.0),
    broken("sampling_ratio", "0", sampling_ratio=0),
    broken("sampling_ratio", "-1", sampling_ratio=-1),
    broken("group_size", "0", group_size=0),
    broken("group_size", "-2", group_size=-2),
    broken("input", "int64", input=torch.zeros(2, 24, 9, 10, dtype=torch.int64)),
    broken("boxes", "int64", boxes=torch.zeros(3, 5, dtype=torch.int64)),
    broken("offset", "int32", offset=torch.zeros(3, 4, 2, 3, dtype=torch.int32)),
    broken("mask", "bool", mask=torch.zeros(3, 1, 4, 6, dtype=torch.bool)),
]
LISTS = [
    broken("boxes", "2", "1", boxes=[torch.zeros(3, 4)]),
    broken("boxes", "4", "5", boxes=[torch.zeros(1, 4), torch.zeros(2, 5)]),
]
ENTRIES = {"function": deform_ps_roi_pool, "operator": registered}
SPELLINGS = {"int64": "int64|Long", "int32": "int32|Int", "bool": "bool|Bool"}


def valid():
    tensors, geometry = deform_ps_roi_pool_inputs(
        c=6, h=9, w=10, k=3, output_size=(4, 6), parts=(2, 3), classes=2, group_size=2, dtype=torch.float32
    )
    return {**tensors, **geometry}


def message_of(op, arguments, kind=ValueError):
    with pytest.raises(kind, match=r"^deform_ps_roi_pool: ") as caught:
        op(**arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    "changes, name, words, entry",
    [pytest.param(*p.values, entry, id=f"{p.id}-{entry}") for p in ERRORS for entry in ENTRIES]
    + [pytest.param(*p.values, "function", id=f"{p.id}-list") for p in LISTS],
)
def test_errors(changes, name, words, entry):
    kind = TypeError if SPELLINGS.keys() & set(words) else ValueError
    message = message_of(ENTRIES[entry], {**valid(), **changes}, kind)
    for word in (name, *words):
        assert re.search(rf"(?<![\w-])({SPELLINGS.get(word, word)})(?!\d)", message), f"no {word!r} in: {message}"


def test_the_arguments_that_errors_start_from_are_valid():
    assert deform_ps_roi_pool(**valid()).shape == (3, 6, 4, 6)


@pytest.mark.parametrize("index", [2.0, -1.0, 1e10, -1e10, 2.0**32, 2.0**63, *map(float, ("nan", "inf", "-inf"))])
def test_an_image_that_is_not_there_is_an_error_on_the_cpu(index):
    arguments = valid()
    arguments["boxes"][1, 0] = index
    assert re.search(r"\bboxes\b", message_of(deform_ps_roi_pool, arguments))
    arguments["boxes"][1, 1:] = float("nan")  # no sample is read, but the index is as wrong
    assert re.search(r"\bboxes\b", message_of(deform_ps_roi_pool, arguments))
    assert re.search(r"\bboxes\b", message_of(deform_ps_roi_pool, {**valid(), "input": torch.zeros(0, 24, 9, 10)}))


@needs_cuda
@pytest.mark.parametrize("name", ["boxes", "offset", "mask"])
def test_errors_of_cuda_devices(name):
    arguments = {k: v.cuda() if torch.is_tensor(v) and k != name else v for k, v in valid().items()}
    assert re.search(rf"\b{name}\b", message_of(deform_ps_roi_pool, arguments))
