"""dcnv2_d2.analyze_support on untrained models, and the choice of nodes."""

import sys

import numpy as np
import pytest
import torch
from dcnv2_d2 import analyze_support, register_bent_shapes
from dcnv2_d2.analysis import BackboneNode, RoINode, choose_nodes, effective_receptive_field
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from .analysis.detectors import REGULAR, config, real

MODELS = {"regular": ("mask_rcnn_small_mdconv_c3-c5", *REGULAR), "DCNv2": ("mask_rcnn_small_mdconv_c3-c5_mdpool",)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders as training leaves them, and a picture of 40 x 32."""
    folder = tmp_path_factory.mktemp("runs")
    for name, args in MODELS.items():
        torch.manual_seed(0)
        opts = ("DATASETS.TEST", "('bent_shapes_tiny_val',)", "INPUT.MIN_SIZE_TEST", "64")
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text(config(*args, *opts).dump())
        DetectionCheckpointer(real(*args), str(folder / name)).save("model_final")
    pixels = np.random.default_rng(0).integers(0, 255, (32, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return folder


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["analyze_support.py", *map(str, args)])
    analyze_support.main()


FAST = ("--cell", "32", "--levels", "1", "--bound", "0.5")


def test_side_by_side(runs, monkeypatch, tmp_path):
    both = [f"{name}={runs / name}" for name in MODELS]
    nodes = ("--at", "15,5", "--box", "4,6,30,20")
    call(monkeypatch, "--runs", *both, "--input", runs / "picture.png", *nodes, *FAST, "--output", tmp_path)
    with Image.open(tmp_path / "picture_nodes.png") as figure:
        pixels = np.asarray(figure.convert("RGB"))
    assert pixels.shape[1] > 600 and pixels.std() > 10
    assert {f.name for f in tmp_path.glob("*.npz")} == {
        f"picture_nodes_{name}_{node}.npz" for name in MODELS for node in ("conv5_at_15_5", "RoI_4_6_30_20")
    }
    # The network sees the picture twice as large.
    found = np.load(tmp_path / "picture_nodes_DCNv2_conv5_at_15_5.npz")
    assert found["image"].shape == (64, 80, 3) and found["node"].tolist() == [30.5, 10.5]
    assert found["saliency"].shape == found["receptive_field"].shape == (64, 80)
    assert found["saliency_error"] < found["saliency_bound"] == 0.5 and found["saliency_cell"] == 32
    model = real(*MODELS["DCNv2"])
    DetectionCheckpointer(model).load(str(runs / "DCNv2" / "model_final.pth"))
    image = torch.from_numpy(found["image"].transpose(2, 0, 1).astype("float32"))
    field = effective_receptive_field(lambda i: BackboneNode(30.5, 10.5).respond(model, i), image)
    torch.testing.assert_close(torch.from_numpy(found["receptive_field"]), field)
    name = "backbone.bottom_up.res5.1.conv2"
    assert found[f"{name}/position"].shape == found[f"{name}/gradient"].shape == (len(found[f"{name}/modulation"]), 2)
    roi = np.load(tmp_path / "picture_nodes_regular_RoI_4_6_30_20.npz")
    assert roi["node"].tolist() == [8, 12, 60, 40]
    assert roi["roi_heads.box_pooler.level_poolers.0/position"].shape == (25, 2)


def test_one_model_and_its_own_detections(runs, monkeypatch, tmp_path):
    call(
        *(monkeypatch, "--config-file", runs / "DCNv2" / "config.yaml", "--score", "0", *FAST),
        *("--output", tmp_path, "--layers", "res5", "--input", runs / "picture.png"),
        *("--opts", "MODEL.WEIGHTS", runs / "DCNv2" / "model_final.pth"),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "MODEL.RPN.POST_NMS_TOPK_TEST", "5"),
    )
    assert (tmp_path / "picture_backbone.png").is_file() and (tmp_path / "picture_roi.png").is_file()
    found = {
        kind: {f.stem.split("config_")[1] for f in tmp_path.glob(f"*_{kind}_*.npz")} for kind in ("backbone", "roi")
    }
    assert {"large_object", "background"} <= found["backbone"] == found["roi"]


def test_dilation(runs, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_bent_shapes(str(tmp_path))
    try:
        call(monkeypatch, "--runs", f"DCNv2={runs / 'DCNv2'}", "--dilation", "2", "--output", tmp_path)
        assert "res5.1.conv2" in capsys.readouterr().out
        assert (tmp_path / "dilation_DCNv2.md").read_text().count("conv") == 12
        with pytest.raises(SystemExit, match="must have deformable layers"):
            call(monkeypatch, "--runs", f"a={runs / 'regular'}", "--dilation", "1", "--output", tmp_path)
    finally:
        monkeypatch.undo()
        register_bent_shapes()


@pytest.mark.parametrize(
    "args, expected",
    [
        (("--runs", "a={runs}/regular", "--box", "45,5,49,20"), "box x1, y1, x2, y2 must overlap the image"),
        (("--runs", "a={runs}/regular", "--at", "5,32"), "x, y must be in the image"),
        (("--runs", "a={runs}/regular", "--score", "1.1"), "the model must detect something"),
        (("--config-file", "{runs}/regular/config.yaml"), "MODEL.WEIGHTS must be given"),
    ],
)
def test_what_cannot_be_shown_is_said(runs, monkeypatch, tmp_path, args, expected):
    args = [a.format(runs=runs) for a in args]
    with pytest.raises(SystemExit, match=expected):
        call(monkeypatch, *args, "--input", runs / "picture.png", "--output", tmp_path)


class Found(nn.Module):
    """Gives the same instances for every image."""

    def __init__(self, boxes, scores, masks=None):
        super().__init__()
        self.instances = Instances((60, 80), pred_boxes=Boxes(torch.tensor(boxes)), scores=torch.tensor(scores))
        if masks is not None:
            self.instances.pred_masks = masks

    def forward(self, inputs):
        assert not self.training and [inputs[0][k] for k in ("height", "width")] == [60, 80]
        return [{"instances": self.instances}]


BOXES = [[30.0, 10, 50, 40], [4, 6, 12, 10], [0, 40, 70, 60], [60, 5, 78, 30]]


def test_nodes_of_detections():
    nodes = choose_nodes(Found(BOXES, [0.9, 0.8, 0.3, 0.1]).train(), torch.zeros(3, 60, 80))
    assert nodes["small object"] == (BackboneNode(8, 8), RoINode(4, 6, 12, 10))
    assert nodes["large object"] == (BackboneNode(40, 25), RoINode(30, 10, 50, 40))
    (point, square) = nodes["background"]
    half = point.x - square.x1
    assert half > 5 and (square.x2 - square.x1, square.y2 - square.y1) == (2 * half, 2 * half)
    assert square.x1 >= 0 and square.x2 <= 80 and square.y1 >= 0 and square.y2 <= 60
    for x1, y1, x2, y2 in BOXES:  # those of low score too
        assert square.x2 <= x1 or square.x1 >= x2 or square.y2 <= y1 or square.y1 >= y2


def test_nodes_are_on_masks():
    masks = torch.zeros(2, 60, 80, dtype=torch.bool)
    masks[0, 10:40, 30:33] = masks[0, 37:40, 30:50] = True  # an L, whose centre of mass is beside it
    nodes = choose_nodes(Found(BOXES[:2], [0.9, 0.8], masks), torch.zeros(3, 60, 80))
    node = nodes["large object"][0]
    assert masks[0, int(node.y), int(node.x)]
    assert nodes["small object"][0] == BackboneNode(8, 8)  # an empty mask


def test_one_detection_and_none():
    assert list(choose_nodes(Found(BOXES[:1], [0.9]), torch.zeros(3, 60, 80))) == ["large object", "background"]
    with pytest.raises(ValueError, match="must detect something of a score of at least 0.95, got nothing"):
        choose_nodes(Found(BOXES[:1], [0.9]), torch.zeros(3, 60, 80), 0.95)
