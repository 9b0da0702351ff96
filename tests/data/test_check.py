"""A user's own data set: a COCO file and a folder, given by options; and what may be wrong with it."""

import copy
import json
import logging
from pathlib import Path

import pytest
from dcnv2_d2 import load_config
from dcnv2_d2.data.check import check_datasets
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

CONFIG = Path(__file__).parents[2] / "configs/quick_start/mask_rcnn_small_mdconv_c3-c5.yaml"


def annotation(i, image, category, box, **others):
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h]
    return {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": w * h, "iscrowd": 0,
            "segmentation": [polygon], **others}  # fmt: skip


GOOD = {
    "images": [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in (1, 2, 3)],
    "annotations": [
        annotation(1, 1, 7, [0, 0, 64, 48]),
        annotation(2, 1, 3, [10.5, 5, 20, 30]),
        annotation(3, 2, 3, [-0.5, 1, 10, 10]),  # by less than a pixel
    ],
    "categories": [{"id": 7, "name": "bolt"}, {"id": 3, "name": "nut"}],
}


@pytest.fixture
def make(tmp_path):
    """Writes a data set and its images; returns its name as an option."""

    def write(name, content, images=("1.jpg", "2.jpg", "3.jpg")):
        folder = tmp_path / name
        folder.mkdir()
        for image in images:
            Image.new("RGB", (64, 48)).save(folder / image)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return f"{tmp_path}/{name}.json:{folder}"

    yield write
    for name in [n for n in DatasetCatalog.list() if n.startswith(str(tmp_path))]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def config(train, test=None, classes=2, *others):
    options = ["DATASETS.TRAIN", train, "DATASETS.TEST", test or train, "MODEL.ROI_HEADS.NUM_CLASSES", str(classes)]
    return load_config(str(CONFIG), [*options, *others])


def message(cfg, **kwargs):
    with pytest.raises(ValueError, match="^the data sets do not fit:\n") as error:
        check_datasets(cfg, **kwargs)
    return str(error.value)


def test_three_options(make):
    name, other = make("train", GOOD), make("val", GOOD)
    cfg = config(name, other)
    assert (name,) == cfg.DATASETS.TRAIN and (other,) == cfg.DATASETS.TEST
    assert (name, other) == config(f"('{name}', '{other}')").DATASETS.TRAIN  # as Detectron2 has it
    check_datasets(cfg)
    assert [len(r["annotations"]) for r in DatasetCatalog.get(name)] == [2, 1, 0]
    metadata = MetadataCatalog.get(name)
    assert metadata.evaluator_type == "coco" and metadata.thing_classes == ["nut", "bolt"]


def test_generated_data_passes():
    check_datasets(load_config(str(CONFIG), ["DATASETS.TRAIN", "bent_shapes_tiny_train", "DATASETS.TEST",
                                             "bent_shapes_tiny_val"]))  # fmt: skip


def test_classes(make):
    other = copy.deepcopy(GOOD)
    other["categories"][0]["name"] = "screw"
    name, renamed = make("train", GOOD), make("val", other)
    assert message(config(name, classes=80)).endswith(
        f"{name}: has 2 classes (nut, bolt), but MODEL.ROI_HEADS.NUM_CLASSES is 80"
    )
    assert f"{name}: its classes (nut, bolt) are not those of {renamed} (nut, screw)" in message(config(name, renamed))
    retinanet = ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", "3"]
    assert "but MODEL.RETINANET.NUM_CLASSES is 3" in message(config(name, name, 80, *retinanet))


def test_missing_images(make):
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in range(1, 8)]
    text = message(config(make("train", GOOD | {"images": images}, images=["1.jpg", "3.jpg"])))
    assert "5 of 7 images are missing" in text
    assert [Path(p).name for p in text.split("missing: ")[1].split(", ")] == ["2.jpg", "4.jpg", "5.jpg", "..."]


def test_empty_annotations(make):
    text = message(config(make("train", GOOD | {"annotations": []}), make("val", GOOD)))
    assert "none of the 3 images has annotations" in text and "val" not in text
    crowd = [annotation(1, 1, 7, [0, 0, 9, 9], iscrowd=1)]
    assert "none of the 3 images" in message(config(make("crowd", GOOD | {"annotations": crowd})))
    check_datasets(config(make("other", GOOD), make("unlabelled", GOOD | {"annotations": []})))


BAD_BOXES = [[50, 5, 20, 10], [5, 40, 10, 10], [-3, 0, 10, 10], [0, -3, 10, 10], [0, 0, 10, 0], [0, 0, -5, 5]]


def test_boxes(make):
    good = [annotation(i, 1, 7, [1, 1, 9, 9]) for i in range(6)]
    bad = [annotation(10 + i, 2, 3, box) for i, box in enumerate(BAD_BOXES)]
    text = message(config(make("train", GOOD | {"annotations": good + bad})))
    assert "2 of 12 boxes (x1, y1, x2, y2) have no area: [0, 0, 10, 0] in 2.jpg, [0, 0, -5, 5] in 2.jpg" in text
    assert "4 of 12 boxes (x1, y1, x2, y2) leave the image: [50, 5, 70, 15] in 2.jpg (64 x 48), [5, 40," in text
    assert text.count("in 2.jpg (64 x 48)") == 3 and text.endswith(", ...")


def test_one_bad_box_in_a_thousand_is_logged(make, caplog):
    many = [annotation(i, 1, 7, [1, 1, 9, 9]) for i in range(999)] + [annotation(999, 2, 3, [0, 0, 10, 0])]
    with caplog.at_level(logging.WARNING):
        check_datasets(config(make("train", GOOD | {"annotations": many})))
    assert "1 of 1000 boxes (x1, y1, x2, y2) have no area" in caplog.text


def test_masks(make):
    boxes_only = copy.deepcopy(GOOD)
    del boxes_only["annotations"][1]["segmentation"]
    name = make("train", boxes_only)
    assert "MODEL.MASK_ON is True, but 1 of 3 objects have no mask: in 1.jpg" in message(config(name))
    check_datasets(config(name, name, 2, "MODEL.MASK_ON", "False"))
    bitmaps = copy.deepcopy(GOOD)
    bitmaps["annotations"][2]["segmentation"] = {"size": [48, 64], "counts": [100, 48 * 64 - 100]}
    name = make("bitmaps", bitmaps)
    assert "1 masks are bitmaps (in 2.jpg), but INPUT.MASK_FORMAT is polygon" in message(config(name))
    check_datasets(config(name, name, 2, "INPUT.MASK_FORMAT", "bitmask"))


def test_everything_in_one_message(make, tmp_path):
    first, nowhere = make("train", GOOD, images=[]), f"{tmp_path}/nowhere.json:{tmp_path}"
    unsized = copy.deepcopy(GOOD)
    del unsized["images"][0]["height"]
    text = message(config(f"('{first}', '{make('unsized', unsized)}')", nowhere, 5))
    assert len(text.splitlines()) == 5
    for part in ("3 of 3 images are missing", "nowhere.json", "unsized", "'height'", "NUM_CLASSES is 5"):
        assert part in text
    assert "missing" not in message(config(first, nowhere), train=False)
