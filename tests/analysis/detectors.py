"""Detectors for the tests of the instruments: hand-made ones, whose answers are known, and small real ones."""

from pathlib import Path

import torch
from dcnv2_d2 import add_dcnv2_config
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from torch import nn

QUICK_START = Path(__file__).parents[2] / "configs" / "quick_start"


class Body(nn.Sequential):
    """Layers that make the map "res5"."""

    def forward(self, x):
        return {"res5": super().forward(x)}


class Detector(nn.Module):
    """As much of a Detectron2 model as a backbone node needs."""

    input_format = "RGB"

    def __init__(self, *layers, mean=0.0, std=1.0, divisibility=0):
        super().__init__()
        self.backbone = Body(*layers)
        self.mean, self.std, self.divisibility = mean, std, divisibility

    device = torch.device("cpu")

    @property
    def pixel_mean(self):
        return torch.full((3, 1, 1), float(self.mean))

    def preprocess_image(self, inputs):
        return ImageList.from_tensors([(x["image"] - self.mean) / self.std for x in inputs], self.divisibility)


def config(name="mask_rcnn_small_mdconv_c3-c5", *opts):
    cfg = get_cfg()
    add_dcnv2_config(cfg)
    cfg.merge_from_file(str(QUICK_START / f"{name}.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *opts])
    return cfg


REGULAR = ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, False, False, False]")


def real(*args):
    """A small detector with random weights and, where it is deformable, random offsets."""
    model = build_model(config(*args)).eval()
    for name, parameter in model.named_parameters():
        if "conv_offset" in name or "branch" in name:
            nn.init.normal_(parameter, std=0.1)
    return model
