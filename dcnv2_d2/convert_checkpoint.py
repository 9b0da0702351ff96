"""Converts a checkpoint of mmdetection, or of blocks with p_conv and m_conv, for Detectron2 and this package.

python -m dcnv2_d2.convert_checkpoint mask_rcnn_r50_fpn_mdconv_c3-c5_1x_coco.pth output/converted

writes output/converted/mask_rcnn_r50_fpn_mdconv_c3-c5_1x_coco.pth and the YAML file that runs it.
"""

import argparse
import sys
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from .checkpoint import Converted, from_mmdetection, join_prediction_convs, read_checkpoint
from .config import add_dcnv2_config


def convert(state_dict, config_text, caffe):
    if any(name.endswith("p_conv.weight") for name in state_dict):
        return Converted(join_prediction_convs(state_dict), {}, [])
    if any(name.startswith(("backbone.bottom_up.", "proposal_generator.")) for name in state_dict):
        raise ValueError("it has Detectron2's names already: use it as MODEL.WEIGHTS")
    return from_mmdetection(state_dict, config_text, caffe=caffe)


def compare_with_model(converted):
    """What the model of the config lacks, or has in another shape, as lines."""
    cfg = get_cfg()
    add_dcnv2_config(cfg)
    cfg.merge_from_other_cfg(CfgNode(converted.config))
    cfg.MODEL.DEVICE = "cpu"
    own = {name: tuple(t.shape) for name, t in build_model(cfg).state_dict().items()}
    given = {name: tuple(t.shape) for name, t in converted.model.items()}
    return [
        f"{name}: the model has {own.get(name, 'nothing')}, the file {given.get(name, 'nothing')}"
        for name in sorted(own.keys() | given.keys())
        if own.get(name) != given.get(name)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, help="for the results")
    parser.add_argument(
        "--caffe", action="store_true", help="a model of mmdetection's style caffe, where neither file nor name says so"
    )
    parser.add_argument("--trust-pickle", action="store_true", help="read a file that could run code as it is read")
    args = parser.parse_args()
    try:
        weights, config_text = read_checkpoint(args.checkpoint, trust=args.trust_pickle)
        converted = convert(weights, config_text, args.caffe or "caffe" in args.checkpoint.stem)
    except (ValueError, OSError) as error:
        sys.exit(f"{args.checkpoint}: {error}")

    args.folder.mkdir(parents=True, exist_ok=True)
    weights = args.folder / f"{args.checkpoint.stem}.pth"
    if weights.exists() and weights.samefile(args.checkpoint):
        sys.exit(f"{args.folder}: folder must be another than that of the checkpoint, which would be overwritten")
    torch.save({"model": converted.model, "__author__": "dcnv2_d2.convert_checkpoint"}, weights)
    print(f"{weights}: {len(converted.model)} tensors")
    problems = [f"{name}: no place in the model" for name in converted.unmatched]
    if converted.config:
        problems += compare_with_model(converted)
        converted.config["MODEL"] = {"WEIGHTS": str(weights)} | converted.config["MODEL"]
        config = weights.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(converted.config, sort_keys=False, default_flow_style=None))
        print(config)
    for note in converted.notes:
        print(f"Note: {note}.")
    print(f"{len(problems)} unmatched{':' if problems else ''}", *problems, sep="\n  ")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
