"""dcnv2_d2.demo on pictures, folders and a film, with a detector that has never learnt anything but finds a lot."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from dcnv2_d2 import demo, load_config
from dcnv2_d2.config import CONFIGS
from detectron2.engine import DefaultPredictor
from pycocotools.coco import COCO

from .models import make_model

CONFIG = CONFIGS / "quick_start/mask_rcnn_small_mdconv_c3-c5.yaml"
THRESHOLD = 0.4
FEW = ["TEST.DETECTIONS_PER_IMAGE", "4"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": make_model(CONFIG).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of pictures of different sizes, in different formats and depths, one of them broken; and a film."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    (folder / "below").mkdir()
    for name, size in {"a.png": (96, 128), "a.jpg": (128, 96), "below/a.bmp": (120, 160)}.items():
        small = random.integers(0, 256, (size[0] // 16, size[1] // 16, 3), dtype=np.uint8)
        assert cv2.imwrite(str(folder / name), cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC))
    (folder / "broken.jpg").write_text("not a picture")
    (folder / "notes.txt").write_text("no picture at all")
    writer = cv2.VideoWriter(str(folder / "film.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (128, 96))
    for _ in range(3):
        writer.write(cv2.resize(random.integers(0, 256, (6, 8, 3), dtype=np.uint8), (128, 96)))
    writer.release()
    return folder


def test_of_a_checkout():
    script = Path(__file__).parents[1] / "demo.py"
    process = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert "--confidence-threshold" in process.stdout


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--config-file", str(CONFIG), *map(str, args)])
    demo.main()


def test_folder(weights, pictures, tmp_path, monkeypatch, capsys):
    options = ["--output", tmp_path, "--confidence-threshold", THRESHOLD, "--input", pictures, pictures / "a.png"]
    run(monkeypatch, *options, "--opts", "MODEL.WEIGHTS", weights, *FEW)
    output = capsys.readouterr()
    assert "broken.jpg is left out" in output.out and "8/8" in output.err  # 6 files, 2 more frames
    results = json.loads((tmp_path / "detections.json").read_text())
    names = ["a.jpg", "a.png", "below/a.bmp", "film.avi/000000", "film.avi/000001", "film.avi/000002", "a.png"]
    assert [i["file_name"] for i in results["images"]] == names
    written = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert written == ["a.jpg", "a_2.jpg", "a_3.jpg", "below/a.jpg", "detections.json", "film.mp4"]
    assert [c["id"] for c in results["categories"]] == [1, 2, 3]

    coco = COCO(str(tmp_path / "detections.json"))  # pycocotools can read it
    predictor = DefaultPredictor(load_config(str(CONFIG), ["MODEL.WEIGHTS", str(weights), *FEW]))
    assert [c["name"] for c in results["categories"]] == predictor.metadata.thing_classes
    for image, source in zip(results["images"], names, strict=True):
        if "film" in source:
            continue
        pixels = cv2.imread(str(pictures / source))
        assert (image["height"], image["width"]) == pixels.shape[:2]
        found = predictor(pixels)["instances"]
        found = found[found.scores > THRESHOLD]
        mine = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert len(mine) == len(found) > 0
        np.testing.assert_allclose([a["score"] for a in mine], found.scores.numpy(), rtol=1e-5)
        assert [a["category_id"] - 1 for a in mine] == found.pred_classes.tolist()
        boxes = np.array([a["bbox"] for a in mine])
        np.testing.assert_allclose(boxes[:, :2] + boxes[:, 2:], found.pred_boxes.tensor[:, 2:], rtol=1e-4)
        assert (coco.annToMask(mine[0]) == found.pred_masks[0].numpy()).all()

    picture, source = cv2.imread(str(tmp_path / "below/a.jpg")), cv2.imread(str(pictures / "below/a.bmp"))
    assert picture.shape == source.shape and np.abs(picture.astype(int) - source).mean() > 1  # something is drawn
    film = cv2.VideoCapture(str(tmp_path / "film.mp4"))
    frames = [film.read() for _ in range(4)]
    assert [there for there, _ in frames] == [True, True, True, False] and frames[0][1].shape == (96, 128, 3)


@pytest.mark.parametrize("content, sentence", [([], "got none in"), (None, "must be files and folders, got")])
def test_nothing_to_do(content, sentence, tmp_path, monkeypatch):
    if content is not None:
        (tmp_path / "input").mkdir()
    with pytest.raises(SystemExit, match=f"--input .*{sentence} .*input"):
        run(monkeypatch, "--input", tmp_path / "input", "--output", tmp_path / "output")


@pytest.mark.parametrize("weights", [[], ["MODEL.WEIGHTS", "detectron2://ImageNetPretrained/MSRA/R-50.pkl"]])
def test_without_a_trained_detector(weights, pictures, tmp_path, monkeypatch):
    options = ["--input", pictures, "--output", tmp_path, "--opts", "OUTPUT_DIR", tmp_path, *weights]
    with pytest.raises(SystemExit, match=r"^Error: MODEL\.WEIGHTS must be given, those of a trained detector, got"):
        run(monkeypatch, *options)


def test_class_names_of_a_data_set_that_is_not_there(weights, pictures, tmp_path, monkeypatch):
    options = ["--input", pictures, "--output", tmp_path, "--opts", "MODEL.WEIGHTS", weights, "DATASETS.TEST"]
    with pytest.raises(SystemExit, match=r"nowhere\.json does not exist$"):
        run(monkeypatch, *options, f"{tmp_path}/nowhere.json:{tmp_path}")
    with pytest.raises(SystemExit, match="^Error: no data set has this name; the nearest names are bent_shapes_"):
        run(monkeypatch, *options, "bent_shape_val")
