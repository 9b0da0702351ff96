import errno
import json
import multiprocessing
import os
import re
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from dcnv2_d2.data import ensure_generated, generate, register_bent_shapes
from dcnv2_d2.data.bent_shapes import BODIES, SceneSpec, draw_scene
from dcnv2_d2.data.generate import SPLITS
from PIL import Image
from pycocotools.coco import COCO

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # pycocotools with NumPy 2

ALL = SceneSpec(classes=tuple(BODIES), objects=(4, 5))
GOLDEN_CATEGORIES = [5, 5, 4, 1]
GOLDEN_BOXES = [
    [39.46, 81.1, 47.59, 35.43],
    [10.89, 20.47, 81.15, 46.3],
    [70.35, 51.39, 24.88, 26.53],
    [51.48, 82.1, 36.24, 10.91],
]
TRAIN, VAL = "bent_shapes_tiny_train", "bent_shapes_tiny_val"


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


@pytest.fixture
def catalogs(root, monkeypatch):
    data = pytest.importorskip("detectron2.data")
    register_bent_shapes()
    yield data.DatasetCatalog, data.MetadataCatalog
    monkeypatch.undo()
    register_bent_shapes()


def small(monkeypatch, num_images):
    """A split large enough for a pool of processes, or one that takes forever, of small pictures."""
    split = replace(SPLITS[TRAIN], num_images=num_images, scene=replace(SPLITS[TRAIN].scene, image_size=32))
    monkeypatch.setitem(SPLITS, TRAIN, split)


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def mask_of(annotation, size):
    return mask_util.decode(mask_util.merge(mask_util.frPyObjects(annotation["segmentation"], size, size))).astype(bool)


# The drawing


def test_image_depends_on_seed_and_index_alone():
    forward = [draw_scene(3, i, ALL) for i in range(4)]
    np.random.seed(0)  # the global generator plays no part
    backward = [draw_scene(3, i, ALL) for i in reversed(range(4))][::-1]
    for (image, annotations), (again, annotations_again) in zip(forward, backward, strict=True):
        assert image.dtype == np.uint8 and image.shape == (128, 128, 3)
        assert image.tobytes() == again.tobytes()
        assert annotations == annotations_again
    images = [image.tobytes() for image, _ in forward] + [draw_scene(4, 0, ALL)[0].tobytes()]
    assert len(set(images)) == 5


def test_generator_version_is_raised_with_the_drawing():
    """If this fails, the pictures changed: raise GENERATOR_VERSION, then renew the numbers."""
    _, annotations = draw_scene(0, 0, ALL)
    assert generate.GENERATOR_VERSION == 2
    assert [a["category_id"] for a in annotations] == GOLDEN_CATEGORIES
    np.testing.assert_allclose([a["bbox"] for a in annotations], GOLDEN_BOXES, atol=0.02)


@pytest.mark.parametrize("size", [128, 200])
def test_annotations(size):
    spec = replace(ALL, image_size=size)
    for index in range(20):
        image, annotations = draw_scene(5, index, spec)
        assert image.shape == (size, size, 3)
        assert 4 <= len(annotations) <= 5
        for annotation in annotations:
            assert 1 <= annotation["category_id"] <= 5 and annotation["iscrowd"] == 0
            points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in annotation["segmentation"]])
            assert points.min() >= 0 and points.max() <= size
            x, y, width, height = annotation["bbox"]
            assert 28 * size / 192 - 0.05 <= max(width, height) <= 140 * size / 192 + 0.05
            np.testing.assert_allclose([x, y, x + width, y + height], [*points.min(0), *points.max(0)], atol=0.02)

            mask = mask_of(annotation, size)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            extent = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            np.testing.assert_allclose(extent, [x, y, x + width, y + height], atol=1)
            assert annotation["area"] == mask.sum() > 0


def test_at_most_a_quarter_is_hidden():
    overlaps = 0
    for index in range(30):
        masks = [mask_of(a, 128) for a in draw_scene(6, index, ALL)[1]]
        for i, mask in enumerate(masks[:-1]):
            hidden = (mask & np.any(masks[i + 1 :], 0)).sum() / mask.sum()
            assert hidden <= 0.25
            overlaps += hidden > 0.02
    assert overlaps > 10  # the rule is not kept by keeping bodies apart


def test_masks_lie_on_what_is_drawn():
    """The outline of a mask is where the colour changes: shifting it by two pixels must be worse in every direction."""
    edges, shifted = 0.0, np.zeros(4)
    for index in range(30):
        image, annotations = draw_scene(7, index, ALL)
        body = mask_of(annotations[-1], 128)  # nothing but clutter is in front of the last one
        for k, (dy, dx) in enumerate([(0, 2), (0, -2), (2, 0), (-2, 0)]):
            shifted[k] += image[np.roll(body, (dy, dx), (0, 1))].astype(float).std(0).mean()
        edges += image[body].astype(float).std(0).mean()
    assert (shifted > 1.3 * edges).all()


def test_classes_are_balanced():
    for split in (SPLITS["bent_shapes_train"], SPLITS["bent_shapes_ablation_train"]):
        drawn = [a["category_id"] for i in range(60) for a in draw_scene(split.seed, i, split.scene)[1]]
        share = np.bincount(drawn, minlength=len(split.scene.classes) + 1)[1:] / len(drawn)
        np.testing.assert_allclose(share, 1 / len(split.scene.classes), atol=0.1)
        least, most = split.scene.objects
        assert 60 * least <= len(drawn) <= 60 * most


def test_splits_share_no_seed():
    assert len({split.seed for split in SPLITS.values()}) == len(SPLITS)


# The files


def test_tiny_split_is_valid_coco_and_quick(root):
    start = time.process_time()  # not the clock's, which goes on while others have the processor
    json_file, image_root = ensure_generated(TRAIN)
    assert time.process_time() - start < 5
    assert f"-v{generate.GENERATOR_VERSION}" in json_file and Path(json_file).is_relative_to(root)

    coco = COCO(json_file)
    assert len(coco.imgs) == 24 and {"info", "licenses"} <= coco.dataset.keys()
    assert [c["id"] for c in coco.dataset["categories"]] == [1, 2, 3]
    assert [c["name"] for c in coco.dataset["categories"]] == list(SPLITS[TRAIN].scene.classes)
    assert [a["id"] for a in coco.dataset["annotations"]] == list(range(1, len(coco.anns) + 1))
    assert sorted(os.listdir(image_root)) == [image["file_name"] for image in coco.dataset["images"]]
    for image in coco.dataset["images"]:
        pixels, annotations = draw_scene(SPLITS[TRAIN].seed, image["id"] - 1, SPLITS[TRAIN].scene)
        stored = np.asarray(Image.open(Path(image_root, image["file_name"])), dtype=float)
        assert stored.shape == (image["height"], image["width"], 3)
        assert np.abs(stored - pixels).mean() < 4  # JPEG
        loaded = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert [{k: a[k] for k in annotations[0]} for a in loaded] == annotations
    for annotation in coco.anns.values():
        assert coco.annToMask(annotation).sum() == annotation["area"]


def test_a_generated_split_is_left_alone(root, monkeypatch):
    first = ensure_generated(VAL)
    before = contents(root)
    monkeypatch.setattr(generate, "_generate", lambda *args: pytest.fail("generated again"))
    assert ensure_generated(VAL) == first
    assert contents(root) == before


def test_bytes_do_not_depend_on_processes(tmp_path, monkeypatch):
    small(monkeypatch, 230)
    ensure_generated(TRAIN, str(tmp_path / "pool"))
    monkeypatch.setattr(generate, "_pool", lambda num_images: nullcontext())
    ensure_generated(TRAIN, str(tmp_path / "serial"))
    assert contents(tmp_path / "pool") == contents(tmp_path / "serial")


def test_daemonic_process_can_generate(root, monkeypatch):
    small(monkeypatch, 230)
    process = multiprocessing.get_context("fork").Process(target=ensure_generated, args=(TRAIN,), daemon=True)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert len(list(root.rglob("*.jpg"))) == 230


def _generate_together(barrier, log):
    original = generate._generate

    def logged(name, folder):
        with open(log, "a") as file:
            file.write("generated\n")
        time.sleep(0.5)  # so that the other one surely comes while this one works
        original(name, folder)

    generate._generate = logged
    barrier.wait(60)
    json_file, image_root = ensure_generated(VAL)
    with open(log, "a") as file:
        file.write(f"{len(json.loads(Path(json_file).read_text())['images'])} {len(os.listdir(image_root))}\n")


def test_processes_starting_together_generate_once(root, tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, log = context.Barrier(2), tmp_path / "log.txt"
    processes = [context.Process(target=_generate_together, args=(barrier, str(log))) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert log.read_text().splitlines() == ["generated", "8 8", "8 8"]
    assert not list(root.rglob("*.unfinished"))


def test_killed_midway(root, monkeypatch):
    """Killed with its pool at work: nothing is used, and the next start trips over neither orphans nor remains."""
    with monkeypatch.context() as patch:
        small(patch, 10**6)
        process = multiprocessing.get_context("fork").Process(target=ensure_generated, args=(TRAIN,))
        process.start()
        while len(list(root.rglob("*.jpg"))) < 20:
            assert process.is_alive()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert list(root.rglob("*.unfinished")) and not list(root.rglob("annotations.json"))

    start = time.monotonic()
    json_file, image_root = ensure_generated(TRAIN)
    assert time.monotonic() - start < 10
    assert len(os.listdir(image_root)) == len(COCO(json_file).imgs) == 24
    assert not list(root.rglob("*.unfinished"))


def test_folder_without_annotations_is_replaced(root):
    json_file, image_root = ensure_generated(VAL)
    os.remove(json_file)
    Path(image_root, "stray.jpg").touch()
    ensure_generated(VAL)
    assert len(os.listdir(image_root)) == 8


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failure_leaves_nothing(root, monkeypatch, error):
    def fail_later(split, folder, index):
        if index == 5:
            raise error
        return write_image(split, folder, index)

    write_image = generate._write_image
    with monkeypatch.context() as patch:
        patch.setattr(generate, "_write_image", fail_later)
        with pytest.raises(type(error)) as raised:
            ensure_generated(VAL)
    if isinstance(error, OSError):
        assert re.search("No space left.*DETECTRON2_DATASETS", str(raised.value))
        assert raised.value.errno == errno.ENOSPC
    assert not [p for p in root.rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert len(os.listdir(ensure_generated(VAL)[1])) == 8


def test_unwritable_root_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "file"))
    with pytest.raises(OSError, match="bent_shapes_tiny_val in .*file.*DETECTRON2_DATASETS"):
        ensure_generated(VAL)


def test_unknown_name():
    with pytest.raises(ValueError, match="'bent_shapes_test', expected one of bent_shapes_train"):
        ensure_generated("bent_shapes_test")


# The registration


def test_registration_is_lazy_idempotent_and_follows_the_root(catalogs, root, tmp_path):
    datasets, metadata = catalogs
    before = {name: metadata.get(name) for name in SPLITS}
    register_bent_shapes()
    assert all(metadata.get(name) is before[name] for name in SPLITS)
    assert set(SPLITS) <= set(datasets.list())
    assert not list(root.iterdir())

    register_bent_shapes(str(tmp_path / "elsewhere"))
    assert Path(metadata.get(VAL).json_file).is_relative_to(tmp_path / "elsewhere")
    datasets.get(VAL)
    assert os.path.exists(metadata.get(VAL).json_file)


def test_loading(catalogs):
    datasets, metadata = catalogs
    meta = metadata.get(VAL)
    assert meta.evaluator_type == "coco"
    records = datasets.get(VAL)  # load_coco_json sets the metadata again and requires it to be the same
    assert meta.thing_classes == ["worm", "tadpole", "dumbbell"]
    assert meta.thing_dataset_id_to_contiguous_id == {1: 0, 2: 1, 3: 2}
    assert (meta.json_file, meta.image_root) == ensure_generated(VAL)
    assert len(records) == 8
    assert {a["category_id"] for record in records for a in record["annotations"]} == {0, 1, 2}
    assert all(os.path.exists(record["file_name"]) for record in records)


def test_perfect_predictions_score_100_without_loading(catalogs, tmp_path):
    """The metadata alone must do for COCOEvaluator once the files are there, as on the ranks that only evaluate."""
    import torch
    from detectron2.data.datasets import load_coco_json
    from detectron2.evaluation import COCOEvaluator
    from detectron2.structures import Boxes, Instances

    records = load_coco_json(*ensure_generated(VAL))
    evaluator = COCOEvaluator(VAL, ("bbox",), distributed=False, use_fast_impl=False)
    evaluator.reset()
    for record in records:
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]])
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances((record["height"], record["width"]), pred_boxes=Boxes(boxes))
        instances.scores = torch.ones(len(boxes))
        instances.pred_classes = torch.tensor([a["category_id"] - 1 for a in record["annotations"]])
        evaluator.process([record], [{"instances": instances}])
    assert evaluator.evaluate()["bbox"]["AP"] > 99.9
