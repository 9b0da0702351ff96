#!/usr/bin/env python
"""Trains rows of the paper's ablations of pooling and mimicking (Tables 1 and 3) over several seeds; writes a table.

python tools/ablation.py --output output/ablation --seeds 3 --markdown output/ablation/table.md

Every row is a change of one config. What is finished is not trained again, so that a run that was stopped goes on.
--opts KEY VALUE ... changes the config of all rows.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "quick_start" / "mask_rcnn_small_mdconv_c3-c5_mdpool_mimic.yaml"
# Of the small version: boxes alone, on a harder data set than the quick start's.
SMALL = (
    *("MODEL.MASK_ON", "False", "MODEL.ROI_HEADS.NUM_CLASSES", "4"),
    *("SOLVER.IMS_PER_BATCH", "8", "SOLVER.MAX_ITER", "1500"),
    *("DATASETS.TRAIN", "('bent_shapes_ablation_train',)", "DATASETS.TEST", "('bent_shapes_ablation_val',)"),
)

NO_MIMIC = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.ROI_HEADS.NAME", "DCNv2ROIHeads"]
ALIGN = ["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2", "MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIAlignV2"]
REGULAR = ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, False, False, False]"]
# name -> (changes of the config, the paper's AP of Faster R-CNN, ResNet-50, on COCO)
ROWS = {
    "regular": (NO_MIMIC + ALIGN + REGULAR, 34.7),
    "mdconv@c3~c5": (NO_MIMIC + ALIGN, None),
    "mdconv@c3~c5 + mdpool": (NO_MIMIC, 41.7),
    "mdconv@c3~c5 + mdpool, mimicking fg": (["MODEL.MIMIC.REGIONS", "fg"], 43.1),
    "mdconv@c3~c5 + mdpool, mimicking bg": (["MODEL.MIMIC.REGIONS", "bg"], 41.7),
    "mdconv@c3~c5 + mdpool, mimicking fg and bg": (["MODEL.MIMIC.REGIONS", "both"], 42.1),
    "regular, mimicking fg": (ALIGN + REGULAR + ["MODEL.ROI_HEADS.NAME", "MimickingROIHeads"], 35.0),
}


def train(args, row, seed):
    """Trains one model in a process of its own unless that has been done; returns its last box AP."""
    folder = args.output / f"{row.replace(' ', '_').replace(',', '')}_seed{seed}"
    metrics = folder / "metrics.json"
    if average_precision(metrics) is None or not (folder / "model_final.pth").is_file():
        opts = SMALL if args.config_file == CONFIG else ()
        opts = [*opts, *ROWS[row][0], *args.opts, "SEED", str(seed), "OUTPUT_DIR", str(folder)]
        command = [sys.executable, ROOT / "train_net.py", "--resume", "--num-gpus", str(args.num_gpus)]
        subprocess.run([*command, "--config-file", args.config_file, *opts], check=True)
    return average_precision(metrics)


def average_precision(metrics):
    """The last box AP in a metrics.json, or None."""
    lines = metrics.read_text().splitlines() if metrics.is_file() else ()
    return next((entry["bbox/AP"] for entry in map(json.loads, reversed(lines)) if "bbox/AP" in entry), None)


def table(results):
    lines = []
    for row, values in results.items():
        deviation = f"{statistics.stdev(values):.1f}" if len(values) > 1 else ""
        paper = ROWS[row][1]
        seeds = ", ".join(f"{v:.1f}" for v in values)
        lines.append(
            [row, "" if paper is None else f"{paper:.1f}", seeds, f"{statistics.fmean(values):.1f}", deviation]
        )
    headings = ["model", "paper, COCO AP", "ours, AP (seeds)", "mean", "standard deviation"]
    return tabulate(lines, headings, tablefmt="github", disable_numparse=True) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", type=Path, default=CONFIG, help="with mimicking; rows take parts away from it")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-gpus", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "ablation")
    parser.add_argument("--markdown", type=Path, help="where to write the table; it is also printed")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="config changes for all rows")
    args = parser.parse_args()
    results = {}
    for seed in range(1, args.seeds + 1):  # seed by seed, so that a stopped run has whole tables
        for row in args.rows:
            results.setdefault(row, []).append(train(args, row, seed))
        text = table(results)
        if args.markdown:
            args.markdown.write_text(text)
        print(text, flush=True)


if __name__ == "__main__":
    main()
