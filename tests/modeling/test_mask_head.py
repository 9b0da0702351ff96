"""The averaged mask heads: their shapes from the config, and that each of them learns."""

import torch
from dcnv2_d2.modeling.mask_head import AveragedMaskHeads
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import build_mask_head
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from ..models import MASK, make_config


def test_every_head_learns():
    options = ["MODEL.ROI_MASK_HEAD.NAME", "AveragedMaskHeads", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8"]
    cfg = make_config(MASK, *options, "MODEL.ROI_MASK_HEAD.NUM_CONV", "2")
    heads = build_mask_head(cfg, ShapeSpec(channels=4, width=14, height=14))
    assert isinstance(heads, AveragedMaskHeads) and len(heads) == len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
    assert heads.layers(torch.randn(2, 4, 14, 14)).shape == (2, 80, 28, 28)
    x = torch.randn(2, 4, 14, 14)
    mean = torch.stack([head.layers(x).sigmoid() for head in heads]).mean(0)
    torch.testing.assert_close(heads.layers(x).sigmoid(), mean)
    assert heads.layers(1e4 * x).isfinite().all()
    masks = torch.zeros(1, 40, 40, dtype=torch.bool)
    masks[:, 5:30, 8:35] = True
    target = Instances((40, 40), proposal_boxes=Boxes(torch.tensor([[4.0, 4, 36, 36]])), gt_classes=torch.tensor([7]))
    target.gt_masks = BitMasks(masks)
    for p in heads.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    with EventStorage():
        heads(torch.randn(1, 4, 14, 14), [target])["loss_mask"].backward()
    assert all(p.grad.abs().max() > 0 for p in heads.parameters())
