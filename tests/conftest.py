import os

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as in train_net.py

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(2)

calm = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ordinary", max_examples=70, derandomize=True, **calm)
settings.register_profile("nightly", max_examples=5000, **calm)
settings.load_profile("ordinary")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        import dcnv2_d2.ops  # noqa: F401

        if not torch._C._dispatch_has_kernel_for_dispatch_key("dcnv2_d2::deform_conv2d", "CUDA"):
            pytest.skip("dcnv2_d2 was built without CUDA")
    return request.param
