"""Data sets given by their files alone: `annotations.json:folder of images` among DATASETS.TRAIN and DATASETS.TEST."""

import re
from collections.abc import Iterable


def register_files(names: Iterable[str]) -> None:
    """Registers each name that is a COCO-format file and a folder with Detectron2, unless it knows it already."""
    from detectron2.data import DatasetCatalog
    from detectron2.data.datasets import register_coco_instances

    for name in names:
        files = re.fullmatch(r"(.+\.json):(.+)", name)
        if files and name not in DatasetCatalog:
            register_coco_instances(name, {}, files[1], files[2])
