"""Where the operators can run here; a test of a device that is not there is not collected."""

import pytest
import torch
from dcnv2_d2.ops import _extension

BUILT_WITH_CUDA = _extension.error is None and torch._C._dispatch_has_kernel_for_dispatch_key(
    "dcnv2_d2::deform_conv2d", "CUDA"
)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() and BUILT_WITH_CUDA else ["cpu"]
needs_cuda = pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU, or dcnv2_d2 was built without CUDA")
