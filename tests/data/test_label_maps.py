"""The generated data sets for segmentation: labels beside the pictures of the data sets for detection."""

import multiprocessing

import numpy as np
import pytest
from dcnv2_d2.data import ensure_generated, register_label_maps
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures.masks import polygons_to_bitmask
from PIL import Image

NAME = "bent_shapes_sem_seg_tiny_val"


@pytest.fixture
def root(tmp_path):
    register_label_maps(str(tmp_path))
    yield str(tmp_path)
    register_label_maps()


def read(record):
    with Image.open(record["sem_seg_file_name"]) as image:
        assert image.mode == "L"
        return np.asarray(image)


def test_labels_are_the_bodies_in_front(root):
    records = DatasetCatalog.get(NAME)
    original = load_coco_json(*ensure_generated("bent_shapes_tiny_val", root))
    assert [r["file_name"] for r in records] == [r["file_name"] for r in original]
    covered = 0
    for record, source in zip(records, original, strict=True):
        labels = read(record)
        assert labels.shape == (record["height"], record["width"]) and "annotations" not in record
        masks = [polygons_to_bitmask(a["segmentation"], *labels.shape) for a in source["annotations"]]
        assert np.array_equal(labels > 0, np.any(masks, axis=0))
        for i, (mask, body) in enumerate(zip(masks, source["annotations"], strict=True)):
            hidden = np.any(masks[i + 1 :], axis=0) if masks[i + 1 :] else np.zeros_like(mask)
            assert (labels[mask & ~hidden] == body["category_id"]).all()
            covered += (mask & hidden).any()
    assert covered  # some body lies behind another, or the order would not be tested
    metadata = MetadataCatalog.get(NAME)
    assert metadata.stuff_classes == ["background", *MetadataCatalog.get("bent_shapes_tiny_val").thing_classes]


def _load(root):
    register_label_maps(root)
    return [read(record).sum() for record in DatasetCatalog.get(NAME)]


def test_processes_that_start_together(root):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(_load, [root, root])
    assert first == second == _load(root)
