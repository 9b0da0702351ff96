"""Finds what is wrong with a data set before training starts, instead of hours later or never."""

import logging
import os
from collections.abc import Iterator, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.structures import BoxMode

SHOWN = 3  # examples of a problem
MARGIN = 1.0  # pixels by which a box may leave its image: annotators round
# Share of boxes that may be bad: Detectron2 clips and drops them, and COCO itself has an empty one.
TOLERATED = 1e-3


def check_datasets(cfg, *, train: bool = True) -> None:
    """Looks at every image file name and annotation of the config's data sets; nothing is decoded.

    Args:
        cfg: reads DATASETS, NUM_CLASSES of the kind of model, MODEL.MASK_ON and INPUT.MASK_FORMAT.
        train: False looks at DATASETS.TEST only.

    Raises:
        ValueError: a data set cannot be loaded, its classes are not those of the model or of the other data sets,
            images are missing, nothing is annotated, boxes are empty or outside their images, or masks are missing. One
            message has all of it, with the first examples of each. A few bad boxes are only logged.
    """
    names = {name: False for name in cfg.DATASETS.TEST} | {name: True for name in cfg.DATASETS.TRAIN if train}
    problems, classes = [], {}
    for name, for_training in names.items():
        try:
            records = DatasetCatalog.get(name)
        except (OSError, LookupError, ValueError, AssertionError) as error:
            problems.append(f"{name}: cannot be loaded: {error}")
            continue
        problems += [f"{name}: {problem}" for problem in _problems(cfg, records, for_training)]
        if any(record.get("annotations") for record in records):
            classes[name] = MetadataCatalog.get(name).get("thing_classes", [])
    problems += _class_problems(cfg, classes)
    if problems:
        raise ValueError("\n  ".join(["the data sets do not fit:", *problems]))


def _class_problems(cfg, classes: dict[str, Sequence[str]]) -> Iterator[str]:
    node = "RETINANET" if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else "ROI_HEADS"
    expected = cfg.MODEL[node].NUM_CLASSES
    if node == "ROI_HEADS" and not issubclass(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE), GeneralizedRCNN):
        return  # Somebody's own model has a key of its own.
    first = next(iter(classes), None)
    for name, own in classes.items():
        if len(own) != expected:
            yield f"{name}: has {len(own)} classes ({_first(own)}), but MODEL.{node}.NUM_CLASSES is {expected}"
        if list(own) != list(classes[first]):
            yield f"{name}: its classes ({_first(own)}) are not those of {first} ({_first(classes[first])})"


def _problems(cfg, records: Sequence[dict], for_training: bool) -> Iterator[str]:
    files = [record["file_name"] for record in records if "file_name" in record]
    missing = [file for file in files if "://" not in file and not os.path.isfile(file)]
    if missing:
        yield f"{len(missing)} of {len(files)} images are missing: {_first(missing)}"
    if not any("annotations" in record for record in records):
        if for_training and not any(
            "sem_seg_file_name" in record or "pan_seg_file_name" in record for record in records
        ):
            yield "there are no annotations"
        return
    objects = [(r, a) for r in records for a in r.get("annotations", ()) if not a.get("iscrowd", 0)]
    if for_training and not objects:
        yield f"none of the {len(records)} images has annotations"
    empty, outside = [], []
    for record, annotation in objects:
        if annotation["bbox_mode"] == BoxMode.XYWHA_ABS:
            continue
        x0, y0, x1, y1 = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
        example = f"[{x0:g}, {y0:g}, {x1:g}, {y1:g}] in {os.path.basename(record['file_name'])}"
        if not (x1 > x0 and y1 > y0):
            empty.append(example)
        elif min(x0, y0) < -MARGIN or x1 > record["width"] + MARGIN or y1 > record["height"] + MARGIN:
            outside.append(f"{example} ({record['width']} x {record['height']})")
    for what, bad in (("have no area", empty), ("leave the image", outside)):
        if bad:
            sentence = f"{len(bad)} of {len(objects)} boxes (x1, y1, x2, y2) {what}: {_first(bad)}"
            if len(bad) > TOLERATED * len(objects):
                yield sentence
            else:
                logging.getLogger(__name__).warning("%s", sentence)
    if cfg.MODEL.MASK_ON and for_training:
        files = [os.path.basename(r["file_name"]) for r, a in objects if "segmentation" not in a]
        if files:
            yield f"MODEL.MASK_ON is True, but {len(files)} of {len(objects)} objects have no mask: in {_first(files)}"
        files = [os.path.basename(r["file_name"]) for r, a in objects if isinstance(a.get("segmentation"), dict)]
        if files and cfg.INPUT.MASK_FORMAT == "polygon":
            yield f"{len(files)} masks are bitmaps (in {_first(files)}), but INPUT.MASK_FORMAT is polygon, not bitmask"


def _first(examples: Sequence[str]) -> str:
    return ", ".join(examples[:SHOWN]) + (", ..." if len(examples) > SHOWN else "")
