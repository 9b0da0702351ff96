#!/usr/bin/env python
"""Writes MODEL_ZOO.md: every config, the AP that is published of it, its parameters and FLOPs as counted now."""

import csv
import re
from collections.abc import Callable
from pathlib import Path

from dcnv2_d2 import load_config  # before Detectron2: it makes old releases importable
from dcnv2_d2.analyze_model import flops, image_size, parameters
from dcnv2_d2.config import CONFIGS
from detectron2.config import CfgNode
from tabulate import tabulate

PAGE = Path(__file__).parents[1] / "MODEL_ZOO.md"
PAPER = "Deformable ConvNets v2 "
HEAD = """# Model zoo

`python tools/write_model_zoo.py` writes this page, from the configs, `configs/published.csv` and the counts of
`dcnv2_d2.analyze_model`.

```python
from dcnv2_d2 import model_zoo

cfg = model_zoo.get_config("COCO/mask_rcnn/mask_rcnn_R_50_FPN_1x_mdconv_c3-c5.yaml")
model = model_zoo.get("COCO/mask_rcnn/mask_rcnn_R_50_FPN_1x_mdconv_c3-c5.yaml")  # with the weights of a classifier
```

- **Names**: `dconv` and `mdconv` are deformable convolution, v1 and modulated, in the stages that follow (c5 is
  Detectron2's res5; `g4`: 4 offset groups); `dpool` and `mdpool` are deformable RoI pooling, in the mask head too;
  `mimic` is feature mimicking, of the foreground unless `bg` or `both` follows.
- **AP** is on COCO val2017 unless said otherwise, and is what the source reports for this model. The configs on COCO
  have not been trained with this code yet. "Table" is a table of the [paper](https://arxiv.org/abs/1811.11168).
- **Parameters** are all those of training, in millions (10**6). The paper's are in units of 2**20: its 51.3 are
  53.8 M.
- **GFLOPs** are 10**9 multiplications with an addition, at inference, for one image of 3:2 at the config's test size.
  [docs/models.md](docs/models.md) says how both are counted, and where they differ from the paper's.
- **The first paper's** configs, R-FCN, class-aware RPN, DeepLab and Faster R-CNN on VOC, Cityscapes and COCO, are in
  [docs/dcnv1.md](docs/dcnv1.md).
"""
TITLES = {
    "quick_start": "Quick start: generated data, some minutes on a CPU; AP on bent_shapes_val",
    "COCO/faster_rcnn": "Faster R-CNN, ResNet-50 with FPN",
    "COCO/mask_rcnn": "Mask R-CNN, ResNet-50 with FPN",
    "COCO/cascade_mask_rcnn": "Cascade Mask R-CNN, ResNet-50 with FPN",
    "COCO/retinanet": "RetinaNet",
    "COCO/panoptic_fpn": "Panoptic FPN",
    "COCO/semantic": "Semantic segmentation",
    "paper/table1": "The paper's detector, Table 1: shorter side 1000",
    "paper/table2": "The paper's detector, Table 2: shorter side 800",
    "paper/table3": "The paper's detector, Table 3: feature mimicking",
    "paper/table4": "The paper's detector, Table 4: AP on COCO test-dev",
}


def leaves() -> list[str]:
    """Names of all configs that can be trained, but those of the first paper, which docs/dcnv1.md has."""
    files = (path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
    return [name for name in files if not name.startswith("dcnv1/") and not Path(name).name.startswith("Base")]


def folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def results() -> dict[str, list[dict[str, str]]]:
    """The rows of configs/published.csv by config."""
    found: dict[str, list[dict[str, str]]] = {}
    with (CONFIGS / "published.csv").open() as file:
        for row in csv.DictReader(file):
            found.setdefault(row["config"], []).append(row)
    return found


def remembered(count: Callable[[CfgNode], float]) -> Callable[[str], float]:
    """The count by a config's name, once for all configs of the same model: with other schedules or test sets."""
    known = {}

    def count_of(name: str) -> float:
        cfg = load_config(name, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
        key = cfg.MODEL.dump(), image_size(cfg), cfg.TEST.DETECTIONS_PER_IMAGE
        if key not in known:
            known[key] = count(cfg)
        return known[key]

    return count_of


count_parameters = remembered(lambda cfg: parameters(cfg) / 1e6)
count_gflops = remembered(lambda cfg: flops(cfg, image_size(cfg))[""] / 1e9)


def make_page(count_parameters: Callable[[str], float], count_gflops: Callable[[str], float]) -> str:
    """The page; the functions give the millions of parameters and the GFLOPs of a config's name."""
    published, sections = results(), {folder: [] for folder in TITLES}
    for name in leaves():
        stem, params, gflops = Path(name).stem, count_parameters(name), count_gflops(name)
        detector = re.split("_(?=regular|m?dconv|m?dpool)", stem)[0]
        for row in published.get(stem, [{"box_ap": "", "mask_ap": "", "source": ""}]):
            cells = [row["box_ap"], row["mask_ap"], row["source"].removeprefix(PAPER), f"{params:.1f}", f"{gflops:.1f}"]
            rows = sections.setdefault(folder_of(name), [])
            rows.append(((detector, params, stem), [f"[{stem}](configs/{name})", *cells]))
    headers = ["config", "box AP", "mask AP", "source", "parameters, M", "GFLOPs"]
    parts = [HEAD]
    for folder, rows in sections.items():
        table = tabulate([cells for _, cells in sorted(rows)], headers, tablefmt="github", disable_numparse=True)
        parts.append(f"## {TITLES.get(folder, folder)}\n\n{table}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(make_page(count_parameters, count_gflops))
