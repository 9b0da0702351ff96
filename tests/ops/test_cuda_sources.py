"""What can be told of the CUDA sources and of what was built from them without a GPU."""

import re
from pathlib import Path

import pytest
import torch
from dcnv2_d2 import ops  # noqa: F401

SOURCES = sorted((Path(__file__).parents[2] / "csrc" / "cuda").iterdir())
OPERATORS = sorted(
    name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("dcnv2_d2::")
)


def launches():
    """(file, kernel, what stands between the end of the launch and the next statement's) of each launch."""
    for source in SOURCES:
        text = re.sub(r"//.*", "", source.read_text())
        for match in re.finditer(r"(\w+_kernel)(?:<[^;]*?>)?<<<[^;]*?>>>\([^;]*\);\s*([^;]*;)", text):
            yield source.name, match[1], match[2].strip()


def test_each_launch_is_checked_at_once():
    found = list(launches())
    assert [row for row in found if row[2] != "C10_CUDA_KERNEL_LAUNCH_CHECK();"] == []
    text = "".join(source.read_text() for source in SOURCES)
    assert len(found) == text.count("<<<")
    kernels = re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", text)
    assert sorted(kernel for _, kernel, _ in found) == sorted(kernels) and len(kernels) == 7


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_host_functions_take_the_device_and_the_stream_of_the_input(source):
    text = source.read_text()
    # No launch on the default stream, no header that toolkits installed for nvcc alone lack.
    assert all(", stream>>>" in config for config in re.findall(r"<<<[^;]*?>>>", text))
    assert "ATen/cuda" not in text
    for function in re.findall(
        r"\n(?:at::Tensor|Gradients|PoolGradients) (?:pool_)?(?:forward|backward)\(.*?\n}", text, re.S
    ):
        guard, stream = function.index("CUDAGuard guard("), function.index("getCurrentCUDAStream()")
        assert guard < stream < function.index("<<<")


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_each_backend_has_a_namespace_of_its_own(backend):
    # Both are linked into one module, where the linker keeps one of two templates of the same name and arguments.
    for source in (SOURCES[0].parents[1] / backend).iterdir():
        found = set(re.findall(r"^namespace (dcnv2\S*) {", source.read_text(), re.M))
        # What is compiled for several instruction sets has one below it for each.
        assert found <= {f"dcnv2::{backend}", "dcnv2::cpu::DCNV2_ISA"}, source.name


@pytest.mark.skipif("CUDA" not in torch.ops.dcnv2_d2.build_info().split(", ")[-1], reason="built without CUDA")
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "build_info"])
def test_each_operator_has_a_cuda_kernel(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dcnv2_d2::{name}", "CUDA")
