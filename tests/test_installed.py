"""The wheel in an empty folder: training as a user runs it, on the smallest generated data set, then every command."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from dcnv2_d2 import __version__, add_dcnv2_config
from dcnv2_d2.config import CONFIGS
from dcnv2_d2.layers import DeformConv2d, ModulatedDeformConv2d
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

ROOT = Path(__file__).parents[1]
QUICK_START = sorted((CONFIGS / "quick_start").glob("*.yaml"))
CONFIG = "quick_start/mask_rcnn_small_mdconv_c3-c5.yaml"
RUN = "output/quick_start"  # as the config says
TINY = [
    *("DATASETS.TRAIN", "('bent_shapes_tiny_train',)", "DATASETS.TEST", "('bent_shapes_tiny_val',)"),
    *("SOLVER.IMS_PER_BATCH", "2"),
]
PICTURES = ["predictions.png", "sampling_points.png", "training_curves.png"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder where the wheel is installed, whose compiled operators are those that are tested here."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("configs", "csrc", "dcnv2_d2"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, source)
    (source / "setup.cfg").write_text("[build]\nbuild_lib = built\n")
    (source / "built/dcnv2_d2").mkdir(parents=True)
    shutil.copy(find_spec("dcnv2_d2._C").origin, source / "built/dcnv2_d2")
    command = [sys.executable, "setup.py", "-q", "build_py", "bdist_wheel", "--skip-build"]
    process = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    (wheel,) = source.glob("dist/*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    return target


@pytest.fixture(scope="module")
def run(installed):
    """run(folder, module, *args): a command in a folder; its process."""

    def run(folder, module, *args):
        env = {**os.environ, "PYTHONPATH": str(installed)}
        env.pop("DETECTRON2_DATASETS", None)
        command = [sys.executable, "-m", f"dcnv2_d2.{module}", *map(str, args)]
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)

    return run


@pytest.fixture(scope="module")
def train(run):
    return lambda folder, *args: run(folder, "train", "--config-file", CONFIG, *args, *TINY)


def results(process):
    """What Detectron2 prints for copying into a spreadsheet: {task: {metric: value}}; the last evaluation counts."""
    assert process.returncode == 0, process.stdout + process.stderr
    lines = re.findall(r"copypaste: (.*)", process.stdout)
    found = {}
    for task, names, values in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        found[task.removeprefix("Task: ")] = dict(zip(names.split(","), map(float, values.split(",")), strict=True))
    return found


def detections(folder):
    return json.loads((folder / RUN / "inference" / "coco_instances_results.json").read_text())


def checkpoint(folder):
    return torch.load(folder / RUN / "model_final.pth", map_location="cpu", weights_only=False)


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    """A run of three iterations: its folder and its process."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, train(folder, "SOLVER.MAX_ITER", "3")


@pytest.fixture(scope="module")
def resumed(train, trained, tmp_path_factory):
    """A copy of that run, continued to five iterations: its folder and its process."""
    folder = shutil.copytree(trained[0], tmp_path_factory.mktemp("resumed"), dirs_exist_ok=True)
    return folder, train(folder, "--resume", "SOLVER.MAX_ITER", "5")


def test_trains_and_evaluates(trained):
    folder, process = trained
    found = results(process)
    assert found.keys() == {"bbox", "segm"}
    for metrics in found.values():
        assert {"AP", "AP50", "AP75"} <= metrics.keys()
        assert all(0 <= metrics[name] <= 100 for name in ("AP", "AP50", "AP75"))
    assert "Starting training from iteration 0" in process.stdout
    state = checkpoint(folder)
    assert state["iteration"] == 2 and "backbone.bottom_up.res3.0.conv1.conv_offset.weight" in state["model"]
    assert all(value.isfinite().all() for value in state["model"].values())


def test_writes_losses_and_statistics_of_the_layers(trained):
    lines = [json.loads(line) for line in (trained[0] / RUN / "metrics.json").read_text().splitlines()]
    names = set().union(*lines)
    assert {"total_loss", "loss_mask", "loss_rpn_cls", "bbox/AP", "segm/AP"} <= names
    layers = {f"{s}.{b}.{c}" for s in ("res3", "res4", "res5") for b in (0, 1) for c in ("conv1", "conv2")}
    assert {name.rpartition("/")[0] for name in names if name.endswith("/offset_mean")} == layers
    masks = [line[f"{layer}/mask_mean"] for line in lines for layer in layers if f"{layer}/mask_mean" in line]
    assert masks and all(m == pytest.approx(1.0, abs=0.1) for m in masks)  # MASK_SCALE is 2


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name, trained):
    folder, process = trained
    assert f"{RUN}/{name}" in process.stdout
    with Image.open(folder / RUN / name) as picture:
        pixels = np.asarray(picture.convert("RGB"))
        assert picture.format == "PNG"
    assert all(300 < side < 4000 for side in pixels.shape[:2])
    assert pixels.std() > 10 and (pixels.max(axis=2) != pixels.min(axis=2)).any()  # neither empty nor without colour


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_it_runs_on_the_cpu(trained):
    process = trained[1]
    assert "MODEL.DEVICE is cuda, but no GPU is available: running on the CPU" in process.stdout + process.stderr


def test_eval_only_repeats_the_evaluation(train, trained, tmp_path):
    weights, expected = trained[0] / RUN / "model_final.pth", detections(trained[0])
    process = train(tmp_path, "--eval-only", "MODEL.WEIGHTS", str(weights))
    tolerance = {"abs": 0.5 if torch.cuda.is_available() else 1e-9}
    for task, metrics in results(trained[1]).items():
        assert results(process)[task] == pytest.approx(metrics, **tolerance, nan_ok=True)
    assert "Starting training" not in process.stdout
    assert (tmp_path / RUN / "predictions.png").is_file()
    # Three iterations may well give an AP of 0, so the detections too.
    actual = detections(tmp_path)
    assert len(expected) > 20
    if not torch.cuda.is_available():
        assert actual == expected


def test_resume_continues(trained, resumed):
    folder, process = resumed
    assert results(process).keys() == {"bbox", "segm"}
    assert "Starting training from iteration 3" in process.stdout
    before, after = checkpoint(trained[0]), checkpoint(folder)
    assert (before["iteration"], after["iteration"]) == (2, 4)
    # Two iterations of the warm-up: far less than the distance to other initial weights.
    name = "backbone.bottom_up.res3.0.conv1.weight"
    old, new = before["model"][name], after["model"][name]
    assert 0 < (new - old).norm() < 0.2 * old.norm()


def optimizer_states(state):
    if isinstance(state, dict):
        if {"state", "param_groups"} <= state.keys():
            yield state["state"]
        for value in state.values():
            yield from optimizer_states(value)


def test_resume_continues_the_optimizer(resumed):
    (state,) = optimizer_states(checkpoint(resumed[0]))
    assert {int(parameter["step"]) for parameter in state.values()} == {5}


def test_the_wheel_is_typed_and_has_the_package_s_version(installed):
    assert (installed / "dcnv2_d2/py.typed").is_file()
    assert (installed / f"dcnv2_d2-{__version__}.dist-info").is_dir()


def test_eval_only_without_weights(train, tmp_path):
    process = train(tmp_path, "--eval-only")
    assert process.returncode == 1 and "Traceback" not in process.stdout + process.stderr
    assert process.stderr.endswith("Error: MODEL.WEIGHTS must be given, those of a trained detector, got ''\n")


def test_data_that_is_missing(run, tmp_path):
    """COCO that was never downloaded, and a misspelt name: told before anything is built, without a traceback."""
    names = ["DATASETS.TRAIN", "coco_2017_train", "DATASETS.TEST", "bent_shapes_tiny_vall"]
    process = run(tmp_path, "train", "--config-file", CONFIG, *names)
    assert process.returncode == 1 and "Traceback" not in process.stdout + process.stderr
    assert process.stderr[process.stderr.index("Error: ") :].splitlines() == [
        "Error: the data sets cannot be used:",
        "  bent_shapes_tiny_vall: no data set has this name; the nearest names are bent_shapes_tiny_val, "
        "bent_shapes_ablation_val, bent_shapes_tiny_train. Files are given as annotations.json:folder_of_images",
        "  coco_2017_train: datasets/coco/annotations/instances_train2017.json does not exist; set "
        f"DETECTRON2_DATASETS to the folder that holds your data sets, now {tmp_path}/datasets",
    ]


def test_unknown_key_is_named(tmp_path):
    """With the script of the checkout."""
    command = [sys.executable, ROOT / "train_net.py", "--config-file", CONFIG, *TINY, "MODEL.DCNV2.MASK_SCALES", "2.0"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode != 0
    assert "MODEL.DCNV2.MASK_SCALES" in process.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_of_ones_own(run, trained, tmp_path):
    """A COCO file and a folder, by three options; and what happens if the third is wrong."""
    (folder,) = (p for p in (trained[0] / "datasets/bent_shapes").glob("tiny_train*") if p.is_dir())  # beside its lock
    files = f"{folder / 'annotations.json'}:{folder / 'images'}"
    options = ["DATASETS.TRAIN", files, "DATASETS.TEST", files, "MODEL.ROI_HEADS.NUM_CLASSES"]
    short = ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2"]
    process = run(tmp_path, "train", "--config-file", CONFIG, *short, *options, "3")
    assert results(process).keys() == {"bbox", "segm"}
    process = run(tmp_path, "train", "--config-file", CONFIG, *short, *options, "5")
    assert process.returncode != 0 and "Starting training" not in process.stdout
    assert f"{files}: has 3 classes" in process.stderr and "MODEL.ROI_HEADS.NUM_CLASSES is 5" in process.stderr


# Of each command, its options and what it prints or writes; {run} is a training run, {image} a picture.
COMMANDS = {
    "analyze_model": (f"{CONFIG} --size 64 96", "| mask_rcnn_small_mdconv_c3-c5 | 1."),
    "analyze_support": (
        "--runs ours={run} --input {image} --at 40,30 --cell 64 --levels 1 --bound 0.9 --output nodes",
        "nodes/image_nodes.png",
    ),
    "collect_env": ("", "{installed}/dcnv2_d2/_C"),
    "convert_checkpoint": ("{folder}/blocks.pth converted", "converted/blocks.pth"),
    "demo": (f"--config-file {CONFIG} --input {{image}} --opts MODEL.WEIGHTS {{run}}/model_final.pth", "1 image"),
    "export_model": (
        f"--config-file {CONFIG} --output model.pt2 --opts MODEL.WEIGHTS {{run}}/model_final.pth",
        "model.pt2",
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command(name, run, installed, trained, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)).save(tmp_path / "image.png")
    torch.save({"a.p_conv.weight": torch.ones(18, 1, 3, 3), "a.p_conv.bias": torch.ones(18),
                "a.conv.weight": torch.ones(1, 1, 3, 3)}, tmp_path / "blocks.pth")  # fmt: skip
    (tmp_path / "empty").mkdir()
    places = {"run": trained[0] / RUN, "image": tmp_path / "image.png", "folder": tmp_path, "installed": installed}
    options, expected = (text.format(**places) for text in COMMANDS[name])
    process = run(tmp_path / "empty", name, *options.split())
    assert process.returncode == 0 and expected in process.stdout, process.stdout + process.stderr


def test_each_command_is_tested():
    commands = {path.stem for path in (ROOT / "dcnv2_d2").glob("*.py") if "__main__" in path.read_text()}
    assert commands == {"train", *COMMANDS}


def test_a_checkout_that_hides_the_installed_package_says_so(installed, tmp_path):
    shutil.copytree(ROOT / "dcnv2_d2", tmp_path / "dcnv2_d2", ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    # Where the tests run from an editable install, its finder would lend its compiled operators.
    code = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]"
    code += "; from dcnv2_d2.ops import _extension; print(_extension.error)"
    command = [sys.executable, "-c", code]
    process = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    assert f"the folder dcnv2_d2 in {tmp_path}, which has no compiled operators, hides the" in process.stdout
    assert f"installed package in {installed}; run in another folder, or in the project's folder: pip" in process.stdout


@pytest.mark.parametrize("path", QUICK_START, ids=lambda path: path.stem)
def test_quick_start_configs_build(path):
    cfg = get_cfg()
    add_dcnv2_config(cfg)
    cfg.merge_from_file(str(path))  # an unknown key is an error
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    layers = [m for m in model.modules() if isinstance(m, DeformConv2d)]
    modulated = [m for m in layers if isinstance(m, ModulatedDeformConv2d)]
    assert bool(layers) == ("dconv" in path.stem) and bool(modulated) == ("mdconv" in path.stem)
    assert len(modulated) in (0, len(layers))
    metadata = [MetadataCatalog.get(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)]
    segments = cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor"
    names, head = ("stuff_classes", "SEM_SEG_HEAD") if segments else ("thing_classes", "ROI_HEADS")
    assert metadata and all(len(m.get(names)) == cfg.MODEL[head].NUM_CLASSES for m in metadata)
