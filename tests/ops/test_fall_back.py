"""Where there is no kernel: the definitions run instead, in bounded memory, with one warning; and unusual arguments."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dcnv2_d2 import ops
from dcnv2_d2.ops import _extension, definitions
from detectron2.structures import Boxes

from ..reference import assert_near, deform_conv2d_inputs
from ..reference_pool import deform_roi_pool_inputs
from ..reference_ps_pool import deform_ps_roi_pool_inputs

ROOT = Path(__file__).parents[2]


def hidden(arguments):
    """Runs Python with the compiled library hidden."""
    environment = {**os.environ, "DCNV2_D2_HIDE_LIBRARY": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT)


def test_schemas_are_those_of_the_library():
    text = (ROOT / "csrc" / "library.cpp").read_text()
    declared = ["".join(re.findall(r'"(.*?)"', d)) for d in re.findall(r"m\.def\((.*?)\);", text, re.DOTALL)]
    assert [d for d in declared if not d.startswith("build_info")] == list(_extension.SCHEMAS)


# What differs from a kernel; docs/operators.md says how to run every test of the operators so.
HIDDEN = (
    "test_border_table or test_offsets_that_are_no_positions or test_definition or poisoned or no_boxes "
    "or (test_errors and operator) or test_opcheck or (by_differences and conv-v1) or test_fake "
    "or (autocast and not compiles)"
)


def test_the_operators_without_the_library():
    files = [f"tests/ops/test_{name}{kind}.py" for name in ops.__all__ for kind in ("", "_contract")]
    result = hidden(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", HIDDEN, *files, "tests/ops/test_derivatives.py"]
    )
    passed = re.search(r"^(\d+) passed", result.stdout, re.MULTILINE)
    assert result.returncode == 0 and int(passed[1]) > 250, result.stdout[-3000:]


def test_one_warning_with_the_remedy():
    code = """
import sys
sys.modules["dcnv2_d2._C"] = None
import torch, warnings
from dcnv2_d2 import ops
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    for _ in range(2):
        ops.deform_conv2d(x, torch.zeros(1, 18, 3, 3), torch.randn(2, 2, 3, 3)).sum().backward()
        ops.deform_roi_pool(x, [torch.zeros(1, 4)], None, 2)
for w in caught:
    print(w.message)
"""
    result = hidden(["-c", code])
    lines = result.stdout.splitlines()
    assert len(lines) == 2, result
    assert "not built" in lines[0] and "pip install" in lines[0] and "slower" in lines[1]


class Elsewhere:
    """Calls the fall back kernel of an operator, as the dispatcher does for a device without one of its own."""

    def __init__(self, name):
        self.op = getattr(torch.ops.dcnv2_d2, name).default

    def __call__(self, *args):
        key = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
        return self.op.redispatch(key, *args)


def test_a_device_without_kernels():
    tensors, geometry = deform_conv2d_inputs()
    arguments = [*tensors.values(), [1, 1], [1, 1], [1, 1]]
    with pytest.warns(UserWarning, match="no kernels for cpu"):
        from dcnv2_d2.ops import _registrations

        _registrations._warn.cache_clear()
        actual = Elsewhere("deform_conv2d")(*arguments)
    assert_near(actual, ops.deform_conv2d(**tensors, **geometry), 1e-12)


@pytest.mark.parametrize("recorded", [True, False])
def test_chunks_change_nothing(recorded, monkeypatch):
    pair = {"stride": [2, 1], "padding": [1, 0], "dilation": [1, 2]}
    calls = {
        "deform_conv2d": deform_conv2d_inputs(n=3, c=4, groups=2, offset_groups=2, **pair),
        "deform_roi_pool": deform_roi_pool_inputs(sampling_ratio=-1),
        "deform_ps_roi_pool": deform_ps_roi_pool_inputs(group_size=2, classes=2),
    }
    for name, (tensors, geometry) in calls.items():
        define = getattr(definitions, name)
        order = [a.name for a in getattr(torch.ops.dcnv2_d2, name).default._schema.arguments]
        arguments = {**tensors, **geometry}
        results = []
        for chunk in (2**24, 500, 20000):
            monkeypatch.setattr(definitions, "CHUNK", chunk)
            torch.manual_seed(1)
            with torch.set_grad_enabled(recorded):
                out = define(*(arguments[a] for a in order))
                grad = torch.randn(out.shape).to(out)
                backward = [arguments[a] for a in order if a != "bias"]
                wanted = [True] * (4 if name == "deform_conv2d" else 3)
                grads = getattr(definitions, f"{name}_backward")(grad, *backward, wanted)
                double = getattr(definitions, f"{name}_double_backward")(
                    [torch.randn(g.shape).to(g) for g in grads], grad, *backward, wanted
                )
            results.append([out, *grads, *(d for d in double if d is not None)])
        for other in results[1:]:
            for actual, expected in zip(other, results[0], strict=True):
                assert_near(actual, expected, 1e-12, name)


def test_memory_of_the_definition_is_bounded():
    """The columns of this image are 300 MB."""
    tensors, geometry = deform_conv2d_inputs(n=1, c=64, o=1, h=256, w=512, reach=1, dtype=torch.float32, mask=False)
    largest = []

    class Note(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(t.nbytes for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with torch.no_grad(), Note():
        definitions.deform_conv2d(*tensors.values(), [1, 1], [1, 1], [1, 1])
    assert 64 * 256 * 512 * 4 <= max(largest) < 80e6


# Arguments that are no dense tensors


@pytest.mark.parametrize("name", ["input", "offset", "weight", "mask"])
@pytest.mark.parametrize("kind", ["sparse", "quantized"])
def test_sparse_and_quantized_tensors(kind, name):
    tensors, geometry = deform_conv2d_inputs(dtype=torch.float32)
    make = {
        "sparse": lambda t: t.to_sparse(),
        "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    }[kind]
    with pytest.raises((ValueError, TypeError), match=rf"deform_conv2d: {name} must .*(sparse_coo|qint8)"):
        ops.deform_conv2d(**{**tensors, name: make(tensors[name])}, **geometry)
    if name == "input":
        with pytest.raises((ValueError, TypeError), match=r"deform_roi_pool: input must .*(sparse_coo|qint8)"):
            ops.deform_roi_pool(make(tensors["input"]), torch.zeros(1, 5), None, 2)


def test_no_offset():
    with pytest.raises(ValueError, match="deform_conv2d: offset must be a tensor, got None"):
        ops.deform_conv2d(torch.zeros(1, 2, 3, 3), None, torch.zeros(2, 2, 3, 3))


@pytest.mark.parametrize("function", [ops.deform_roi_pool, ops.deform_ps_roi_pool])
@pytest.mark.parametrize("listed", [True, False])
def test_boxes_of_detectron2(listed, function):
    boxes = Boxes(torch.zeros(2, 4))
    with pytest.raises(TypeError, match=rf"{function.__name__}: boxes must .*got Boxes; pass its \.tensor"):
        function(torch.zeros(1, 2, 3, 3), [boxes] if listed else boxes, None, 2)
    for wrong in (5, None, [None], [[0, 0, 1, 1]]):
        with pytest.raises(TypeError, match=rf"{function.__name__}: boxes must"):
            function(torch.zeros(1, 2, 3, 3), wrong, None, 2)
