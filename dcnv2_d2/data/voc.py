"""PASCAL VOC 2012 for semantic segmentation, with the labels of SBD that usual training sets add.

python -m dcnv2_d2.data.voc --sbd benchmark_RELEASE/dataset

prepares $DETECTRON2_DATASETS/VOC2012, which must have VOC's own JPEGImages, SegmentationClass and ImageSets, once. SBD
(Semantic Boundaries Dataset) has cls/*.mat, train.txt and val.txt; without it only VOC's own labels are prepared.
"""

import argparse
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .generate import _default_root

LABELS = "SegmentationLabels"  # VOC's own folder has coloured images, which Detectron2 would read as grey ones
SPLITS = ("train", "val", "trainval", "train_aug")  # ImageSets/Segmentation/*.txt; the last one is with SBD


def register_voc_sem_seg(root: str | None = None) -> None:
    """Registers voc_2012_sem_seg_{train,val,trainval,train_aug}; nothing is read before a split is loaded.

    Args:
        root: folder of all data sets, by default $DETECTRON2_DATASETS or "datasets". May be called again.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets.pascal_voc import CLASS_NAMES

    folder = Path(_default_root() if root is None else root) / "VOC2012"
    for split in SPLITS:
        name = f"voc_2012_sem_seg_{split}"
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        DatasetCatalog.register(name, partial(_load, folder, split))
        MetadataCatalog.get(name).set(
            evaluator_type="sem_seg", stuff_classes=["background", *CLASS_NAMES], ignore_label=255
        )


def _load(folder: Path, split: str) -> list[dict]:
    missing = next((p for p in (_list_file(folder, split), folder / LABELS) if not p.exists()), None)
    if missing:
        raise ValueError(f"{missing} is missing; python -m dcnv2_d2.data.voc --help says how it is made")
    return [
        {
            "file_name": str(folder / "JPEGImages" / f"{name}.jpg"),
            "image_id": name,
            "sem_seg_file_name": str(folder / LABELS / f"{name}.png"),
        }
        for name in _read_names(_list_file(folder, split))
    ]


def prepare(folder: Path, sbd: Path | None = None) -> None:
    """Writes images of labels (0 background, 1 to 20 classes, 255 ignored) and, with SBD, the list of train_aug.

    The list has the images of VOC's train and of SBD, but none of VOC's val. VOC's labels go before SBD's.

    Args:
        folder: VOC2012.
        sbd: the folder of SBD with cls, train.txt and val.txt.

    Raises:
        FileNotFoundError: a folder is not as described.
        ValueError: one of VOC's labels is no image of indices.
        ImportError: SBD's files need scipy.
    """
    labels = folder / LABELS
    labels.mkdir(exist_ok=True)
    own = sorted((folder / "SegmentationClass").glob("*.png"))
    if not own:
        raise FileNotFoundError(f"{folder / 'SegmentationClass'} must have VOC's *.png, got none")
    for path in tqdm(own, "VOC", unit="image"):
        with Image.open(path) as image:
            if image.mode not in ("P", "L"):  # the array of an image with a palette has the indices
                raise ValueError(f"{path} must be an image with a palette, got mode {image.mode}")
            Image.fromarray(np.asarray(image)).save(labels / path.name)
    if sbd is None:
        return
    from scipy.io import loadmat

    train, val = (_read_names(_list_file(folder, split)) for split in ("train", "val"))
    more = {name for split in ("train", "val") for name in _read_names(sbd / f"{split}.txt")} - {*train, *val}
    for name in tqdm(sorted(more), "SBD", unit="image"):
        content = loadmat(str(sbd / "cls" / f"{name}.mat"))
        Image.fromarray(content["GTcls"]["Segmentation"][0, 0].astype(np.uint8)).save(labels / f"{name}.png")
    _write_names(_list_file(folder, "train_aug"), [*train, *sorted(more)])


def _list_file(folder: Path, split: str) -> Path:
    return folder / "ImageSets" / "Segmentation" / f"{split}.txt"


def _read_names(path: Path) -> list[str]:
    return path.read_text().split()


def _write_names(path: Path, names: Iterable[str]) -> None:
    path.write_text("".join(f"{name}\n" for name in names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", type=Path, default=Path(_default_root()) / "VOC2012", help="by default %(default)s")
    parser.add_argument("--sbd", type=Path, help="SBD's folder with cls, train.txt and val.txt")
    args = parser.parse_args()
    try:
        prepare(args.voc, args.sbd)
    except (OSError, ImportError, ValueError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
