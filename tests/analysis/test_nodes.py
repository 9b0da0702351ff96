"""Which cell or RoI a node is, and in what state it leaves the model."""

import pytest
import torch
from dcnv2_d2.analysis import BackboneNode, RoINode
from dcnv2_d2.analysis.nodes import magnitude
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from torch import nn

from .detectors import REGULAR, Detector, config, real

H, W = 36, 52


def coordinates(height=H, width=W):
    """An image whose colours are y, x and 1."""
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([ys, xs, torch.ones_like(xs)]).float()[None]


def every(stride):
    """Cell (i, j) shows pixel (i * stride, j * stride)."""
    conv = nn.Conv2d(3, 3, 1, stride, bias=False)
    conv.weight.data = torch.eye(3)[..., None, None]
    return conv


@pytest.mark.parametrize(
    "x, y, seen",
    [
        (12, 20, [20, 12]),
        (13.9, 18.1, [20, 12]),
        (0, 35, [32, 0]),  # the last row is 32
        (-0.5, -0.5, [0, 0]),
        (51.5, 35.5, [32, 48]),
    ],
)
def test_the_nearest_cell(x, y, seen):
    response = BackboneNode(x, y).respond(Detector(every(4)), coordinates())
    assert response.tolist() == [[*seen, 1]]


def test_padding_does_not_move_the_cell():
    response = BackboneNode(40, 8).respond(Detector(every(4), divisibility=32), coordinates())
    assert response.tolist() == [[8, 40, 1]]


def test_batch_and_normalisation():
    images = torch.cat([coordinates(), 2 * coordinates()])
    response = BackboneNode(40, 8).respond(Detector(every(4), mean=2, std=4), images)
    torch.testing.assert_close(response, (torch.tensor([[8.0, 40, 1], [16, 80, 2]]) - 2) / 4)


@pytest.mark.parametrize("x, y", [(-0.6, 5), (W, 5), (5, -1), (5, H), (float("nan"), 5)])
def test_a_position_outside(x, y):
    with pytest.raises(ValueError, match=rf"x, y must be in the image \({W} x {H}\), got"):
        BackboneNode(x, y).respond(Detector(every(4)), coordinates())


def test_features_by_name():
    model, images = real(), torch.rand(1, 3, 64, 64) * 255
    features = model.backbone.bottom_up(model.preprocess_image([{"image": images[0]}]).tensor)
    assert list(features) == ["res4", "res5"]
    for node, feature in ((BackboneNode(16, 40), "res5"), (BackboneNode(16, 40, "res4"), "res4")):
        torch.testing.assert_close(node.respond(model, images), features[feature][:, :, 5, 2])
    with pytest.raises(ValueError, match="feature must be one of res4, res5, got 'p3'"):
        BackboneNode(16, 40, "p3").respond(model, images)


def test_a_map_of_the_pyramid():
    cfg = config()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    stages = ["res2", "res3", "res4", "res5"]
    cfg.merge_from_list(["MODEL.RESNETS.OUT_FEATURES", stages, "MODEL.FPN.IN_FEATURES", stages, *REGULAR])
    cfg.merge_from_list(["MODEL.RPN.IN_FEATURES", ["p2"], "MODEL.ROI_HEADS.IN_FEATURES", ["p2"]])
    cfg.MODEL.FPN.OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8
    model, images = build_model(cfg).eval(), torch.rand(1, 3, 64, 64) * 255
    padded = model.preprocess_image([{"image": images[0]}]).tensor
    expected = model.backbone(padded)["p3"][:, :, 4, 3]
    torch.testing.assert_close(BackboneNode(24, 32, "p3").respond(model, images), expected)
    assert BackboneNode(24, 32).respond(model, images).shape[1] == 8 * 8  # the ResNet's last, res5


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("node", [BackboneNode(9, 30), RoINode(4, 9, 40, 60)])
def test_batch_norm_in_training_mode(node):
    model, images = real(), torch.rand(2, 3, 64, 64) * 255
    expected = node.respond(model, images)
    model.train()
    model.backbone.bottom_up.res3.eval()  # as frozen layers are
    before, state = modes(model), {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(node.respond(model, images), expected)
    assert modes(model) == before and any(before) and not all(before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError):
        BackboneNode(-9, 0).respond(model, images)
    with pytest.raises(ValueError):
        BackboneNode(9, 9, "nothing").respond(model, images)
    assert modes(model) == before


@pytest.mark.parametrize(
    "args", [(), ("mask_rcnn_small_mdconv_c3-c5", *REGULAR), ("mask_rcnn_small_mdconv_c3-c5_mdpool",)]
)
def test_a_roi_is_what_the_box_head_gives(args):
    model, images = real(*args), torch.rand(2, 3, 64, 70) * 255
    found = RoINode(8, 12, 40.5, 30).respond(model, images)
    features = model.backbone(model.preprocess_image([{"image": i} for i in images]).tensor)
    boxes = [Boxes(torch.tensor([[8, 12, 40.5, 30]]))] * 2
    expected = model.roi_heads.box_head(model.roi_heads.box_pooler([features["res5"]], boxes))
    torch.testing.assert_close(found, expected)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_first_stage_of_a_cascade():
    model = real(
        "mask_rcnn_small_mdconv_c3-c5_mdpool",
        *("MODEL.ROI_HEADS.NAME", "DCNv2CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"),
    )
    images, heads = torch.rand(1, 3, 64, 64) * 255, model.roi_heads
    found = RoINode(8, 12, 40, 30).respond(model, images)
    features = model.backbone(model.preprocess_image([{"image": images[0]}]).tensor)
    pooled = heads.box_pooler([features["res5"]], [Boxes(torch.tensor([[8.0, 12, 40, 30]]))])
    torch.testing.assert_close(found, heads.box_head[0](pooled))


def test_heads_that_share_res5():
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8
    model, images = build_model(cfg).eval(), torch.rand(1, 3, 64, 64) * 255
    assert type(model.roi_heads).__name__ == "Res5ROIHeads"
    features = model.backbone(model.preprocess_image([{"image": images[0]}]).tensor)
    pooled = model.roi_heads.pooler([features["res4"]], [Boxes(torch.tensor([[8.0, 12, 40, 30]]))])
    torch.testing.assert_close(
        RoINode(8, 12, 40, 30).respond(model, images), model.roi_heads.res5(pooled).mean(dim=(2, 3))
    )


def test_a_box_across_the_border_is_clipped():
    model, images = real(), torch.rand(1, 3, 64, 72) * 255
    assert torch.equal(RoINode(-20, 10, 100, 99).respond(model, images), RoINode(0, 10, 72, 64).respond(model, images))


@pytest.mark.parametrize(
    "box", [(80, 5, 90, 20), (5, -9, 20, 0), (20, 5, 20, 9), (30, 5, 20, 9), (float("nan"), 5, 9, 9)]
)
def test_a_box_outside(box):
    with pytest.raises(ValueError, match=r"box x1, y1, x2, y2 must overlap the image \(72 x 64\), got"):
        RoINode(*box).respond(real(), torch.rand(1, 3, 64, 72))


def test_a_model_without_a_box_head():
    with pytest.raises(ValueError, match="model must have roi_heads with a box_predictor, got Detector"):
        RoINode(4, 4, 9, 9).respond(Detector(every(4)), coordinates())


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_magnitude_of_nothing(value):
    with pytest.raises(ValueError, match="must have a norm above 0, got"):
        magnitude(torch.full((1, 3), value))
