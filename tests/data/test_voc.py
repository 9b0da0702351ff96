"""VOC's labels for segmentation: what is prepared of VOC and SBD, and what is registered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dcnv2_d2.data.voc import main, prepare, register_voc_sem_seg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from scipy.io import savemat


def labels(seed, size=(20, 30)):
    return np.random.default_rng(seed).choice([0, 3, 20, 255], size).astype(np.uint8)


def write_voc(folder, train=("a", "b"), val=("c",)):
    """VOC's own folders; labels have a palette in which an index and its brightness differ."""
    for sub in ("SegmentationClass", "ImageSets/Segmentation", "JPEGImages"):
        (folder / sub).mkdir(parents=True)
    for i, name in enumerate([*train, *val]):
        image = Image.fromarray(labels(i))
        image.putpalette(np.random.default_rng(9).integers(0, 256, 768).astype(np.uint8).tobytes())
        image.save(folder / "SegmentationClass" / f"{name}.png")
        image.convert("RGB").save(folder / "JPEGImages" / f"{name}.jpg")
    for split, names in (("train", train), ("val", val), ("trainval", [*train, *val])):
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")


def write_sbd(folder, train=("b", "d"), val=("c", "e")):
    (folder / "cls").mkdir(parents=True)
    for i, name in enumerate([*train, *val]):
        savemat(folder / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": labels(10 + i)}})
    for split, names in (("train", train), ("val", val)):
        (folder / f"{split}.txt").write_text("\n".join(names) + "\n")


@pytest.fixture
def registered(tmp_path):
    register_voc_sem_seg(str(tmp_path))
    yield tmp_path
    register_voc_sem_seg()


def read(path):
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def test_voc_and_sbd(registered):
    """VOC's labels go before SBD's, and VOC's val is not trained on."""
    voc, sbd = registered / "VOC2012", registered / "sbd"
    write_voc(voc)
    write_sbd(sbd)
    prepare(voc, sbd)
    records = {split: DatasetCatalog.get(f"voc_2012_sem_seg_{split}") for split in ("train", "val", "train_aug")}
    names = {split: [r["image_id"] for r in found] for split, found in records.items()}
    assert names == {"train": ["a", "b"], "val": ["c"], "train_aug": ["a", "b", "d", "e"]}
    seeds = [0, 1, 11, 13]
    for record, seed in zip(records["train_aug"], seeds, strict=True):
        assert np.array_equal(read(record["sem_seg_file_name"]), labels(seed))
        assert record["file_name"] == str(voc / "JPEGImages" / f"{record['image_id']}.jpg")
    assert np.array_equal(read(records["val"][0]["sem_seg_file_name"]), labels(2))
    metadata = MetadataCatalog.get("voc_2012_sem_seg_train_aug")
    assert len(metadata.stuff_classes) == 21 and metadata.stuff_classes[:2] == ["background", "aeroplane"]
    assert (metadata.ignore_label, metadata.evaluator_type) == (255, "sem_seg")


def test_training_and_evaluation_from_the_config(tmp_path):
    """The data are found by $DETECTRON2_DATASETS alone; the other options make the model small."""
    voc, sbd, root = tmp_path / "VOC2012", tmp_path / "sbd", Path(__file__).parents[2]
    write_voc(voc)
    write_sbd(sbd)
    for name in ("d", "e"):
        Image.fromarray(labels(7)).convert("RGB").save(voc / "JPEGImages" / f"{name}.jpg")
    prepare(voc, sbd)
    options = [
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "MODEL.WEIGHTS", ""),
        *("MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "16", "SOLVER.MAX_ITER", "2"),
        *("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0"),  # there are no trained weights
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", "DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(tmp_path / "out")),
    ]
    config = str(root / "configs" / "dcnv1" / "table1" / "deeplab_R_101_voc_dconv3.yaml")
    done = subprocess.run(
        [sys.executable, "train_net.py", "--config-file", config, *options],
        cwd=root,
        env={**os.environ, "DETECTRON2_DATASETS": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    assert 0 <= lines[-1]["sem_seg/mIoU"] <= 100


def test_command_without_sbd(registered, monkeypatch):
    write_voc(registered / "VOC2012")
    monkeypatch.setattr("sys.argv", ["voc", "--voc", str(registered / "VOC2012")])
    main()
    assert len(DatasetCatalog.get("voc_2012_sem_seg_trainval")) == 3
    with pytest.raises(ValueError, match=r"train_aug\.txt is missing; python -m dcnv2_d2\.data\.voc --help"):
        DatasetCatalog.get("voc_2012_sem_seg_train_aug")


def test_unprepared(registered):
    write_voc(registered / "VOC2012")
    with pytest.raises(ValueError, match="SegmentationLabels is missing; python -m dcnv2_d2.data.voc --help"):
        DatasetCatalog.get("voc_2012_sem_seg_train")


def test_bad_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["voc", "--voc", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="none"):
        main()
    write_voc(tmp_path)
    Image.new("RGB", (30, 20)).save(tmp_path / "SegmentationClass" / "a.png")
    with pytest.raises(ValueError, match=r"a\.png must be an image with a palette, got mode RGB"):
        prepare(tmp_path)
    for file in (tmp_path / "SegmentationClass").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="SegmentationClass must have VOC's"):
        prepare(tmp_path)
