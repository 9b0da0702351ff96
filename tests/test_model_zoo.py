"""Configs by name, their models, and MODEL_ZOO.md, which is what tools/write_model_zoo.py would write now."""

import csv
import re
from pathlib import Path

import pytest
import torch
import write_model_zoo
from dcnv2_d2 import load_config, model_zoo
from dcnv2_d2.config import CONFIGS
from dcnv2_d2.layers import ModulatedDeformConv2d

QUICK_START = "quick_start/mask_rcnn_small_mdconv_c3-c5.yaml"
GFLOPS = dict(re.findall(r"^\| \[\S+\]\(configs/(\S+)\).*\| +(\S+) +\|$", write_model_zoo.PAGE.read_text(), re.M))
SAMPLE = [
    QUICK_START,
    "COCO/cascade_mask_rcnn/cascade_mask_rcnn_R_50_FPN_3x_mdconv_c3-c5_mdpool.yaml",
    "paper/table2/faster_rcnn_R_50_DC5_800px_mdconv_c3-c5_mdpool.yaml",
]


def test_the_page_is_current():
    """Counting all FLOPs takes minutes: here they are those of the page, and the next test counts some."""
    page = write_model_zoo.make_page(write_model_zoo.count_parameters, lambda name: float(GFLOPS.get(name, "nan")))
    assert page == write_model_zoo.PAGE.read_text(), "run tools/write_model_zoo.py"


@pytest.mark.parametrize("name", SAMPLE)
def test_flops_of_the_page(name):
    assert f"{write_model_zoo.count_gflops(name):.1f}" == GFLOPS[name]


def test_published_figures_belong_to_configs():
    with (CONFIGS / "published.csv").open() as file:
        rows = list(csv.DictReader(file))
    stems = [Path(name).stem for name in write_model_zoo.leaves()]
    assert len(set(stems)) == len(stems) and {row["config"] for row in rows} <= set(stems)
    assert len({(row["config"], row["source"]) for row in rows}) == len(rows)
    assert all(row["source"] and float(row["box_ap"]) for row in rows)
    in_paper = {Path(name).stem for name in write_model_zoo.leaves() if name.startswith("paper/")}
    assert in_paper <= {row["config"] for row in rows if row["source"].startswith("Deformable ConvNets v2 Table")}


def test_a_model_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(model_zoo.get_config_file(QUICK_START)).is_file()
    assert model_zoo.get_config(QUICK_START) == load_config(QUICK_START)
    assert model_zoo.get_config(QUICK_START).DATASETS.TRAIN == ("bent_shapes_train",)
    model = model_zoo.get(QUICK_START, device="cpu")
    assert any(isinstance(m, ModulatedDeformConv2d) for m in model.modules()) and model.device == torch.device("cpu")


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    """And may build on a config of the package; where its output goes is in the file, in options, or is its name."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / QUICK_START
    path.parent.mkdir()
    path.write_text(f'_BASE_: "{model_zoo.get_config_file(QUICK_START)}"\nSOLVER:\n  MAX_ITER: 7\n')
    assert load_config(QUICK_START).SOLVER.MAX_ITER == 7 and load_config(QUICK_START).OUTPUT_DIR == "output/quick_start"
    (tmp_path / "own.yaml").write_text("SOLVER:\n  MAX_ITER: 7\n")
    assert load_config("own.yaml").OUTPUT_DIR == "output/own"
    assert load_config("own.yaml", ["OUTPUT_DIR", "elsewhere"]).OUTPUT_DIR == "elsewhere"


@pytest.mark.parametrize("find", [load_config, model_zoo.get_config_file, model_zoo.get])
def test_an_unknown_name(find):
    with pytest.raises(ValueError, match="^mask_rcnn_smal.yaml must be .*; similar are quick_start/mask_rcnn_small_md"):
        find("mask_rcnn_smal.yaml")
    with pytest.raises(ValueError, match="^xyz must be a file or .* one of dcnv2_d2's configs, and is neither$"):
        find("xyz")
