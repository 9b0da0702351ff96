"""Data sets by name: parsed once a run, and sentences about those that are not there."""

import json
from pathlib import Path

import pytest
from dcnv2_d2 import load_config
from dcnv2_d2.data.catalog import DatasetNotFound, forget, get_records, parse_once
from dcnv2_d2.data.check import check_datasets
from dcnv2_d2.engine import Trainer
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

CONFIG = Path(__file__).parents[2] / "configs/quick_start/mask_rcnn_small_mdconv_c3-c5.yaml"


@pytest.mark.parametrize(
    "name, sentence",
    [
        (
            "bent_shape_train",
            r"nearest names are bent_shapes_train, (bent_shapes_\w+(, |\.)){2} ?Files",
        ),
        ("coco_2017_valid", r"nearest names are coco_2017_val"),
        ("xyzzy", r"\. Files are given as annotations\.json:folder_of_images"),
    ],
)
def test_a_typo(name, sentence):
    cfg = load_config(str(CONFIG), ["DATASETS.TRAIN", name, "DATASETS.TEST", "bent_shapes_tiny_val"])
    with pytest.raises(ValueError, match=f"{name}: no data set has this name.*{sentence}"):
        check_datasets(cfg)


def test_missing_coco(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    cfg = load_config(str(CONFIG), ["DATASETS.TRAIN", "coco_2017_train", "DATASETS.TEST", "coco_2017_val"])
    with pytest.raises(ValueError) as error:
        check_datasets(cfg)
    for part in ("val", "train"):
        assert (
            f"coco_2017_{part}: datasets/coco/annotations/instances_{part}2017.json does not exist; "
            f"set DETECTRON2_DATASETS to the folder that holds your data sets, now {tmp_path}/datasets"
        ) in str(error.value)
    assert not any(record.exc_info for record in caplog.records)  # no traceback


def test_a_missing_file_elsewhere(tmp_path):
    name = f"{tmp_path}/annotations.json:{tmp_path}"
    load_config(str(CONFIG), ["DATASETS.TRAIN", name])
    with pytest.raises(DatasetNotFound, match=rf"^{tmp_path}/annotations\.json does not exist$"):
        get_records(name)


@pytest.fixture
def counted(tmp_path):
    """A config of two data sets, and how often each has been parsed."""
    Image.new("RGB", (64, 64)).save(tmp_path / "0.jpg")
    content = {
        "images": [{"id": 1, "file_name": "0.jpg", "width": 64, "height": 64}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 40, 40], "area": 1600, "iscrowd": 0,
                         "segmentation": [[8, 8, 48, 8, 48, 48]]}],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate("abc")],
    }  # fmt: skip
    names = []
    counts = {}
    for part in ("train", "val"):
        (tmp_path / f"{part}.json").write_text(json.dumps(content))
        names.append(f"{tmp_path}/{part}.json:{tmp_path}")
    options = ["DATASETS.TRAIN", names[0], "DATASETS.TEST", names[1], "OUTPUT_DIR", str(tmp_path / "run")]
    cfg = load_config(str(CONFIG), [*options, "SOLVER.IMS_PER_BATCH", "1", "SEED", "3", "MODEL.DEVICE", "cpu"])
    for name in names:
        load = DatasetCatalog[name]
        counts[name] = 0

        def counting(name=name, load=load):
            counts[name] += 1
            return load()

        DatasetCatalog[name] = counting
    yield cfg, counts
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_a_run_parses_each_data_set_once(counted):
    """The check, the loader, that of a resumed run with a SEED, and every evaluation."""
    cfg, counts = counted
    parse_once(cfg)
    check_datasets(cfg)
    Trainer.build_train_loader(cfg)
    Trainer.build_train_loader(cfg, start_iter=2)
    for _ in range(2):
        next(iter(Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])))
    assert set(counts.values()) == {1}
    parse_once(cfg)  # again changes nothing
    assert len(get_records(cfg.DATASETS.TRAIN[0])) == 1 and set(counts.values()) == {1}


def test_records_of_training_are_freed(counted):
    cfg, counts = counted
    parse_once(cfg)
    for name in counts:
        get_records(name)
    forget(cfg.DATASETS.TRAIN)
    for name in counts:
        get_records(name)
    assert list(counts.values()) == [2, 1]
    forget(["never registered", "bent_shapes_tiny_val"])


def test_the_trainer_frees_them(counted, monkeypatch):
    cfg, counts = counted
    parse_once(cfg)
    monkeypatch.setattr("detectron2.engine.DefaultTrainer.train", lambda self: None)
    trainer = Trainer.__new__(Trainer)
    trainer.cfg = cfg
    for name in counts:
        get_records(name)
    trainer.train()
    for name in counts:
        get_records(name)
    assert list(counts.values()) == [2, 1]
