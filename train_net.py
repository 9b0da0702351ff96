#!/usr/bin/env python
"""Trains and evaluates a model from a config file, in the way of Detectron2's own train_net.py."""

import logging
import os

# Before torch loads OpenMP: its threads spin so long while they wait that training takes several times longer as soon
# as another process wants the same cores. This many spins, some microseconds, cost nothing on a quiet machine.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import dcnv2_d2  # before Detectron2: it makes old releases importable
from dcnv2_d2.analysis.report import write_report
from dcnv2_d2.checkpoint import Checkpointer
from dcnv2_d2.data.check import check_datasets
from dcnv2_d2.engine import Trainer, launch
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

logger = logging.getLogger("dcnv2_d2.train_net")


def setup(args):
    cfg = dcnv2_d2.load_config(args.config_file, args.opts)
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED:
        logging.warning("SOLVER.AMP.ENABLED needs a GPU in Detectron2's trainer: training in float32.")
        cfg.SOLVER.AMP.ENABLED = False
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="dcnv2_d2")
    return cfg


def main(args):
    cfg = setup(args)
    check_datasets(cfg, train=not args.eval_only)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        Checkpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        results = trainer.train()
        model = trainer.model
    if comm.is_main_process():
        for path in write_report(cfg, getattr(model, "module", model)):
            logger.info("Picture: %s", path)
    return results


if __name__ == "__main__":
    launch(main, default_argument_parser().parse_args())
