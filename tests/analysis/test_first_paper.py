"""Samples of stacked layers and bins of R-FCN, against hand-made cases and the operator itself."""

import sys

import numpy as np
import pytest
import torch
from dcnv2_d2 import analyze_support
from dcnv2_d2.analysis import BackboneNode, effective_dilation
from dcnv2_d2.analysis.first_paper import draw_bins, draw_samples, position_sensitive_bins, stacked_samples
from dcnv2_d2.layers import DeformConv2d
from dcnv2_d2.ops import deform_ps_roi_pool
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from PIL import Image
from torch import nn

from .detectors import Detector, config, real

RFCN, PLAIN = "rfcn_small_dconv_c3-c5_dpool", "rfcn_small_regular"


def make_rfcn(name=RFCN, *opts):
    torch.manual_seed(0)
    model = build_model(config(name, *opts)).eval()
    for parameter_name, parameter in model.named_parameters():
        if "conv_offset" in parameter_name:
            nn.init.normal_(parameter, std=0.3)
    return model


def test_stacked_samples_are_three_levels_deep():
    """Four layers, of which the last three count; the middle one moves all its taps 2 pixels down."""
    layers = [DeformConv2d(3 if i == 0 else 2, 2, 3, padding=1) for i in range(4)]
    layers[2].conv_offset.bias.data[0::2] = 2.0
    layers[0].conv_offset.bias.data[:] = 100.0  # must have no part
    found = stacked_samples(
        Detector(*layers), torch.zeros(3, 40, 50), {"a": BackboneNode(20, 15), "b": BackboneNode(0, 0)}
    )
    offsets = np.arange(-1, 2)
    ys = (15 + 2 + offsets[:, None, None] + offsets[:, None] + offsets).flatten()
    xs = (20 + offsets[:, None, None] + offsets[:, None] + offsets).flatten()
    expected = sorted((int(y), int(x)) for y in ys for x in xs)
    assert sorted((int(y), int(x)) for y, x in found["a"].tolist()) == expected and len(expected) == 729
    assert 0 < len(found["b"]) < 729  # those outside are left out


def test_stacked_samples_need_deformable_layers():
    with pytest.raises(ValueError, match="must have deformable layers in its backbone, got none"):
        stacked_samples(Detector(nn.Conv2d(3, 2, 3)), torch.zeros(3, 9, 9), {"a": BackboneNode(1, 1)})


BOXES = torch.tensor([[20.4, 30.5, 80.6, 100.2], [40.0, 12, 64, 36], [5.5, 60, 120, 121.7]])


@pytest.mark.parametrize("classes", [(0, 1, 2), (3, 3, 1)])
def test_bins_are_where_the_operator_pools(classes):
    """A map that holds coordinates gives the mean place of a bin's samples: they start in its near corner."""
    model = make_rfcn()
    image = torch.rand(3, 128, 128) * 255
    plain, moved = position_sensitive_bins(model, image, BOXES, torch.tensor(classes))
    assert plain.shape == moved.shape == (3, 25, 4)
    pooler = model.roi_heads.cls_pooler
    features = model.backbone(model.preprocess_image([{"image": image}]).tensor)
    offset = pooler.predict(model.roi_heads.conv_new_1(features["res5"]), [BOXES])
    size = 300  # so large that no sample is clamped or left out
    line = torch.arange(float(size))
    coordinates = torch.stack([line.expand(size, size), line[:, None].expand(size, size)])[None]
    for k, c in enumerate(classes):
        own = offset.unflatten(1, (-1, 2))[k : k + 1, c]
        for bins, o in ((plain, None), (moved, own)):
            box = BOXES[k : k + 1] + 100
            at = deform_ps_roi_pool(coordinates, [box], o, 5, 1.0, 2, 0.1)[0].flatten(1).T - 100
            extent = bins[k, :, 2:] - bins[k, :, :2]
            assert torch.allclose(at, bins[k, :, :2] - 0.5 + extent / 4, atol=1e-3)
    assert (moved - plain).abs().max() > 1


def test_plain_pooling_moves_nothing():
    plain, moved = position_sensitive_bins(make_rfcn(PLAIN), torch.rand(3, 128, 128), BOXES[:1], torch.tensor([1]))
    assert torch.equal(plain, moved)
    corners = torch.tensor([20.0, 31, 82, 101])  # rounded, the far pixel included
    assert torch.equal(torch.cat([plain[0, 0, :2], plain[0, -1, 2:]]).round(), corners)


@pytest.mark.parametrize(
    "make, classes, message",
    [
        (lambda: real("mask_rcnn_small_mdconv_c3-c5"), [0], "must have RFCNROIHeads, got StandardROIHeads"),
        (make_rfcn, [4], r"classes must be from 0 to 3, got \[4\]"),
        (make_rfcn, [-1], r"classes must be from 0 to 3, got \[-1\]"),
    ],
)
def test_errors(make, classes, message):
    with pytest.raises(ValueError, match=message):
        position_sensitive_bins(make(), torch.rand(3, 128, 128), BOXES[:1], torch.tensor(classes))


def test_effective_dilation_of_rfcn():
    """As in Table 2 of the first paper: a regular grid has dilation 1; layers, and classes of objects."""
    model = build_model(config(RFCN)).eval()
    boxes = [[10, 10, 30, 30], [40, 40, 90, 90], [0, 90, 128, 128]]
    annotations = [{"bbox": box, "bbox_mode": BoxMode.XYXY_ABS} for box in boxes]
    record = {"image": torch.rand(3, 128, 128) * 255, "height": 128, "width": 128, "annotations": annotations}
    table = effective_dilation(model, [record], areas=(1000, 3000))
    assert len(table.layers) == 12 and (table.count > 0).all()
    assert torch.allclose(table.mean, torch.ones(12, 4, dtype=torch.float64))


def colors(path):
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    close = {
        name: np.abs(pixels - color).max(1) < 100 for name, color in (("red", (255, 0, 0)), ("yellow", (255, 255, 0)))
    }
    return {name: int(found.sum()) for name, found in close.items()}


def test_drawings(tmp_path):
    picture = np.zeros((60, 80, 3), np.uint8)
    points = torch.tensor([[10.0, 20], [30, 40]])
    draw_samples(tmp_path / "samples.png", picture, {"a": BackboneNode(5, 5)}, {"a": points})
    assert colors(tmp_path / "samples.png")["red"] > 0
    plain = torch.tensor([[[10.0, 10, 30, 30]]])
    draw_bins(tmp_path / "bins.png", picture, ["worm 90%"], plain, plain + 15)
    found = colors(tmp_path / "bins.png")
    assert found["red"] > 20 and found["yellow"] > 20


def test_command(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    opts = ("DATASETS.TEST", "('bent_shapes_tiny_val',)", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
    (run / "config.yaml").write_text(config(RFCN, *opts).dump())
    DetectionCheckpointer(make_rfcn(), str(run)).save("model_final")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 96, 3)).astype(np.uint8)).save(tmp_path / "a.png")
    arguments = ["--runs", f"it={run}", "--input", tmp_path / "a.png", "--first-paper", "--score", "0"]
    monkeypatch.setattr(sys, "argv", ["analyze_support", *map(str, [*arguments, "--output", tmp_path / "out"])])
    analyze_support.main()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a_samples_it.png", "a_bins_it.png"}
