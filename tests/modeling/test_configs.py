"""Every config file builds, takes a training step and infers on a CPU, and is named in the README."""

from pathlib import Path

import pytest
import torch
from dcnv2_d2 import add_dcnv2_config
from dcnv2_d2.layers import ModulatedDeformConv2d
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(p for p in (ROOT / "configs").glob("**/*.yaml") if not p.name.startswith("Base"))


def make_input():
    masks = torch.zeros(1, 96, 128, dtype=torch.bool)
    masks[:, 10:70, 20:90] = True
    target = Instances((96, 128), gt_boxes=Boxes(torch.tensor([[20.0, 10, 90, 70]])), gt_classes=torch.tensor([2]))
    target.gt_masks = BitMasks(masks)
    image = torch.randint(0, 255, (3, 96, 128), dtype=torch.uint8)
    return [{"image": image, "instances": target, "height": 96, "width": 128}]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path):
    cfg = get_cfg()
    add_dcnv2_config(cfg)
    cfg.merge_from_file(str(path))
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    assert any(isinstance(m, ModulatedDeformConv2d) for m in model.modules())
    with EventStorage():
        losses = model(make_input())
    assert ("loss_mask" in losses) == cfg.MODEL.MASK_ON
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        assert len(model.eval()(make_input())) == 1
    assert str(path.relative_to(ROOT)) in (ROOT / "README.md").read_text()
