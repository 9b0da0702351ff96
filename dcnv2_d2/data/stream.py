"""The stream of training images: the same for any number of loader processes, and from where it is resumed on."""

from collections.abc import Iterator

import numpy as np
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info


def seed_by(*numbers: int) -> None:
    """Seeds all random number generators by these numbers (0 or more) alone."""
    seed_all_rng(int(np.random.SeedSequence(numbers).generate_state(1)[0]) >> 1)


class TrainingStream(IterableDataset):
    """The images that a sampler of Detectron2 chooses, without those of the first `skip` batches.

    How an image is augmented depends only on the seed, the process and the image's position in the whole stream. Each
    of several loader workers yields its share, such that Detectron2's loader makes the batches of a single one.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler,
        *,
        seed: int,
        batch_size: int,
        grouped: bool,
        skip: int = 0,
        wide: list[bool] | None = None,
    ):
        """
        Args:
            dataset: gives the augmented image of an index.
            sampler: endless, and the same on each iteration.
            batch_size: images of this process in a batch.
            grouped: whether the loader groups them by aspect ratio, so that it takes single images from the workers.
            skip: the number of batches to leave out.
            wide: whether an image is wider than high, by index.

        Raises:
            ValueError: wide is missing, without which batches that are grouped cannot be skipped.
        """
        if grouped and skip and wide is None:
            raise ValueError("TrainingStream: wide must be given to skip batches that are grouped, got None")
        self.dataset = dataset
        self.sampler = sampler
        self.seed = seed
        self.batch_size = batch_size
        self.grouped = grouped
        self.skip = skip
        self.wide = wide if grouped else None
        self.rank = comm.get_rank()  # a loader's worker may not know it

    def __iter__(self) -> Iterator:
        worker = get_worker_info()
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        turn = 1 if self.grouped else self.batch_size  # images that the loader takes from a worker, then from the next
        for number, (place, index) in enumerate(self._remaining()):
            if number // turn % workers == own:
                seed_by(self.seed, self.rank, place, 1)  # 1: apart from the numbers of iteration `place`
                yield self.dataset[index]

    def _remaining(self) -> Iterator[tuple[int, int]]:
        """Places and indices of the images that are in none of the batches to be left out."""
        stream = enumerate(self.sampler)
        waiting: tuple[list, list] = ([], [])  # for their batch to be complete, by group
        left = self.skip
        while left:
            place, index = next(stream)
            group = waiting[self.wide[index] if self.wide else 0]
            group.append((place, index))
            if len(group) == self.batch_size:
                group.clear()
                left -= 1
        for group in waiting:
            yield from group
        yield from stream
