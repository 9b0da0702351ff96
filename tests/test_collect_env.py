import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dcnv2_d2 import collect_env, compat

ROOT = Path(__file__).parents[1]


@pytest.fixture
def report(monkeypatch):
    """The package's own rows of the report, and the rest of it, with changed facts."""

    def collect(facts=None, environment=None):
        for name, fact in (facts or {}).items():
            monkeypatch.setitem(collect_env.FACTS, name, fact)
        if environment:
            monkeypatch.setattr(collect_env, "_environment", environment)
        ruler, *lines = collect_env.collect_env().splitlines()
        column, end = ruler.index("  ") + 2, lines.index(ruler)
        rows = {line[:column].rstrip(): line[column:].rstrip() for line in lines[:end]}
        assert list(rows) == list(collect_env.FACTS)
        return rows, "\n".join(lines[end + 1 :])

    return collect


def test_command():
    process = subprocess.run(
        [sys.executable, "-m", "dcnv2_d2.collect_env"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    for part in (*collect_env.FACTS, torch.__version__, np.__version__):
        assert part in process.stdout
    assert "failed" not in process.stdout


def test_facts(report):
    rows, rest = report()
    assert rows["dcnv2_d2"].endswith(f" @ {Path(collect_env.__file__).parent}")
    assert torch.__version__ in rest and sys.version.split()[0] in rest and np.__version__ in rest


@pytest.mark.skipif(compat.find_detectron2() is None, reason="Detectron2 is not installed")
def test_detectron2(report):
    rows, _ = report()
    assert rows["Detectron2"].startswith(str(compat.find_detectron2()))
    assert rows["Detectron2"].endswith(", compiled") == compat.has_compiled_part()


@pytest.mark.skipif(importlib.util.find_spec("dcnv2_d2._C") is None, reason="the operators are not compiled")
def test_extension(report):
    rows, _ = report()
    assert Path(rows["dcnv2_d2._C"]).is_file()
    assert rows["dcnv2_d2._C loads"].startswith("yes; ") and len(rows["dcnv2_d2._C loads"]) > len("yes; ")


def test_extension_not_found(monkeypatch, report):
    # None in sys.modules hides a module from find_spec.
    monkeypatch.setitem(sys.modules, "dcnv2_d2._C", None)
    assert report()[0]["dcnv2_d2._C"].startswith("not found")


def test_detectron2_not_found(monkeypatch, report):
    monkeypatch.setattr(compat, "find_detectron2", lambda: None)
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "PyTorch's own report")
    rows, rest = report()
    assert rows["Detectron2"] == f"not installed; {compat.INSTALL_HINT}" and rest == "PyTorch's own report"


def fail():
    raise OSError("libfoo.so:\n  no such file")


@pytest.mark.parametrize("name", list(collect_env.FACTS))
def test_failure_is_reported_in_one_line(report, name):
    before, _ = report()
    assert report({name: fail})[0] == before | {name: "failed: OSError: libfoo.so: no such file"}


def test_a_failing_report_of_detectron2_leaves_our_own(report):
    before, _ = report()
    after, rest = report(environment=fail)
    assert after == before and rest.startswith("failed: OSError: libfoo.so")
