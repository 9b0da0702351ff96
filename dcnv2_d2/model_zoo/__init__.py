"""The configs of this package by name, and their models, with the names of Detectron2's own model_zoo.

>>> from dcnv2_d2 import model_zoo
>>> cfg = model_zoo.get_config("COCO/mask_rcnn/mask_rcnn_R_50_FPN_1x_mdconv_c3-c5.yaml")
"""

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ..checkpoint import Checkpointer
from ..config import get_config_file, load_config

__all__ = ["get", "get_config", "get_config_file"]


def get_config(config_path: str) -> CfgNode:
    """The config of a name as get_config_file takes it; without a GPU, its model runs on the CPU."""
    return load_config(get_config_file(config_path))


def get(config_path: str, device: str | None = None) -> nn.Module:
    """The model of a config, with the weights the config names: those of a classifier, from which training starts.

    Args:
        config_path: as get_config_file takes it.
        device: overrides MODEL.DEVICE.
    """
    cfg = get_config(config_path)
    if device is not None:
        cfg.MODEL.DEVICE = device
    model = build_model(cfg)
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    return model
