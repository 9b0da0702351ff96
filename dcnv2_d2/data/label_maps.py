"""The generated data sets for semantic segmentation: an image of labels beside each picture, made on first use."""

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
from iopath.common.file_io import file_lock
from PIL import Image

from .generate import SPLITS, _default_root, ensure_generated

PREFIX = "bent_shapes_sem_seg_"


def register_label_maps(root: str | None = None) -> None:
    """Registers `bent_shapes_sem_seg_*` for every generated split `bent_shapes_*`: background is 0, bodies follow.

    Args:
        root: see register_bent_shapes. May be called again.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    root = _default_root() if root is None else root
    for split, spec in SPLITS.items():
        name = PREFIX + split.removeprefix("bent_shapes_")
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        DatasetCatalog.register(name, partial(_load, split, root))
        MetadataCatalog.get(name).set(
            evaluator_type="sem_seg", stuff_classes=["background", *spec.scene.classes], ignore_label=255
        )


def _load(split: str, root: str) -> list[dict]:
    from detectron2.data.datasets import load_coco_json

    json_file, image_root = ensure_generated(split, root)
    records = load_coco_json(json_file, image_root)
    folder = Path(json_file).with_name("labels")
    if not folder.is_dir():
        with file_lock(str(folder)):
            if not folder.is_dir():  # or another process was first
                _draw(records, folder)
    keys = ("file_name", "height", "width", "image_id")
    return [{key: r[key] for key in keys} | {"sem_seg_file_name": str(_label_file(folder, r))} for r in records]


def _label_file(folder: Path, record: dict) -> Path:
    return folder / (Path(record["file_name"]).stem + ".png")


def _draw(records: list[dict], folder: Path) -> None:
    """Writes the labels of all images so that `folder` appears complete or not at all."""
    from detectron2.structures.masks import polygons_to_bitmask

    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    os.makedirs(unfinished)
    for record in records:
        labels = np.zeros((record["height"], record["width"]), np.uint8)
        for body in record["annotations"]:  # in drawing order, the last in front; of the file, from 1
            labels[polygons_to_bitmask(body["segmentation"], *labels.shape)] = body["category_id"]
        Image.fromarray(labels).save(_label_file(unfinished, record))
    unfinished.rename(folder)
