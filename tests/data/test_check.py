"""A user's own data set: a COCO file and a folder, given by options; and what may be wrong with it."""

import copy
import json
import logging
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import torch
from dcnv2_d2 import load_config
from dcnv2_d2.data.check import check_datasets
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
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
    with pytest.raises(ValueError, match="^the data sets cannot be used:\n") as error:
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
    class_aware = ["MODEL.META_ARCHITECTURE", "ClassAwareRPN"]
    assert "but MODEL.ROI_HEADS.NUM_CLASSES is 80" in message(config(name, name, 80, *class_aware))


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


@pytest.mark.parametrize("key", ["area", "iscrowd", "segmentation"])
def test_what_the_coco_evaluation_needs(key, make):
    """pycocotools fails without it after training, though Detectron2 trains without; crowds are evaluated too."""
    lacking = copy.deepcopy(GOOD)
    lacking["annotations"].append(annotation(4, 2, 7, [0, 0, 9, 9], iscrowd=1))
    lacking["annotations"].append(annotation(5, 99, 7, [0, 0, 9, 9]))  # of no image: Detectron2 passes over it
    for i in (1, 3):
        del lacking["annotations"][i][key]
    good, name = make("train", GOOD), make("val", lacking)
    assert message(config(good, name)).endswith(f"{name}: 2 of 5 annotations have no {key}: 1.jpg, 2.jpg")
    if key == "segmentation":
        check_datasets(config(good, name, 2, "MODEL.MASK_ON", "False"))
    else:
        check_datasets(config(name, good))  # in training it is not needed


def test_everything_in_one_message(make, tmp_path):
    first, nowhere = make("train", GOOD, images=[]), f"{tmp_path}/nowhere.json:{tmp_path}"
    unsized = copy.deepcopy(GOOD)
    del unsized["images"][0]["height"]
    text = message(config(f"('{first}', '{make('unsized', unsized)}')", nowhere, 5))
    assert len(text.splitlines()) == 5
    unread = f"{tmp_path}/unsized.json:{tmp_path}/unsized: cannot be read: KeyError: 'height'"
    for part in ("3 of 3 images are missing", "nowhere.json", unread, "NUM_CLASSES is 5"):
        assert part in text
    assert "missing" not in message(config(first, nowhere), train=False)


def record(i, image, **others):
    box = {"bbox": [1.0, 1.0, 9.0, 9.0], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0,
           "segmentation": [[1, 1, 9, 1, 9, 9]]}  # fmt: skip
    return {"file_name": image, "image_id": i, "height": 48, "width": 64, "annotations": [box], **others}


@pytest.fixture
def by_hand(tmp_path):
    """Registers two images with a box each, with changes, as users do without a file; returns the config."""
    Image.new("RGB", (64, 48)).save(tmp_path / "0.jpg")

    def register(change, classes=("nut", "bolt")):
        records = [record(i, str(tmp_path / "0.jpg")) for i in range(2)]
        change(records)
        good = [record(9, str(tmp_path / "0.jpg"))]
        for name, content in (("by_hand", records), ("good", good)):
            DatasetCatalog.register(name, lambda content=content: content)
            MetadataCatalog.get(name).set(**{"thing_classes": list(classes)} if classes else {})
        return config("by_hand", "good")

    yield register
    for name in ("by_hand", "good"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def without(*path):
    return lambda records: reduce(getitem, path[:-1], records).pop(path[-1])


def put(value, *path):
    return lambda records: reduce(getitem, path[:-1], records).update({path[-1]: value})


BOX = (1, "annotations", 0)


@pytest.mark.parametrize(
    "change, expected",
    [
        (without(1, "file_name"), "1 of 2 images have no file_name: image 1"),
        (without(1, "annotations"), "1 of 2 images have no annotations: 0.jpg"),
        *((without(*BOX, k), f"1 of 2 objects have no {k}: 0.jpg") for k in ("bbox", "bbox_mode", "category_id")),
        (put(2, *BOX, "category_id"), "1 of 2 objects have a category_id that is none of 0 to 1: 2 in 0.jpg"),
        (put("nut", *BOX, "category_id"), "1 of 2 objects have a category_id that is none of 0 to 1: nut in 0.jpg"),
        (put(None, *BOX, "bbox"), "cannot be read: TypeError: 'NoneType' object is not iterable"),
        (put([1, 1, 90, 9], *BOX, "bbox"),
         "1 of 2 boxes (x1, y1, x2, y2) leave the image: [1, 1, 90, 9] in 0.jpg (64 x 48)"),
    ],
)  # fmt: skip
def test_records_made_by_hand(change, expected, by_hand):
    assert message(by_hand(change)) == f"the data sets cannot be used:\n  by_hand: {expected}"


@pytest.mark.parametrize("key", ["image_id", "height", "width"])
def test_what_only_the_evaluation_needs(key, by_hand):
    cfg = by_hand(without(1, key))
    check_datasets(cfg)
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    assert message(cfg).endswith(f"\n  by_hand: 1 of 2 images have no {key}: 0.jpg")


def test_no_class_names(by_hand):
    expected = "its metadata has no thing_classes, the names of the 2 classes"
    lines = message(by_hand(lambda records: None, classes=None)).splitlines()
    assert lines[1:] == [f"  good: {expected}", f"  by_hand: {expected}"]


def test_data_sets_that_are_pytorchs_are_left_alone():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            raise AssertionError("read")

    DatasetCatalog.register("endless", Endless)
    try:
        check_datasets(config("endless"))
    finally:
        DatasetCatalog.remove("endless")
