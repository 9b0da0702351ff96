"""Files of other people, v1 weights in a v2 model, and the conversion command."""

import shutil
from pathlib import Path

import pytest
import torch
from dcnv2_d2 import convert_checkpoint
from dcnv2_d2.checkpoint import Checkpointer, add_mask_logits, read_state_dict
from dcnv2_d2.config import CONFIGS
from dcnv2_d2.layers import DeformConv2d, ModulatedDeformConv2d
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from torch import nn

from ..models import FASTER, detect, make_config, make_model
from ..reference import assert_near
from .test_mmdetection import SMALL_HEADS, run_mmdetections_way, to_mmdetection

SMALL = CONFIGS / "quick_start/mask_rcnn_small_mdconv_c3-c5.yaml"


class Anything:
    pass


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s, "meta": {"epoch": 1}}, lambda s: {"model": s}]
)
def test_reads_weights_wherever_they_are(wrap, tmp_path):
    torch.save(wrap({"module.a": torch.ones(2), "b": torch.zeros(3)}), tmp_path / "file.pth")
    read = read_state_dict(tmp_path / "file.pth")
    assert read.keys() == {"a", "b"} and torch.equal(read["a"], torch.ones(2))


def test_objects_need_trust(tmp_path):
    path = tmp_path / "file.pth"
    torch.save({"state_dict": {"a": torch.ones(2)}, "meta": Anything()}, path)
    with pytest.raises(ValueError, match="can run code; if you trust its source, pass trust=True"):
        read_state_dict(path)
    assert read_state_dict(path, trust=True).keys() == {"a"}


def test_wrong_files(tmp_path):
    (tmp_path / "text").write_text("<html>404</html>")
    (tmp_path / "empty").write_bytes(b"")
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "settings")
    torch.save([1, 2], tmp_path / "list")
    for name, sentence in {
        "text": "must be a PyTorch checkpoint, got",
        "empty": "must be a PyTorch checkpoint, got",
        "settings": "must hold a state dict of tensors, got a dict of epoch, lr",
        "list": "must hold a state dict of tensors, got a list",
    }.items():
        for trust in (False, True):
            with pytest.raises(ValueError, match=sentence):
                read_state_dict(tmp_path / name, trust=trust)
    with pytest.raises(OSError):
        read_state_dict(tmp_path / "nowhere")


def v1_and_v2(**kwargs):
    v1, v2 = (
        DeformConv2d(4, 6, 3, padding=1, **kwargs),
        ModulatedDeformConv2d(4, 6, 3, padding=1, mask_scale=2.0, **kwargs),
    )
    for p in (*v1.parameters(), *v2.parameters()):
        nn.init.normal_(p)
    return v1, v2


@pytest.mark.parametrize("offset_groups", [1, 2])
def test_a_v1_layer_in_a_v2_layer(offset_groups):
    """With MASK_SCALE 2 the masks are 1 at the start, and the function is that of v1."""
    v1, v2 = v1_and_v2(offset_groups=offset_groups)
    weights = v1.state_dict()
    add_mask_logits(weights, nn.ModuleList([v2]), "other.")  # of other names
    assert all(torch.equal(weights[name], value) for name, value in v1.state_dict().items())
    weights = {f"0.{name}": value for name, value in weights.items()}
    for _ in range(2):  # what fits stays
        add_mask_logits(weights, nn.ModuleList([v2]))
    nn.ModuleList([v2]).load_state_dict(weights, strict=True)
    x = torch.randn(2, 4, 9, 7)
    assert_near(v2(x), v1(x), 1e-6)
    assert not v2.conv_offset.weight[18 * offset_groups :].any() and not v2.conv_offset.bias[18 * offset_groups :].any()


def test_other_shapes_are_still_errors():
    v1, v2 = v1_and_v2(offset_groups=2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        v1.load_state_dict(v2.state_dict())
    other = {f"0.{name}": value for name, value in v1_and_v2()[0].state_dict().items()}
    add_mask_logits(other, nn.ModuleList([v2]))
    with pytest.raises(RuntimeError, match="size mismatch"):
        nn.ModuleList([v2]).load_state_dict(other)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("spelling", [".conv_offset.", ".conv_offset_mask.", "_offset."])
def test_a_v1_model_warm_starts_a_v2_model(spelling, prefix, tmp_path, caplog):
    """Our own v1 checkpoints, old ones and Detectron2's."""
    v1, v2 = (
        build_model(make_config(SMALL, "MODEL.RESNETS.DEFORM_MODULATED", str(modulated))).eval()
        for modulated in (False, True)
    )
    for layer in (m for m in v1.modules() if isinstance(m, DeformConv2d)):
        nn.init.normal_(layer.conv_offset.weight, 0, 0.05)
    state = {prefix + name.replace(".conv_offset.", spelling): value for name, value in v1.state_dict().items()}
    torch.save({"model": state}, tmp_path / "v1.pth")
    Checkpointer(v2).load(str(tmp_path / "v1.pth"))
    assert not [r for r in caplog.records if r.levelname == "WARNING" and r.name.startswith(("fvcore", "detectron2"))]
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected, actual = v1.backbone(image), v2.backbone(image)
    assert_near(actual["res5"], expected["res5"], 1e-5)
    assert expected["res5"].std() > 0


@pytest.fixture
def convert(monkeypatch, capsys):
    """The command, in this process: its status and its output."""

    def run(*args):
        monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", *map(str, args)])
        try:
            status = convert_checkpoint.main()
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr().out

    return run


def test_the_command(convert, tmp_path):
    """Of a model whose images are prepared otherwise than by default, which its config text says."""
    way = [*run_mmdetections_way("2.x"), "INPUT.FORMAT", "BGR", "MODEL.RESNETS.STRIDE_IN_1X1", "True"]
    way += ["MODEL.PIXEL_MEAN", "[103.5, 116.2, 123.6]", "MODEL.PIXEL_STD", "[57.3, 57.1, 58.3]"]
    model = make_model(FASTER, *SMALL_HEADS, *way)
    source = to_mmdetection(model, "2.x")
    text = "model = dict(backbone=dict(type='ResNet', style='caffe'))\n"
    text += "img_norm_cfg = dict(\n    mean=[103.5, 116.2, 123.6], std=[57.3, 57.1, 58.3], to_rgb=False)\n"
    torch.save({"state_dict": source, "meta": {"mmdet_version": "2.3.0", "config": text}}, tmp_path / "faster.pth")
    status, output = convert(tmp_path / "faster.pth", tmp_path / "converted")
    assert status == 0 and "0 unmatched" in output and "Note" not in output
    cfg = make_config(tmp_path / "converted/faster.yaml")
    assert cfg.INPUT.FORMAT == "BGR"
    assert Path(cfg.MODEL.WEIGHTS) == tmp_path / "converted/faster.pth"
    converted = build_model(cfg).eval()
    DetectionCheckpointer(converted).load(cfg.MODEL.WEIGHTS)
    image = torch.rand(3, 64, 96) * 255
    assert torch.equal(detect(converted, image).scores, detect(model, image).scores)

    del source["neck.lateral_convs.0.conv.bias"]
    source["backbone.layer2.0.attention.weight"] = torch.zeros(2)
    torch.save(source, tmp_path / "odd.pth")
    status, output = convert(tmp_path / "odd.pth", tmp_path / "converted")
    assert status == 1 and "2 unmatched:" in output and "RGB is assumed" in output
    assert "backbone.layer2.0.attention.weight: no place in the model" in output
    assert "backbone.fpn_lateral2.bias: the model has (256,), the file nothing" in output

    for file, option in (("plain", ["--caffe"]), ("of_caffe", [])):  # by the option, or by its name
        shutil.copy(tmp_path / "odd.pth", tmp_path / f"{file}.pth")
        assert "assumed" not in convert(tmp_path / f"{file}.pth", tmp_path / "converted", *option)[1]
        assert make_config(tmp_path / f"converted/{file}.yaml").INPUT.FORMAT == "BGR"


def test_the_command_joins_separate_predictions(convert, tmp_path):
    state = {"a.p_conv.weight": torch.randn(18, 4, 3, 3), "a.p_conv.bias": torch.randn(18)}
    torch.save(state | {"a.conv.weight": torch.randn(4, 4, 3, 3)}, tmp_path / "blocks.pth")
    assert convert(tmp_path / "blocks.pth", tmp_path / "out")[0] == 0
    assert read_state_dict(tmp_path / "out/blocks.pth").keys() == {
        "a.weight",
        "a.conv_offset.weight",
        "a.conv_offset.bias",
    }


def test_the_command_refuses(convert, tmp_path):
    (tmp_path / "text.pth").write_text("404")
    torch.save({"backbone.bottom_up.stem.conv1.weight": torch.ones(1)}, tmp_path / "ours.pth")
    torch.save({"a.p_conv.weight": torch.ones(1)}, tmp_path / "blocks.pth")
    for name, sentence in {
        "text": "must be a PyTorch checkpoint",
        "ours": "has Detectron2's names already",
        "blocks": "must be that of a 3x3 convolution",
    }.items():
        status, _ = convert(tmp_path / f"{name}.pth", tmp_path / "out")
        assert sentence in status
    assert not (tmp_path / "out").exists()
    torch.save({"a.p_conv.weight": torch.ones(18, 1, 3, 3), "a.p_conv.bias": torch.ones(18),
                "a.conv.weight": torch.ones(1, 1, 3, 3)}, tmp_path / "blocks.pth")  # fmt: skip
    assert "would be overwritten" in convert(tmp_path / "blocks.pth", tmp_path)[0]
