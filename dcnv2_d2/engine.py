"""Detectron2's DefaultTrainer for runs that are interrupted: exact resuming, whole checkpoints, errors that name the
cause; and Detectron2's launch, which here works under torchrun too."""

import functools
import logging
import os
import signal
import weakref
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MapDataset, MetadataCatalog, build_detection_train_loader
from detectron2.data.build import _train_loader_from_config
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine import launch as detectron2_launch
from detectron2.evaluation import COCOEvaluator, COCOPanopticEvaluator, DatasetEvaluators, SemSegEvaluator
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch import nn
from torch.multiprocessing import ProcessExitedException
from torch.utils._pytree import tree_leaves

from . import compat
from .checkpoint import Checkpointer
from .data.catalog import forget
from .data.stream import TrainingStream, seed_by
from .evaluation import PascalVOCEvaluator
from .modeling.multi_scale import with_augmentation
from .solver import build_optimizer

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Detectron2's DefaultTrainer with this package's optimizer and the evaluators of COCO-format data.

    With a SEED, a run that is killed and resumed gives the same weights as an uninterrupted one: the random numbers of
    an iteration depend on SEED, the process and the iteration alone, those of an image on SEED, the process and the
    image's position in the stream, and a resumed run continues that stream. DATALOADER.NUM_WORKERS has no influence. A
    PyTorch IterableDataset is the exception: it starts from the beginning.
    """

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluators:
        folder = output_folder or str(Path(cfg.OUTPUT_DIR) / "inference")
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
        evaluators = []
        if kind in ("sem_seg", "cityscapes_sem_seg", "coco_panoptic_seg"):
            evaluators.append(SemSegEvaluator(dataset_name, output_dir=folder))
        if kind in ("coco", "coco_panoptic_seg"):
            fast = compat.has_fast_coco_eval()
            evaluators.append(COCOEvaluator(dataset_name, output_dir=folder, use_fast_impl=fast))
        if kind == "pascal_voc":
            evaluators.append(PascalVOCEvaluator(dataset_name))
        if kind == "coco_panoptic_seg":
            evaluators.append(COCOPanopticEvaluator(dataset_name, folder))
        if not evaluators:
            raise NotImplementedError(  # after which Detectron2 continues without an evaluation
                f"DATASETS.TEST: {dataset_name} must have the evaluator_type coco, pascal_voc, sem_seg, "
                f"cityscapes_sem_seg or coco_panoptic_seg, got {kind!r}"
            )
        return DatasetEvaluators(evaluators)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list | None = None) -> dict:
        return super().test(cfg, with_augmentation(cfg, model), evaluators)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iter: int = 0) -> Iterable:
        """Detectron2's loader, which with a SEED leaves out the batches before start_iter."""
        if cfg.SEED < 0:
            return super().build_train_loader(cfg)
        seed_all_rng(cfg.SEED + comm.get_rank())  # Detectron2 0.6 seeds the sampler from NumPy's state
        options = _train_loader_from_config(cfg)
        records, grouped = options["dataset"], options["aspect_ratio_grouping"]
        if options["sampler"] is None:  # Detectron2 main, of an IterableDataset: it starts from the beginning
            return build_detection_train_loader(**options)
        dataset = DatasetFromList(records, copy=False) if isinstance(records, list) else records
        stream = TrainingStream(
            MapDataset(dataset, options["mapper"]),
            options["sampler"],
            seed=cfg.SEED,
            batch_size=options["total_batch_size"] // comm.get_world_size(),
            grouped=grouped,
            skip=start_iter,
            wide=[_is_wide(record) for record in records] if grouped and start_iter else None,
        )
        return build_detection_train_loader(**options | {"dataset": stream, "sampler": None, "mapper": None})

    def build_hooks(self) -> list[HookBase]:
        self.checkpointer = Checkpointer(self._trainer.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        hooks = super().build_hooks()
        return [SeedEachStep(self.cfg.SEED), *hooks] if self.cfg.SEED >= 0 else hooks

    def train(self) -> dict | None:
        forget(set(self.cfg.DATASETS.TRAIN) - set(self.cfg.DATASETS.TEST))  # the loader has what it needs of them
        try:
            return super().train()
        except KeyboardInterrupt:
            logger.warning("Stopped in iteration %d. %s", self.iter, self._how_to_go_on())
            raise

    def _how_to_go_on(self) -> str:
        if not self.checkpointer.has_checkpoint():
            return "There is no checkpoint yet (see SOLVER.CHECKPOINT_PERIOD)."
        return f"The same command with --resume goes on from {self.checkpointer.get_checkpoint_file()}."

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        if self.start_iter and self.cfg.SEED >= 0:
            compat.replace_data_loader(self._trainer, self.build_train_loader(self.cfg, self.start_iter))

    def run_step(self) -> None:
        step: dict = {"batch": []}

        def remember(model, args):
            device = next(model.parameters()).device.type
            enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            step.update(batch=args[0], autocast=torch.autocast(device, dtype, enabled))

        handle = self._trainer.model.register_forward_pre_hook(remember)
        try:
            super().run_step()
        except FloatingPointError as e:
            raise FloatingPointError(f"{e}\n{explain_divergence(self._trainer.model, **step)}") from None
        finally:
            handle.remove()

    # Detectron2 0.6 leaves the optimizer's state out of its checkpoints (detectron2 #4110); main does the same as here.
    def state_dict(self) -> dict:
        return super().state_dict() | {"_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])


def _is_wide(record: dict) -> bool:
    """By the record or, as records for semantic segmentation may have no size, by the image itself."""
    if "width" in record:
        return record["width"] > record["height"]
    with PathManager.open(record["file_name"], "rb") as f, Image.open(f) as image:
        return image.width > image.height


class SeedEachStep(HookBase):
    """Makes the random numbers of an iteration depend on nothing but the seed, the process and the iteration."""

    def __init__(self, seed: int):
        self.seed = seed

    def before_train(self) -> None:
        # After the images are loaded: the random state that this leaves depends on the number of workers.
        self.handle = self.trainer._trainer.model.register_forward_pre_hook(
            lambda *_: seed_by(self.seed, comm.get_rank(), self.trainer.iter)
        )

    def after_train(self) -> None:
        self.handle.remove()


@torch.no_grad()
def explain_divergence(model: nn.Module, batch: list[dict], autocast: AbstractContextManager | None = None) -> str:
    """Runs a step again to find the parameter, layer and image that made its loss infinite or NaN; returns sentences.

    Args:
        model: a Detectron2 model in training mode, inside an event storage.
        batch: the model's input.
        autocast: the context in which the loss was computed: half precision overflows earlier than float32.
    """
    names = [str(record.get("file_name", record.get("image_id", "unknown"))) for record in batch]
    broken = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if broken:
        return (
            f"Parameters that are not finite: {', '.join(broken[:3])} ({len(broken)} in all), so an earlier step "
            f"diverged: lower the learning rate or clip gradients. Images of this step: {', '.join(names)}."
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):  # A second pass would wait for the other processes.
        return f"Images of this step on this process: {', '.join(names)}."
    for record, name in zip(batch, names, strict=True):
        layers: list[str] = []
        hooks = [
            module.register_forward_hook(functools.partial(_note_if_not_finite, layers, path))
            for path, module in model.named_modules()
        ]
        try:
            with autocast or nullcontext():
                model([record])
        except FloatingPointError:  # by Detectron2's RPN, which comes after the layer that we look for
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if layers:
            return f"First layer with an output that is not finite: {layers[0]}, on the image {name}."
    return f"No single image of this step repeats it: {', '.join(names)}."


def _note_if_not_finite(layers: list[str], path: str, module: nn.Module, inputs: tuple, output: Any) -> None:
    if not _finite(output):
        layers.append(path or type(module).__name__)


def _finite(output: Any) -> bool:
    numbers = (t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point())
    return all(bool(t.isfinite().all()) for t in numbers)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Lets a command end with the sentence of a ValueError, a user's mistake, instead of a traceback."""
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"Error: {error}") from error


def launch(main: Callable[[Namespace], object], args: Namespace) -> None:
    """Runs main(args) in the processes that Detectron2's arguments ask for or, under torchrun, in this one.

    Detectron2 starts processes for GPUs only. Under torchrun, --num-gpus, --num-machines, --machine-rank and --dist-url
    are ignored; without a GPU the processes train on the CPU, over gloo.

    Raises:
        SystemExit: --num-gpus is more than there are, Ctrl-C was pressed, or a process of several ended early.
    """
    try:
        _launch(main, args)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except ProcessExitedException as error:  # its own message is above
        raise SystemExit(f"Error: {error}") from None


def _launch(main: Callable[[Namespace], object], args: Namespace) -> None:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        gpus = torch.cuda.device_count()
        if args.num_gpus > max(gpus, 1):
            raise SystemExit(
                f"Error: --num-gpus must be at most the number of GPUs here, {gpus}, got {args.num_gpus}. On the CPU "
                f"several processes train under torchrun --standalone --nproc-per-node={args.num_gpus}, followed by "
                "the command without --num-gpus"
            )
        detectron2_launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        compat.distribute_on_cpu()
    dist.init_process_group("nccl" if cuda else "gloo")
    compat.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    try:
        main(args)
    finally:
        dist.destroy_process_group()
