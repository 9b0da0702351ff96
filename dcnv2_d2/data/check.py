"""Finds what is wrong with a data set before training starts, instead of hours later or never."""

import json
import logging
import math
import os
import platform
from collections.abc import Iterator, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch.utils.data import Dataset

from .catalog import DatasetNotFound, get_records, where_data_sets_are

logger = logging.getLogger(__name__)
SHOWN = 3  # examples of a problem
MARGIN = 1.0  # pixels by which a box may leave its image: annotators round
# Share of boxes that may be bad: Detectron2 clips and drops them, and COCO itself has an empty one.
TOLERATED = 1e-3


def check_datasets(cfg: CfgNode, *, train: bool = True) -> None:
    """Looks at every image file name and annotation of the config's data sets; nothing is decoded.

    With several processes all must call it: the first of each machine looks, and all raise what any has found.

    Args:
        cfg: reads DATASETS, NUM_CLASSES of the kind of model, MODEL.MASK_ON and INPUT.MASK_FORMAT.
        train: False looks at DATASETS.TEST only.

    Raises:
        ValueError: a data set cannot be loaded, its classes are not those of the model or of the other data sets,
            images are missing, nothing is annotated, what Detectron2 or the COCO evaluation needs is missing from
            images or objects, boxes are empty or outside their images, or masks are missing. One message has all of it,
            with the first examples of each, and with the machine where not all have the same. A few bad boxes are only
            logged.
    """
    own = (platform.node(), list(_all_problems(cfg, train))) if comm.get_local_rank() == 0 else None
    machines = [found for found in comm.all_gather(own) if found]
    lines = []
    for problem in dict.fromkeys(problem for _, problems in machines for problem in problems):
        hosts = [host for host, problems in machines if problem in problems]
        lines.append(problem if len(hosts) == len(machines) else f"{problem} (on {', '.join(hosts)})")
    if lines:
        raise ValueError("\n  ".join(["the data sets cannot be used:", *lines]))


def _all_problems(cfg: CfgNode, train: bool) -> Iterator[str]:
    names = {name: False for name in cfg.DATASETS.TEST} | {name: True for name in cfg.DATASETS.TRAIN if train}
    classes: dict[str, Sequence[str]] = {}
    for name, for_training in names.items():
        for problem in _caught(_problems(cfg, name, for_training, classes)):
            yield f"{name}: {problem}"
    yield from _caught(_class_problems(cfg, classes))


def _caught(problems: Iterator[str]) -> Iterator[str]:
    """A data set's own functions and records can raise anything, and the other processes wait for a result."""
    try:
        yield from problems
    except DatasetNotFound as error:
        yield str(error)
    except Exception as error:
        logger.warning("A data set cannot be read", exc_info=True)
        yield f"cannot be read: {type(error).__name__}: {error}"


def _class_problems(cfg: CfgNode, classes: dict[str, Sequence[str]]) -> Iterator[str]:
    kind = cfg.MODEL.META_ARCHITECTURE
    node = "RETINANET" if kind == "RetinaNet" else "ROI_HEADS"
    expected = cfg.MODEL[node].NUM_CLASSES
    if kind not in ("RetinaNet", "ClassAwareRPN") and not issubclass(META_ARCH_REGISTRY.get(kind), GeneralizedRCNN):
        return  # a model of the user's own, with its own key
    first = next((name for name, own in classes.items() if own), "")
    for name, own in classes.items():
        if not own:
            yield f"{name}: its metadata has no thing_classes, the names of the {expected} classes"
        elif len(own) != expected:
            yield f"{name}: has {len(own)} classes ({_first(own)}), but MODEL.{node}.NUM_CLASSES is {expected}"
        if own and list(own) != list(classes[first]):
            yield f"{name}: its classes ({_first(own)}) are not those of {first} ({_first(classes[first])})"


def _problems(cfg: CfgNode, name: str, for_training: bool, classes: dict[str, Sequence[str]]) -> Iterator[str]:
    """Adds the data set's classes to `classes` if it has annotations."""
    records = get_records(name)
    if isinstance(records, Dataset):  # PyTorch's own: reading it may decode every image, or never end
        return
    yield from _without(["file_name"], records, records, "images")
    files = [os.fspath(record["file_name"]) for record in records if "file_name" in record]
    missing = [file for file in files if "://" not in file and not os.path.isfile(file)]
    if missing:
        yield f"{len(missing)} of {len(files)} images are missing: {_first(missing)}{where_data_sets_are(missing[0])}"
    if not any("annotations" in record for record in records):
        if for_training and not any(
            "sem_seg_file_name" in record or "pan_seg_file_name" in record for record in records
        ):
            yield "there are no annotations"
        return
    if any(record.get("annotations") for record in records):
        classes[name] = MetadataCatalog.get(name).get("thing_classes", [])
    # What Detectron2 fails without, in training or in the evaluation.
    keys = ["annotations"] * for_training + ["image_id", "height", "width"] * (name in cfg.DATASETS.TEST)
    yield from _without(keys, records, records, "images")
    objects = [(r, a) for r in records for a in r.get("annotations", ()) if not a.get("iscrowd", 0)]
    if for_training and not objects:
        yield f"none of the {len(records)} images has annotations"
    keys = ["bbox", "bbox_mode", "category_id"]
    yield from _without(keys, [a for _, a in objects], [r for r, _ in objects], "objects")
    objects = [(r, a) for r, a in objects if all(key in a for key in keys)]
    known = range(len(classes.get(name, ())))
    ids = [f"{a['category_id']} in {_name(r)}" for r, a in objects if known and a["category_id"] not in known]
    if ids:
        yield f"{len(ids)} of {len(objects)} objects have a category_id that is none of 0 to {known[-1]}: {_first(ids)}"
    yield from _box_problems(objects)
    if cfg.MODEL.MASK_ON and for_training:
        yield from _mask_problems(cfg, objects)
    if name in cfg.DATASETS.TEST:
        yield from _evaluation_problems(cfg, name)


def _box_problems(objects: Sequence[tuple[dict, dict]]) -> Iterator[str]:
    empty, outside = [], []
    for record, annotation in objects:
        if annotation["bbox_mode"] == BoxMode.XYWHA_ABS:
            continue
        x0, y0, x1, y1 = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
        width, height = record.get("width", math.inf), record.get("height", math.inf)  # training does without
        example = f"[{x0:g}, {y0:g}, {x1:g}, {y1:g}] in {_name(record)}"
        if not (x1 > x0 and y1 > y0):
            empty.append(example)
        elif min(x0, y0) < -MARGIN or x1 > width + MARGIN or y1 > height + MARGIN:
            outside.append(f"{example} ({width} x {height})")
    for what, bad in (("have no area", empty), ("leave the image", outside)):
        if bad:
            sentence = f"{len(bad)} of {len(objects)} boxes (x1, y1, x2, y2) {what}: {_first(bad)}"
            if len(bad) > TOLERATED * len(objects):
                yield sentence
            else:
                logger.warning("%s", sentence)


def _mask_problems(cfg: CfgNode, objects: Sequence[tuple[dict, dict]]) -> Iterator[str]:
    files = [_name(r) for r, a in objects if "segmentation" not in a]
    if files:
        yield f"MODEL.MASK_ON is True, but {len(files)} of {len(objects)} objects have no mask: in {_first(files)}"
    files = [_name(r) for r, a in objects if isinstance(a.get("segmentation"), dict)]
    if files and cfg.INPUT.MASK_FORMAT == "polygon":
        yield f"{len(files)} masks are bitmaps (in {_first(files)}), but INPUT.MASK_FORMAT is polygon, not bitmask"


def _evaluation_problems(cfg: CfgNode, name: str) -> Iterator[str]:
    """Looks into the file itself: pycocotools does, after training, and fails without what the records do not have."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") not in ("coco", "coco_panoptic_seg") or not metadata.get("json_file"):
        return
    with PathManager.open(metadata.json_file) as file:
        content = json.load(file)
    images = {image["id"]: image for image in content["images"]}
    annotations = content.get("annotations", [])
    keys = ["area", "iscrowd"] + ["segmentation"] * cfg.MODEL.MASK_ON
    yield from _without(keys, annotations, [images.get(a["image_id"], a) for a in annotations], "annotations")


def _without(keys: Sequence[str], things: Sequence[dict], records: Sequence[dict], what: str) -> Iterator[str]:
    """Sentences about what lacks a key; `records` are the images of the things."""
    for key in keys:
        lacking = [_name(record) for thing, record in zip(things, records, strict=True) if key not in thing]
        if lacking:
            yield f"{len(lacking)} of {len(things)} {what} have no {key}: {_first(lacking)}"


def _name(record: dict) -> str:
    return os.path.basename(record["file_name"]) if "file_name" in record else f"image {record.get('image_id')}"


def _first(examples: Sequence[str]) -> str:
    return ", ".join(examples[:SHOWN]) + (", ..." if len(examples) > SHOWN else "")
