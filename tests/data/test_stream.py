"""The stream of training images through Detectron2's own loader: taken up anywhere, by any number of workers."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from dcnv2_d2 import load_config
from dcnv2_d2.data.stream import TrainingStream
from dcnv2_d2.engine import Trainer
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from torch.utils.data import Dataset

CONFIG = Path(__file__).parents[2] / "configs/quick_start/mask_rcnn_small_mdconv_c3-c5.yaml"
SIZE, BATCH, WIDE = 11, 3, [i % 3 == 0 for i in range(11)]


class Augmented(Dataset):
    """Images whose augmentation draws of every source of random numbers, how often depends on the image."""

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        drawn = [(random.random(), np.random.rand(), torch.rand(()).item()) for _ in range(1 + index % 2)]
        return {"index": index, "width": 2 + WIDE[index], "height": 2, "drawn": drawn}


def batches(count, *, grouped, workers=0, skip=0, seed=5):
    stream = TrainingStream(
        Augmented(), TrainingSampler(SIZE, seed=3), seed=seed, batch_size=BATCH, grouped=grouped, skip=skip, wide=WIDE
    )
    loader = build_detection_train_loader(
        stream, mapper=None, total_batch_size=BATCH, aspect_ratio_grouping=grouped, num_workers=workers
    )
    return list(itertools.islice(loader, count))


@pytest.fixture(scope="module")
def whole():
    return {grouped: batches(20, grouped=grouped) for grouped in (False, True)}


@pytest.mark.parametrize("grouped", [False, True], ids=["ungrouped", "grouped"])
def test_images_are_those_of_the_sampler(grouped, whole):
    indices = [record["index"] for batch in whole[grouped] for record in batch]
    expected = list(itertools.islice(TrainingSampler(SIZE, seed=3), len(indices)))
    if grouped:
        assert all(len({WIDE[record["index"]] for record in batch}) == 1 for batch in whole[True])
        # In each group the order of the sampler.
        for group in (False, True):
            own = [i for i in indices if WIDE[i] == group]
            assert own == list(
                itertools.islice((i for i in TrainingSampler(SIZE, seed=3) if WIDE[i] == group), len(own))
            )
    else:
        assert indices == expected


def test_every_image_has_random_numbers_of_its_own(whole):
    drawn = [number for batch in whole[False] for record in batch for draw in record["drawn"] for number in draw]
    assert len(set(drawn)) == len(drawn) > 180
    others = [number for batch in batches(20, grouped=False, seed=6) for record in batch for draw in record["drawn"]
              for number in draw]  # fmt: skip
    assert not set(drawn) & set(others)


@pytest.mark.parametrize("grouped", [False, True], ids=["ungrouped", "grouped"])
@pytest.mark.parametrize("workers, skip", [(0, 1), (0, 4), (0, 9), (1, 0), (2, 0), (2, 5), (3, 4)])
def test_neither_workers_nor_resuming_change_a_batch(workers, skip, grouped, whole):
    assert batches(20 - skip, grouped=grouped, workers=workers, skip=skip) == whole[grouped][skip:]


def test_the_loader_of_a_training_run():
    def images(workers, start):
        options = ["DATASETS.TRAIN", "bent_shapes_tiny_train", "INPUT.MIN_SIZE_TRAIN", "(64, 80, 96, 112)", "SEED", "3"]
        cfg = load_config(str(CONFIG), [*options, "DATALOADER.NUM_WORKERS", str(workers)])
        return list(itertools.islice(Trainer.build_train_loader(cfg, start), 8 - start))

    expected = images(0, 0)
    assert len({tuple(record["image"].shape) for batch in expected for record in batch}) > 1
    for actual, start in ((images(2, 0), 0), (images(2, 3), 3), (images(0, 5), 5)):
        for batch, batch_expected in zip(actual, expected[start:], strict=True):
            for record, wanted in zip(batch, batch_expected, strict=True):
                assert record["file_name"] == wanted["file_name"] and torch.equal(record["image"], wanted["image"])
                assert torch.equal(record["instances"].gt_boxes.tensor, wanted["instances"].gt_boxes.tensor)


def test_skipping_grouped_batches_needs_the_shapes():
    options = {"seed": 0, "batch_size": 2, "grouped": True}
    TrainingStream([], [], **options)
    with pytest.raises(ValueError, match="wide must be given to skip batches that are grouped, got None"):
        TrainingStream([], [], **options, skip=1)
