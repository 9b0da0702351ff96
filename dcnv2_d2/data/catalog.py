"""DatasetCatalog for one training run: each data set is parsed once, and errors say what to do."""

import functools
import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch.utils.data import Dataset


class DatasetNotFound(ValueError):
    """A data set that is not registered, or whose files are missing."""


def get_records(name: str) -> list[dict] | Dataset:
    """What DatasetCatalog.get gives.

    Raises:
        DatasetNotFound: the sentence has the nearest registered names or, for the data sets that Detectron2 knows,
            the folder that they are looked for in.
    """
    if name not in DatasetCatalog:
        nearest = get_close_matches(name, DatasetCatalog.list(), n=3, cutoff=0.5)
        hint = f"; the nearest names are {', '.join(nearest)}" if nearest else ""
        raise DatasetNotFound(f"no data set has this name{hint}. Files are given as annotations.json:folder_of_images")
    try:
        return DatasetCatalog.get(name)
    except FileNotFoundError as error:
        raise DatasetNotFound(f"{error.filename} does not exist{where_data_sets_are(error.filename)}") from error


def where_data_sets_are(path: str) -> str:
    """The end of a sentence about a missing file: how to say where it is, if it is one that Detectron2 looks for."""
    root = Path(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))).absolute()
    if not path or not Path(path).absolute().is_relative_to(root):
        return ""
    return f"; set DETECTRON2_DATASETS to the folder that holds your data sets, now {root}"


def parse_once(cfg: CfgNode) -> None:
    """Keeps the records of the config's data sets from when they are first loaded on; see forget."""
    for name in {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}:
        if name in DatasetCatalog and not hasattr(DatasetCatalog[name], "cache_clear"):
            DatasetCatalog[name] = functools.cache(DatasetCatalog[name])


def forget(names: Iterable[str]) -> None:
    """Frees the records that parse_once has kept of these data sets."""
    for name in names:
        if name in DatasetCatalog and hasattr(DatasetCatalog[name], "cache_clear"):
            DatasetCatalog[name].cache_clear()
