"""Bent shapes as COCO-format data sets, generated on first use below DETECTRON2_DATASETS."""

import json
import multiprocessing
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from iopath.common.file_io import file_lock
from PIL import Image
from tqdm import tqdm

from .bent_shapes import BODIES, GENERATOR_VERSION, SceneSpec, draw_scene


@dataclass(frozen=True)
class Split:
    """Images 0 to `num_images` - 1 of a seed; every split has a seed of its own."""

    seed: int
    num_images: int
    scene: SceneSpec


_BODIES = tuple(BODIES)
_EASY = SceneSpec(classes=_BODIES[:3], objects=(2, 4), clutter=(2, 4), smallest=45, muted=True)
_ABLATION = SceneSpec(classes=_BODIES[:4], objects=(3, 3))
_HARD = SceneSpec(classes=_BODIES, objects=(4, 5))

SPLITS = {
    "bent_shapes_train": Split(1, 2000, _EASY),
    "bent_shapes_val": Split(2, 250, _EASY),
    "bent_shapes_ablation_train": Split(3, 3000, _ABLATION),
    "bent_shapes_ablation_val": Split(4, 300, _ABLATION),
    "bent_shapes_hard_train": Split(5, 3000, _HARD),
    "bent_shapes_hard_val": Split(6, 300, _HARD),
    "bent_shapes_tiny_train": Split(7, 24, _EASY),
    "bent_shapes_tiny_val": Split(8, 8, _EASY),
}


def register_bent_shapes(root: str | None = None) -> None:
    """Register every split with Detectron2; nothing is generated before a split is loaded. May be called again.

    Args:
        root: folder of all data sets, by default $DETECTRON2_DATASETS or "datasets", as in Detectron2. Calling again
            with another root moves the registration there.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    root = _default_root() if root is None else root
    for name, split in SPLITS.items():
        json_file, image_root = _paths(name, root)
        if name in DatasetCatalog:
            if MetadataCatalog.get(name).json_file == json_file:
                continue
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        DatasetCatalog.register(name, partial(_load, name, root))
        # COCOEvaluator needs all of this even if the split was never loaded in its process.
        MetadataCatalog.get(name).set(
            json_file=json_file,
            image_root=image_root,
            evaluator_type="coco",
            thing_classes=list(split.scene.classes),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(split.scene.classes))},
        )


def ensure_generated(name: str, root: str | None = None) -> tuple[str, str]:
    """Generate a split unless it is there already. Safe from any number of processes: one works, the others wait.

    Detectron2 calls this when it loads a split; call it before reading the split's files in any other way.

    Args:
        name: a registered name, such as "bent_shapes_train".
        root: as in :func:`register_bent_shapes`.

    Returns:
        The annotation file and the folder of the images.

    Raises:
        ValueError: there is no such split.
        OSError: the root cannot be written to, or the disk is full.
    """
    if name not in SPLITS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(SPLITS)}")
    json_file, image_root = _paths(name, _default_root() if root is None else root)
    folder = os.path.dirname(json_file)
    if not os.path.exists(json_file):
        try:
            with file_lock(folder):
                if not os.path.exists(json_file):  # or another process was first
                    _generate(name, Path(folder))
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot generate {name} in {os.path.abspath(folder)} ({error.strerror or error}); "
                "set DETECTRON2_DATASETS to a writable folder with 100 MB free",
            ) from error
    return json_file, image_root


def _default_root() -> str:
    return os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))


def _paths(name: str, root: str) -> tuple[str, str]:
    folder = os.path.join(root, "bent_shapes", f"{name.removeprefix('bent_shapes_')}-v{GENERATOR_VERSION}")
    return os.path.join(folder, "annotations.json"), os.path.join(folder, "images")


def _load(name: str, root: str) -> list[dict]:
    from detectron2.data.datasets import load_coco_json

    return load_coco_json(*ensure_generated(name, root), name)


def _generate(name: str, folder: Path) -> None:
    """Write a split so that `folder` appears complete or not at all; the caller holds the lock."""
    split = SPLITS[name]
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    shutil.rmtree(folder, ignore_errors=True)  # an old one without annotations
    try:
        (unfinished / "images").mkdir(parents=True)
        dataset: dict[str, Any] = {
            "info": {"description": name, "version": str(GENERATOR_VERSION), "seed": split.seed},
            "licenses": [],
            "images": [],
            "annotations": [],
            "categories": [{"id": i, "name": body} for i, body in enumerate(split.scene.classes, 1)],
        }
        with _pool(split.num_images) as pool:
            task, indices = partial(_write_image, split, unfinished / "images"), range(split.num_images)
            results = pool.imap(task, indices, chunksize=16) if pool else map(task, indices)
            for image, annotations in tqdm(results, f"drawing {name}", split.num_images, unit="image"):
                dataset["images"].append(image)
                for annotation in annotations:
                    identity = {"id": len(dataset["annotations"]) + 1, "image_id": image["id"]}
                    dataset["annotations"].append(identity | annotation)
        (unfinished / "annotations.json").write_text(json.dumps(dataset))
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _pool(num_images: int) -> AbstractContextManager:
    """A pool of processes; None where it would take longer to start than it saves, or in a DataLoader's worker."""
    if num_images < 200 or multiprocessing.current_process().daemon:
        return nullcontext()
    return multiprocessing.Pool(min(os.cpu_count() or 1, 8))


def _write_image(split: Split, folder: Path, index: int) -> tuple[dict, list[dict]]:
    pixels, annotations = draw_scene(split.seed, index, split.scene)
    size = split.scene.image_size
    name = f"{index:06d}.jpg"
    image = {"id": index + 1, "file_name": name, "height": size, "width": size}
    # Half a PNG's bytes; the colours of bodies a few pixels wide would not survive subsampling.
    Image.fromarray(pixels).save(folder / name, quality=95, subsampling=0)
    return image, annotations
