import os
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as in dcnv2_d2
if os.environ.get("DCNV2_D2_HIDE_LIBRARY") == "1":  # as where nothing is compiled
    sys.modules["dcnv2_d2._C"] = None

import pytest
import torch
from hypothesis import HealthCheck, settings

from .devices import BUILT_WITH_CUDA, DEVICES

ROOT = Path(__file__).parents[1]
# For processes that tests start, and for tools; at the end, as it is an installed dcnv2_d2 that is tested.
sys.path += [str(ROOT), str(ROOT / "tools")]

torch.set_num_threads(2)

calm = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ordinary", max_examples=70, derandomize=True, **calm)
settings.register_profile("nightly", max_examples=5000, **calm)
settings.load_profile("ordinary")


def pytest_report_header():
    gpu = "a GPU" if torch.cuda.is_available() else "no GPU"
    return f"devices: {', '.join(DEVICES)} ({gpu}, dcnv2_d2 built with{'' if BUILT_WITH_CUDA else 'out'} CUDA)"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param
