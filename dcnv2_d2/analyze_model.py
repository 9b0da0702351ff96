"""Counts parameters and FLOPs of config files; prints a Markdown table beside published figures.

python -m dcnv2_d2.analyze_model configs/paper/table2/faster*regular.yaml configs/paper/table2/faster*dconv*.yaml
python -m dcnv2_d2.analyze_model --modules 3 COCO/mask_rcnn/mask_rcnn_R_50_FPN_1x_mdconv_c3-c5.yaml

Differences are to the first config. Parameters are in units of 2**20, as in the paper. A FLOP is a multiplication with
an addition, as in the paper; counted are convolutions and matrix products at inference, for one image whose shorter
side is INPUT.MIN_SIZE_TEST and whose longer side is 1.5 times that (--size changes it), with as many proposals
(MODEL.RPN.POST_NMS_TOPK_TEST) and detections (TEST.DETECTIONS_PER_IMAGE) as the config allows. Interpolation between
samples is counted with --interpolation only: the paper's figures are without it.
"""

import argparse
import csv
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from fvcore.nn import parameter_count
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from .config import get_config_file, load_config

# So that an untrained network has all its proposals and detections
ALL_BOXES = [
    *("MODEL.RPN.NMS_THRESH", 1.0),
    *("MODEL.ROI_HEADS.NMS_THRESH_TEST", 1.0, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
]
aten, ours = torch.ops.aten, torch.ops.dcnv2_d2


def parameters(cfg: CfgNode) -> int:
    """How many parameters the model of a config has, frozen ones too; those of R-CNN mimicking are in training only."""
    return sum(p.numel() for p in build_on_meta(cfg).parameters())


def build_on_meta(cfg: CfgNode) -> nn.Module:
    """The model of a config without memory or values."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def image_size(cfg: CfgNode) -> tuple[int, int]:
    """(height, width) of an image of 3:2; see docs/models.md for why."""
    return cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST * 3 // 2


# What PyTorch's counter does not know: from shapes to FLOPs, where it counts multiplications and additions apart. A
# bilinear sample is four of each.
def deform_conv2d(input, offset, weight, *args, out_shape, interpolation=False):
    images, channels, *_ = input
    _, in_group, *kernel = weight
    _, out_channels, *out_size = out_shape
    taps = images * math.prod(kernel) * math.prod(out_size)
    return 2 * taps * (in_group * out_channels + 4 * interpolation * channels)


def pooling(ratio: int) -> Callable[..., int]:
    """The formula of an operator whose sampling ratio is the argument of this number."""
    return lambda *args, out_shape: 2 * math.prod(out_shape) * args[ratio] ** 2 * 4


def nothing(*args: Any, out_shape: tuple[int, ...]) -> int:
    return 0


# In place of the operators' own formulas, which count the samples
FORMULAS = {ours.deform_conv2d: deform_conv2d, ours.deform_roi_pool: nothing, ours.deform_ps_roi_pool: nothing}
INTERPOLATION = {
    ours.deform_conv2d: functools.partial(deform_conv2d, interpolation=True),
    ours.deform_roi_pool: pooling(6),
    ours.deform_ps_roi_pool: pooling(6),
    torch.ops.torchvision.roi_align: pooling(5),
    aten.upsample_bilinear2d: lambda *args, out_shape: 2 * math.prod(out_shape) * 4,
}


class ShapesOnly(TorchDispatchMode):
    """Convolutions and matrix products are not computed but zero, so that the largest model takes a second."""

    skipped = {aten.convolution.default, aten.addmm.default, aten.mm.default, ours.deform_conv2d.default}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function not in self.skipped:
            return function(*args, **(kwargs or {}))
        return torch.zeros_like(function(*tree_map_only(Tensor, lambda t: t.to("meta"), args)), device="cpu")


@torch.no_grad()
def flops(cfg: CfgNode, size: tuple[int, int], interpolation: bool = False) -> dict[str, float]:
    """FLOPs of the model of a config, by the names of its modules; the whole model's is "".

    Args:
        cfg: any config whose model takes images.
        size: height and width of the image.
        interpolation: whether samples of deformable convolution, RoI pooling and upsampling count too.
    """
    cfg = cfg.clone()
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *ALL_BOXES])
    model = build_model(cfg).eval()
    for p in model.parameters():  # Fresh weights without trained norms make infinite scores, of which no box is left.
        p.zero_()
    formulas = FORMULAS | (INTERPOLATION if interpolation else {})
    with ShapesOnly(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model([{"image": torch.rand(3, *size) * 255}])
    counts = {name: sum(by_operator.values()) / 2 for name, by_operator in counter.get_flop_counts().items()}
    return {name.partition(".")[2]: count for name, count in counts.items() if name != "Global"}


def by_module(cfg: CfgNode, counts: dict[str, float], depth: int) -> str:
    """Markdown of the parameters and FLOPs of the modules down to a depth."""
    known = parameter_count(build_on_meta(cfg))
    names = [name for name in known if name.count(".") < depth and (known[name] or name in counts)]
    lines = ["| module | parameters, 2**20 | GFLOPs |", "|---|---|---|"]
    for name in names:
        lines.append(f"| {name or 'all'} | {known[name] / 2**20:.3f} | {counts.get(name, 0) / 1e9:.3f} |")
    return "\n".join(lines)


def published() -> dict[str, dict[str, str]]:
    """Rows of the files published.csv that have parameters or FLOPs, by the config's name."""
    figures: dict[str, dict[str, str]] = {}
    for name in ("published.csv", "dcnv1/published.csv"):
        with open(get_config_file(name)) as file:
            figures |= {row["config"]: row for row in csv.DictReader(file) if row["params"] or row.get("gflops")}
    return figures


def table(rows: list[tuple[str, int, float]]) -> str:
    """Markdown of rows of (config, parameters, FLOPs), with published figures and differences to the first row."""
    figures = published()
    first, *start = rows[0]
    headings = ["config"]
    for quantity in ("parameters, 2**20", "GFLOPs"):
        headings += [quantity, "published", "difference", "published"]
    lines = [headings, ["---"] * len(headings)]
    for name, *ours in rows:
        cells = [name]
        for i, (key, unit, digits) in enumerate((("params", 2**20, 3), ("gflops", 1e9, 2))):
            theirs, theirs_first = (figures.get(config, {}).get(key) for config in (name, first))
            cells += [f"{ours[i] / unit:.{digits}f}", theirs or "", f"{(ours[i] - start[i]) / unit:+.{digits}f}"]
            cells.append(f"{float(theirs) - float(theirs_first):+.1f}" if theirs and theirs_first else "")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="of the image")
    parser.add_argument("--modules", type=int, metavar="DEPTH", help="also a table by module of each config")
    parser.add_argument("--interpolation", action="store_true", help="count interpolation too")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="config changes for all configs")
    args = parser.parse_args()
    rows = []
    for name in args.configs:
        cfg = load_config(name, ["MODEL.DEVICE", "cpu", *args.opts])
        counts = flops(cfg, args.size or image_size(cfg), args.interpolation)
        rows.append((Path(name).stem, parameters(cfg), counts[""]))
        if args.modules:
            print(by_module(cfg, counts, args.modules), end="\n\n")
    print(table(rows))


if __name__ == "__main__":
    main()
