import importlib.util
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dcnv2_d2 import collect_env, compat

ROOT = Path(__file__).parents[1]


def table():
    """collect_env()'s rows; the values are padded to one column."""
    lines = collect_env.collect_env().splitlines()
    column = max(map(len, collect_env.FACTS)) + 2
    assert all(line[column - 2 : column] == "  " != line[column] for line in lines)
    rows = {line[:column].rstrip(): line[column:] for line in lines}
    assert list(rows) == list(collect_env.FACTS)
    return rows


def test_command():
    process = subprocess.run(
        [sys.executable, "-m", "dcnv2_d2.collect_env"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    assert [line.split("  ")[0] for line in process.stdout.splitlines()] == list(collect_env.FACTS)


def test_facts():
    rows = table()
    assert rows["dcnv2_d2"].endswith(f" @ {Path(collect_env.__file__).parent}")
    assert rows["Python"].startswith(platform.python_version())
    assert rows["PyTorch"].startswith(torch.__version__)
    assert (f"CUDA {torch.version.cuda}" in rows["PyTorch"]) == (torch.version.cuda is not None)
    assert (rows["GPU"] == "none available") == (not torch.cuda.is_available())
    for name in ("torchvision", "NumPy", "Pillow"):
        assert rows[name][0].isdigit()


@pytest.mark.skipif(compat.find_detectron2() is None, reason="Detectron2 is not installed")
def test_detectron2():
    rows = table()
    assert rows["Detectron2"][0].isdigit() and rows["Detectron2"].endswith(f" @ {compat.find_detectron2()}")
    assert (rows["detectron2._C"] == "built") == compat.has_compiled_part()


@pytest.mark.skipif(importlib.util.find_spec("dcnv2_d2._C") is None, reason="the operators are not compiled")
def test_extension():
    rows = table()
    assert Path(rows["dcnv2_d2._C"]).is_file()
    assert rows["dcnv2_d2._C loads"].startswith("yes; ") and len(rows["dcnv2_d2._C loads"]) > len("yes; ")


def test_extension_not_found(monkeypatch):
    # None in sys.modules hides a module from find_spec.
    monkeypatch.setitem(sys.modules, "dcnv2_d2._C", None)
    assert table()["dcnv2_d2._C"].startswith("not found")


def test_detectron2_not_found(monkeypatch):
    monkeypatch.setattr(compat, "find_detectron2", lambda: None)
    rows = table()
    assert rows["Detectron2"] == f"not installed; {compat.INSTALL_HINT}"
    assert rows["detectron2._C"] == "not installed"


@pytest.mark.parametrize("name", list(collect_env.FACTS))
def test_failure_is_reported_in_one_line(monkeypatch, name):
    def fail():
        raise OSError("libfoo.so:\n  no such file")

    before = table()
    monkeypatch.setitem(collect_env.FACTS, name, fail)
    assert table() == before | {name: "failed: OSError: libfoo.so: no such file"}
