"""The checks of data sets in two processes, of one machine and of two: both stop, with the same message, or neither."""

import platform
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from dcnv2_d2 import compat, load_config
from dcnv2_d2.data.check import check_datasets
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils import comm
from PIL import Image
from torch import multiprocessing

from ..processes import run_two

CONFIG = Path(__file__).parents[2] / "configs/quick_start/mask_rcnn_small_mdconv_c3-c5.yaml"
TIMEOUT = 60  # seconds
BOX = {"bbox": [1, 1, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "segmentation": [[1, 1, 9, 1, 9, 9]]}


def good(folder, rank):
    return [{"file_name": f"{folder}/0.jpg", "image_id": 0, "height": 48, "width": 64, "annotations": [BOX]}]


def lost(folder, rank):
    """The second process finds no images."""
    return [record | {"file_name": f"{folder}/{rank}.jpg"} for record in good(folder, rank)]


def nowhere(folder, rank):
    return lost(folder, 1)


def crash(folder, rank):
    """An error that the check knows nothing of, in one process."""
    return good(folder, rank)[: 1 // (1 - rank)]


DATA = {f.__name__: f for f in (good, lost, nowhere, crash)}


def check(rank, folder, results):
    dist.init_process_group("gloo", f"file://{folder}/meeting", timedelta(seconds=TIMEOUT / 2), rank=rank, world_size=2)
    platform.node = lambda: f"host{rank}"
    for processes in (2, 1):  # of a machine
        comm._LOCAL_PROCESS_GROUP = None  # Detectron2 makes it once
        compat.create_local_process_group(processes)
        for name, function in DATA.items():
            name, loaded = f"{name}{processes}", []
            DatasetCatalog.register(name, lambda f=function, loaded=loaded: loaded.append(0) or f(folder, rank))
            MetadataCatalog.get(name).thing_classes = ["nut"]
            options = ["DATASETS.TRAIN", name, "DATASETS.TEST", name, "MODEL.ROI_HEADS.NUM_CLASSES", "1"]
            try:
                check_datasets(load_config(str(CONFIG), options))
                results.put((rank, name, len(loaded), None))
            except ValueError as error:
                results.put((rank, name, len(loaded), str(error)))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(process, data set and processes of a machine) -> how often the data set was loaded, and the error's message."""
    folder = tmp_path_factory.mktemp("distributed")
    Image.new("RGB", (64, 48)).save(folder / "0.jpg")
    queue = multiprocessing.get_context("fork").SimpleQueue()
    # Forked, because importing takes far longer than the checks.
    run_two(check, (str(folder), queue), TIMEOUT, "fork")
    found = {}
    while not queue.empty():
        rank, name, loads, message = queue.get()
        found[rank, name] = loads, message and message.replace(str(folder), "FOLDER")
    return found


@pytest.mark.parametrize(
    "name, loads, expected",
    [
        ("good2", (1, 0), None),
        ("lost2", (1, 0), None),  # the second process would not find them, but does not look
        ("nowhere2", (1, 0), "1 of 1 images are missing: FOLDER/1.jpg"),
        ("crash2", (1, 0), None),
        ("good1", (1, 1), None),
        ("lost1", (1, 1), "1 of 1 images are missing: FOLDER/1.jpg (on host1)"),
        ("nowhere1", (1, 1), "1 of 1 images are missing: FOLDER/1.jpg"),
        ("crash1", (1, 1), "cannot be read: ZeroDivisionError: integer division or modulo by zero (on host1)"),
    ],
)
def test_both_stop_or_neither(name, loads, expected, results):
    (first, message), (second, message_of_second) = results[0, name], results[1, name]
    assert (first, second) == loads
    assert message == message_of_second
    assert message == (expected and f"the data sets cannot be used:\n  {name}: {expected}")
