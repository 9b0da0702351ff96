"""Trains and evaluates a model from a config file, with the options of Detectron2's own train_net.py.

python -m dcnv2_d2.train --config-file quick_start/mask_rcnn_small_mdconv_c3-c5.yaml
"""

import logging

from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from .analysis.report import write_report
from .checkpoint import Checkpointer
from .config import find_config_file, load_config, require_weights
from .data.catalog import parse_once
from .data.check import check_datasets
from .engine import Trainer, launch, plain_errors

logger = logging.getLogger("dcnv2_d2.train")


def setup(args):
    args.config_file = find_config_file(args.config_file)  # of which default_setup logs the content
    cfg = load_config(args.config_file, args.opts)
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED:
        logger.warning("SOLVER.AMP.ENABLED needs a GPU in Detectron2's trainer: training in float32.")
        cfg.SOLVER.AMP.ENABLED = False
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="dcnv2_d2")
    return cfg


def run(args):
    with plain_errors():
        cfg = setup(args)
        parse_once(cfg)
        check_datasets(cfg, train=not args.eval_only)
        if args.eval_only:
            require_weights(cfg, resume=args.resume)
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


def main():
    launch(run, default_argument_parser().parse_args())


if __name__ == "__main__":
    main()
