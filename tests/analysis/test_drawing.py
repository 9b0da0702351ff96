"""The figures are drawn without a warning of matplotlib, whose next release would fail there."""

import json

import numpy as np
import pytest
import torch
from dcnv2_d2.analysis import BackboneNode, Locations, RoINode, SaliencyRegion, Support
from dcnv2_d2.analysis.drawing import draw_curves, draw_predictions, draw_sampling
from dcnv2_d2.analysis.figures import draw_supports
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from matplotlib.figure import Figure
from PIL import Image

pytestmark = pytest.mark.filterwarnings("error")
IMAGE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def support(node, of_bins):
    position = torch.rand(49, 2) * 60
    locations = [Locations("layer", position, torch.rand(49, 2), torch.ones(49), of_bins)]
    region = SaliencyRegion(torch.rand(60, 80) > 0.5, 0.05, 0.1, 2, 10)
    return Support(node, "large object", IMAGE, locations, torch.rand(60, 80), region)


def assert_picture(path):
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 100 and pixels.std() > 10


def test_supports(tmp_path):
    nodes = [support(BackboneNode(40, 30), False), support(RoINode(20, 10, 60, 50), True)]
    draw_supports(tmp_path / "supports.png", {"regular": nodes, "DCNv2": nodes})
    assert_picture(tmp_path / "supports.png")


def test_sampling(tmp_path):
    draw_sampling(tmp_path / "a.png", [(IMAGE, "bolt", (30.0, 40.0), torch.rand(81, 2) * 60, torch.rand(81))] * 2)
    assert_picture(tmp_path / "a.png")


def test_predictions(tmp_path):
    instances = Instances((60, 80), pred_boxes=Boxes(torch.tensor([[5.0, 5, 40, 40]])), scores=torch.ones(1))
    instances.pred_classes = torch.zeros(1, dtype=torch.int64)
    record = {"annotations": [{"bbox": [5, 5, 40, 40], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}]}
    metadata = MetadataCatalog.get("test_drawing").set(thing_classes=["bolt"])
    try:
        draw_predictions(tmp_path / "a.png", [(IMAGE, record, instances)] * 3, metadata)
    finally:
        MetadataCatalog.remove("test_drawing")
    assert_picture(tmp_path / "a.png")


@pytest.fixture
def curves(tmp_path, monkeypatch):
    """Draws the curves of a metrics.json; returns the panels by their titles."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k)))

    def draw(*entries):
        (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, entries)))
        draw_curves(tmp_path / "curves.png", tmp_path / "metrics.json")
        assert_picture(tmp_path / "curves.png")
        return {axes.get_title(): axes for axes in figures[-1].axes}

    return draw


LOSSES = [{"iteration": i, "total_loss": 3.0 - i} for i in (0, 1)]


def test_one_evaluation_is_a_bar_with_its_number(curves):
    panels = curves(*LOSSES, {"iteration": 1, "bbox/AP": 41.72, "segm/AP": 37.0, "bbox/AP50": float("nan")})
    (bars,) = panels["average precision"].containers
    assert [bar.get_width() for bar in bars][:2] == [41.72, pytest.approx(float("nan"), nan_ok=True)]
    assert [t.get_text() for t in panels["average precision"].texts][::2] == ["41.7", "37.0"]
    assert [t.get_text() for t in panels["average precision"].get_yticklabels()] == ["bbox/AP", "bbox/AP50", "segm/AP"]
    assert len(panels["loss"].lines) == 1 and not panels["loss"].containers


def test_several_evaluations_are_curves(curves):
    panels = curves(*LOSSES, *({"iteration": i, "bbox/AP": 10.0 * i} for i in (1, 2)))
    (line,) = panels["average precision"].lines
    assert line.get_xydata().tolist() == [[1, 10], [2, 20]]
