"""VOC's detection: AP at 0.7 by both definitions, and training and evaluation from a config on a small VOC folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dcnv2_d2.evaluation import PascalVOCEvaluator
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import register_pascal_voc
from detectron2.evaluation.pascal_voc_evaluation import voc_eval
from detectron2.structures import Boxes, Instances
from PIL import Image

ROOT = Path(__file__).parents[2]


def write_voc(folder, year, split, objects, size=(120, 90)):
    """A VOC folder with noise for pictures. objects: image -> [(class, xmin, ymin, xmax, ymax, difficult), ...]"""
    for sub in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for name, boxes in objects.items():
        noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / "JPEGImages" / f"{name}.jpg")
        bodies = "".join(
            f"<object><name>{kind}</name><pose>Left</pose><truncated>0</truncated><difficult>{difficult}</difficult>"
            f"<bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for kind, x0, y0, x1, y1, difficult in boxes
        )
        text = f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{bodies}</annotation>"
        (folder / "Annotations" / f"{name}.xml").write_text(text)
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in objects))


OBJECTS = {
    "000001": [("cat", 10, 10, 60, 60, 0), ("dog", 30, 20, 100, 80, 0)],
    "000002": [("cat", 20, 20, 80, 70, 0), ("cat", 5, 5, 40, 30, 1)],
    "000003": [("dog", 15, 15, 65, 75, 0), ("cat", 50, 40, 110, 85, 0)],
}
# Of quality that falls: hits at both thresholds, at 0.5 alone, at none, a duplicate, and a difficult object.
DETECTIONS = {
    "000001": [("cat", 0.9, 10, 10, 60, 60), ("dog", 0.8, 30, 20, 100, 60), ("cat", 0.7, 12, 10, 60, 60)],
    "000002": [("cat", 0.6, 20, 20, 80, 49), ("cat", 0.95, 5, 5, 40, 30), ("dog", 0.4, 1, 1, 10, 10)],
    "000003": [("dog", 0.5, 15, 15, 65, 74), ("cat", 0.3, 50, 40, 110, 84)],
}


@pytest.fixture(params=[2007, 2012])
def dataset(request, tmp_path):
    write_voc(tmp_path, request.param, "test", OBJECTS)
    name = f"small_voc_{request.param}"
    register_pascal_voc(name, str(tmp_path), "test", request.param, class_names=("cat", "dog"))
    yield name, request.param, tmp_path
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_ap70_agrees_with_detectron2s_own_function(dataset):
    name, year, folder = dataset
    evaluator = PascalVOCEvaluator(name)
    evaluator.reset()
    for image, detections in DETECTIONS.items():
        found = Instances((90, 120))
        boxes = torch.tensor([d[2:] for d in detections], dtype=torch.float32)
        found.pred_boxes = Boxes(boxes - torch.tensor([1.0, 1, 0, 0]))  # VOC counts pixels from 1
        found.scores = torch.tensor([d[1] for d in detections])
        found.pred_classes = torch.tensor([("cat", "dog").index(d[0]) for d in detections])
        evaluator.process([{"image_id": image}], [{"instances": found}])
    results = evaluator.evaluate()["bbox"]

    def own(threshold, eleven):
        aps = []
        for kind in ("cat", "dog"):
            lines = [
                f"{image} {score:.3f} {x0:.1f} {y0:.1f} {x1:.1f} {y1:.1f}"
                for image, detections in DETECTIONS.items()
                for k, score, x0, y0, x1, y1 in detections
                if k == kind
            ]
            (folder / f"{kind}.txt").write_text("\n".join(lines))
            aps.append(
                voc_eval(
                    str(folder / "{}.txt"),
                    str(folder / "Annotations" / "{}.xml"),
                    str(folder / "ImageSets" / "Main" / "test.txt"),
                    kind,
                    ovthresh=threshold,
                    use_07_metric=eleven,
                )[2]
            )
        return 100 * np.mean(aps)

    for threshold in (0.5, 0.7):
        for definition, eleven in (("11point", True), ("area", False)):
            key = f"AP{round(100 * threshold)}"
            assert results[f"{key}-{definition}"] == pytest.approx(own(threshold, eleven))
        assert results[key] == pytest.approx(own(threshold, year == 2007))
    assert 0 < results["AP70"] < results["AP50"] < 100 and {"AP", "AP75"} <= results.keys()
    assert results["AP70-11point"] != pytest.approx(results["AP70-area"])


SMALL = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.RFCN.CONV_DIM", "16", "MODEL.WEIGHTS", ""),
    *(
        "SOLVER.MAX_ITER",
        "2",
        "SOLVER.IMS_PER_BATCH",
        "2",
        "INPUT.MIN_SIZE_TRAIN",
        "(96,)",
        "INPUT.MIN_SIZE_TEST",
        "96",
    ),
    *("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0"),  # there are no trained weights
    *("DATALOADER.NUM_WORKERS", "0", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
]


@pytest.mark.parametrize("config", ["rfcn_R_101_voc_dconv3_dpool", "rpn_R_101_voc_dconv3"])
def test_training_and_evaluation_from_the_config(config, tmp_path):
    """The data are found by $DETECTRON2_DATASETS alone; the other options make the model small."""
    (path,) = (ROOT / "configs" / "dcnv1").glob(f"*/{config}.yaml")
    for folder, year, split in (
        ("VOC2007", 2007, "trainval"),
        ("VOC2012", 2012, "trainval"),
        ("VOC2007", 2007, "test"),
    ):
        write_voc(tmp_path / folder, year, split, OBJECTS)
    command = [sys.executable, "train_net.py", "--config-file", str(path), *SMALL, "OUTPUT_DIR", str(tmp_path / "out")]
    env = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    assert {"bbox/AP50", "bbox/AP70", "bbox/AP70-11point", "bbox/AP70-area"} <= lines[-1].keys()
    assert all(np.isfinite(line["total_loss"]) for line in lines if "total_loss" in line)
    assert (tmp_path / "out" / "model_final.pth").is_file()
