"""Checkpoints that are whole, and errors that name a damaged one."""

import logging
import os
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm

from .joining import add_mask_logits

logger = logging.getLogger(__name__)


class UnreadableCheckpoint(Exception):
    """A file that is not a checkpoint, or is damaged."""


def _read(reader, filename):
    try:  # PyTorch reads .pth files with weights_only, which runs no code.
        return reader(filename)
    except (OSError, MemoryError):  # not the file's fault
        raise
    except Exception as e:
        raise UnreadableCheckpoint(f"checkpoint {filename} is not readable, perhaps truncated: {e}") from e


class _FinalNames(logging.LoggerAdapter):
    """Names a checkpoint in the log as it is called when it is whole."""

    def process(self, msg, kwargs):
        return msg.replace(Checkpointer.UNFINISHED, ".pth"), kwargs


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, for files that may be damaged, dangerous, or of a v1 model.

    A file that it saves is complete or absent; resuming skips unreadable files and takes the last that can be read.
    The offsets of a v1 model fit into a v2 model, where Detectron2 leaves out every tensor of another shape.
    """

    UNFINISHED = ".unfinished.pth"
    logger: logging.Logger | logging.LoggerAdapter

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.logger = _FinalNames(self.logger)

    def save(self, name: str, **kwargs: Any) -> None:
        try:
            super().save(name + self.UNFINISHED.removesuffix(".pth"), **kwargs)
        except BaseException:  # Ctrl-C too
            if self.save_dir and self.save_to_disk:
                Path(self.save_dir, name + self.UNFINISHED).unlink(missing_ok=True)
            raise

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """save calls this when the file is whole."""
        name = last_filename_basename.removesuffix(self.UNFINISHED) + ".pth"
        os.replace(os.path.join(self.save_dir, last_filename_basename), os.path.join(self.save_dir, name))
        super().tag_last_checkpoint(name)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        if not resume or not self.has_checkpoint():
            return super().resume_or_load(path, resume=resume)
        # The main process chooses, as all must load the same.
        file = comm.all_gather(self._last_readable() if comm.is_main_process() else None)[0]
        if file is not None:
            return self.load(file)
        raise RuntimeError(
            f"none of the checkpoints in {self.save_dir} can be read; start again without --resume, or put a good "
            f"checkpoint there and its name into {os.path.join(self.save_dir, 'last_checkpoint')}"
        )

    def _last_readable(self) -> str | None:
        last = self.get_checkpoint_file()
        others = [file for file in self.get_all_checkpoint_files() if not file.endswith(self.UNFINISHED)]
        for file in [last, *sorted(set(others) - {last}, key=os.path.getmtime, reverse=True)]:
            try:
                if not self.path_manager.isfile(file):
                    raise UnreadableCheckpoint(f"checkpoint {file} does not exist")
                self._try(file)
                return file
            except UnreadableCheckpoint as e:
                logger.warning("%s; trying the one before it.", e)
        return None

    def _try(self, file):
        # Detectron2 main's reader of .pth files asserts that it runs inside of load.
        pth = file.endswith(".pth")
        content = _read(super(DetectionCheckpointer, self)._load_file, file) if pth else self._load_file(file)
        if not isinstance(content, dict):
            raise UnreadableCheckpoint(f"checkpoint {file} does not hold a dictionary")

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if path and path.endswith(".pkl") and not path.startswith("detectron2://"):
            logger.warning("%s is a pickle, which can run code while it is read: use it only if you trust it.", path)
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename):
        return _read(super()._load_file, filename)

    def _load_model(self, checkpoint):
        for prefix in ("", "module."):  # saved from a distributed model
            add_mask_logits(checkpoint["model"], self.model, prefix)
        return super()._load_model(checkpoint)
