"""Whole detectors with weights that make every path matter: random norms, offsets, masks, classes and boxes."""

import torch
from dcnv2_d2 import add_dcnv2_config
from dcnv2_d2.config import CONFIGS
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

FASTER = CONFIGS / "COCO/faster_rcnn/faster_rcnn_R_50_FPN_1x_mdconv_c3-c5.yaml"
MASK = CONFIGS / "COCO/mask_rcnn/mask_rcnn_R_50_FPN_1x_mdconv_c3-c5.yaml"


def make_config(config, *options):
    """A config for the CPU from a file or nested dicts."""
    cfg = get_cfg()
    add_dcnv2_config(cfg)
    if isinstance(config, dict):
        cfg.merge_from_other_cfg(CfgNode(config))
    else:
        cfg.merge_from_file(str(config))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *options])
    return cfg


def make_model(config, *options):
    return randomise(build_model(make_config(config, *options))).eval()


@torch.no_grad()
def randomise(model):
    for name, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.uniform_(0.5, 1.0).mul_(0.2 if name.endswith("conv3.norm") else 0.7)
            module.bias.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        elif name.endswith("conv_offset"):
            module.weight.normal_(0, 0.2 / (9 * module.in_channels) ** 0.5)
            module.bias.normal_(0, 0.5)
        elif name.endswith("cls_score"):
            module.weight.normal_(0, 1.0 / module.weight[0].numel() ** 0.5)
        elif name.endswith(("objectness_logits", "anchor_deltas", "bbox_pred", "mask_head.predictor")):
            module.weight.normal_(0, 0.3 / module.weight[0].numel() ** 0.5)
        elif isinstance(module, nn.Linear) and "branch" in name:
            module.weight.normal_(0, 1.0 / module.weight[0].numel() ** 0.5)
            module.bias.normal_(0, 0.1)
    return model


@torch.no_grad()
def detect(model, image):
    """The instances of an image Tensor[3, H, W], in its own pixels."""
    (output,) = model([{"image": image}])
    return output["instances"]
