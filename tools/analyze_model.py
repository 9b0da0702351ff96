#!/usr/bin/env python
"""Counts parameters and FLOPs of config files; prints a Markdown table beside published figures.

python tools/analyze_model.py configs/paper/table2/faster*regular.yaml configs/paper/table2/faster*dconv*.yaml
python tools/analyze_model.py --modules 3 configs/COCO/mask_rcnn_R_50_FPN_1x_mdconv_c3-c5.yaml

Differences are to the first config. Parameters are in units of 2**20, as in the paper. A FLOP is a multiplication with
an addition, as in the paper and in fvcore, which counts them: at inference, for one image whose shorter side is
INPUT.MIN_SIZE_TEST and whose longer side is 1.5 times that (--size changes it), with as many proposals
(MODEL.RPN.POST_NMS_TOPK_TEST) and detections (TEST.DETECTIONS_PER_IMAGE) as the config allows. Interpolation between
samples is counted with --interpolation only: the paper's figures are without it.
"""

import argparse
import csv
import math
from pathlib import Path

import dcnv2_d2  # before Detectron2: it makes old releases importable
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from fvcore.nn import FlopCountAnalysis, flop_count_table
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn

PUBLISHED = Path(__file__).parents[1] / "configs" / "published.csv"
# So that an untrained network has all its proposals and detections
ALL_BOXES = [
    "MODEL.RPN.NMS_THRESH",
    1.0,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST",
    1.0,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    0.0,
]
BILINEAR = 4  # FLOPs of a sample, as fvcore counts aten::grid_sampler


def load(path: Path, opts: list[str] = ()) -> CfgNode:
    cfg = get_cfg()
    dcnv2_d2.add_dcnv2_config(cfg)
    cfg.merge_from_file(str(path))
    cfg.merge_from_list([*opts])
    return cfg


def parameters(cfg: CfgNode) -> int:
    """How many parameters the model of a config has, frozen ones too; those of R-CNN mimicking are in training only."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(cfg).parameters())


def image_size(cfg: CfgNode) -> tuple[int, int]:
    """(height, width) of an image of 3:2; see docs/models.md for why."""
    return cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST * 3 // 2


class Network(nn.Module):
    """A model of Detectron2 as a tracer wants it: from the tensor of an image to tensors."""

    # Not detectron2.utils.analysis and its TracingAdapter: in Detectron2 0.6 they import caffe2, which PyTorch dropped.
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> list[Tensor]:
        output = self.model([{"image": image}])[0]
        fields = [*output.pop("instances").get_fields().values()] if "instances" in output else []
        values = [*fields, *output.values()]
        return [v.tensor if isinstance(v, Boxes) else v[0] if isinstance(v, tuple) else v for v in values]


@torch.no_grad()
def flops(cfg: CfgNode, size: tuple[int, int], interpolation: bool = False) -> FlopCountAnalysis:
    """The counter, which has been run, of the model of a config.

    Args:
        cfg: any config whose model takes images.
        size: height and width of the image.
        interpolation: whether samples of deformable convolution and of RoI pooling count too.
    """
    cfg = cfg.clone()
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *ALL_BOXES])
    model = build_model(cfg).eval()
    for p in model.parameters():  # Fresh weights without trained norms make infinite scores, of which no box is left.
        p.zero_()
    counter = FlopCountAnalysis(Network(model), torch.rand(3, *size) * 255)
    per_sample = BILINEAR * interpolation

    def deform_conv2d(inputs, outputs):
        images, channels, _, _ = get_shape(inputs[0])
        _, in_group, *kernel = get_shape(inputs[2])
        _, out_channels, *out_size = get_shape(outputs[0])
        return images * math.prod(kernel) * math.prod(out_size) * (in_group * out_channels + per_sample * channels)

    def pooling(ratio):  # the operator's argument: a fixed number of samples in each direction
        return lambda inputs, outputs: math.prod(get_shape(outputs[0])) * inputs[ratio].toIValue() ** 2 * per_sample

    handles = {
        "dcnv2_d2::deform_conv2d": deform_conv2d,
        "dcnv2_d2::deform_roi_pool": pooling(6),
        "torchvision::roi_align": pooling(5),
    }
    # Norms are part of the convolution before them; grid_sampler pastes masks into the image.
    free = ["batch_norm", "group_norm", "grid_sampler", "upsample_nearest2d"]
    for name in free + ["upsample_bilinear2d"] * (not interpolation):
        handles[f"aten::{name}"] = lambda inputs, outputs: 0
    counter.set_op_handle(**handles).unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()
    return counter


def published() -> dict[str, dict[str, str]]:
    """configs/published.csv: figures of others, by the config's name."""
    with PUBLISHED.open() as file:
        return {row["config"]: row for row in csv.DictReader(file)}


def table(rows: list[tuple[str, int, float]]) -> str:
    """Markdown of rows of (config, parameters, FLOPs); of the last two with differences to the first row."""
    figures = published()
    first, *_ = (figures.get(rows[0][0], {}), *rows[0][1:])
    lines = [
        "| config | parameters, 2**20 | published | difference | published "
        "| GFLOPs | published | difference | published |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, *ours in rows:
        theirs, cells = figures.get(name, {}), [name]
        for value, start, unit, key, digits in zip(
            ours, rows[0][1:], (2**20, 1e9), ("params", "gflops"), (3, 2), strict=True
        ):
            known, known_start = theirs.get(key), first.get(key)
            cells += [f"{value / unit:.{digits}f}", known or "", f"{(value - start) / unit:+.{digits}f}"]
            cells.append(f"{float(known) - float(known_start):+.1f}" if known and known_start else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG")
    parser.add_argument("--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="of the image")
    parser.add_argument("--modules", type=int, metavar="DEPTH", help="also a table by module of each config")
    parser.add_argument("--interpolation", action="store_true", help="count interpolation too")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="config changes for all")
    args = parser.parse_args()
    rows = []
    for path in args.configs:
        cfg = load(path, args.opts)
        counter = flops(cfg, args.size or image_size(cfg), args.interpolation)
        rows.append((path.stem, parameters(cfg), counter.total()))
        if args.modules:
            print(flop_count_table(counter, max_depth=args.modules), end="\n\n")
            print("Not counted:", ", ".join(sorted(counter.unsupported_ops())), end="\n\n")
    print(table(rows))


if __name__ == "__main__":
    main()
