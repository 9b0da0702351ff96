"""dcnv2_d2.analyze_model: counts that follow from the layers' shapes, and the paper's differences between its rows."""

import functools
import sys
from pathlib import Path

import pytest
import torch
from dcnv2_d2 import analyze_model, load_config

QUICK_START = "quick_start/mask_rcnn_small_mdconv_c3-c5_mdpool.yaml"
BLOCKS, WIDTHS = {3: 4, 4: 6, 5: 3}, {3: 128, 4: 256, 5: 512}  # ResNet-50's conv3 to conv5


def conv_parameters(first, per_position):
    """Of the prediction convolutions from a stage on: 9 taps for each channel of the 3x3 convolution, and a bias."""
    return sum(BLOCKS[s] * (9 * WIDTHS[s] + 1) * per_position for s in range(first, 6))


DPOOL, MDPOOL = 1_229_410, 14_046_355
ADDED = {  # row of Table 1 -> exact number, and operators.md's figure in 2**20
    "regular_roipool": (0, 0),
    "dconv_c5": (conv_parameters(5, 18), 0.237),
    "dconv_c4-c5": (conv_parameters(4, 18), 0.475),
    "dconv_c3-c5": (conv_parameters(3, 18), 0.554),
    "dconv_c5_dpool": (conv_parameters(5, 18) + DPOOL, 0.237 + 1.172),
    "dconv_c3-c5_dpool": (conv_parameters(3, 18) + DPOOL, 0.554 + 1.172),
    "mdconv_c3-c5_mdpool": (conv_parameters(3, 27) + MDPOOL, 0.831 + 13.396),
}


@pytest.mark.parametrize("row", ADDED)
@pytest.mark.parametrize("model", ["faster", "mask"])
def test_parameters_of_table_1(model, row):
    if (model, row) == ("mask", "regular_roipool"):
        pytest.skip("not in the paper")
    name, published = f"{model}_rcnn_R_50_DC5_1000px_", analyze_model.published()
    regular, deformable = (parameters(f"paper/table1/{name}{r}.yaml") for r in ("regular", row))
    exact, specified = ADDED[row]
    assert deformable - regular == exact
    assert exact / 2**20 == pytest.approx(specified, abs=0.01)
    printed = float(published[name + row]["params"]) - float(published[name + "regular"]["params"])
    assert exact / 2**20 == pytest.approx(printed, abs=0.1001)  # both numbers are rounded to 0.1


@functools.cache
def parameters(path):
    return analyze_model.parameters(load_config(path))


def count(path, size, *opts, **kwargs):
    return analyze_model.flops(load_config(path, opts), size, **kwargs)


def test_deformable_layers():
    """64 x 96 pixels; conv4 has 64 channels, 8 groups and the stride in its first 3x3."""
    small = (
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.NUM_GROUPS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 2),
        *("MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.FPN.OUT_CHANNELS", 8, "MODEL.ROI_BOX_HEAD.FC_DIM", 8),
        *("MODEL.RPN.POST_NMS_TOPK_TEST", 20),
    )
    path, size = "COCO/faster_rcnn/faster_rcnn_R_50_FPN_1x_mdconv_c3-c5_g4.yaml", (64, 96)
    modules = count(path, size, *small)
    layer = "backbone.bottom_up.res4.{}.conv2"
    positions, product, prediction = 4 * 6, 9 * (64 // 8) * 64, 9 * 64 * 27 * 4
    for block in range(6):
        assert modules[layer.format(block)] == positions * (product + prediction)
        assert modules[layer.format(block) + ".conv_offset"] == positions * prediction

    plain = count(path, size, *small, "MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False] * 4)
    assert plain[layer.format(0)] == positions * product
    channels = {s: 2 * 8 * 2 ** (s - 2) for s in BLOCKS}
    added = sum(9 * channels[s] * 27 * 4 * BLOCKS[s] * (64 >> s) * (96 >> s) for s in BLOCKS)
    assert modules[""] - plain[""] == added

    modules = count(path, size, *small, interpolation=True)
    first = positions * (product + prediction)  # its samples: 9 for each position and channel of the input
    assert modules[layer.format(0)] == first + 4 * 9 * 64 * positions
    assert modules["roi_heads.box_pooler"] == 20 * 8 * 7 * 7 * 2 * 2 * 4


def test_heads_have_all_boxes_and_pooling_counts_once():
    opts = ("MODEL.RPN.POST_NMS_TOPK_TEST", 40, "TEST.DETECTIONS_PER_IMAGE", 7, "INPUT.MIN_SIZE_TEST", 64)
    modules = count(QUICK_START, (64, 96), *opts)
    inputs, hidden, bins = 48 * 7 * 7, 128, 49
    assert modules["roi_heads.box_head"] == 40 * (inputs * hidden + hidden**2)
    branch = inputs * hidden + hidden**2 + hidden * 3 * bins
    assert modules["roi_heads.box_pooler.level_poolers.0.branch"] == (40 + 7) * branch  # the mask pooler's too
    first, second, deconv, predictor = 49 * 9 * 48 * 64, 49 * 9 * 64 * 64, 49 * 4 * 64 * 64, 196 * 64 * 3
    assert modules["roi_heads.mask_head"] == 7 * (first + second + deconv + predictor)
    modules = count(QUICK_START, (64, 96), *opts, interpolation=True)
    samples = 2 * 2 * 48 * 49 * 2  # of an RoI, 7x7 in both heads: to predict from, and at the offsets
    assert modules["roi_heads.box_pooler.level_poolers.0"] == 40 * (branch + 4 * samples)
    assert modules["roi_heads.mask_pooler"] == 7 * (branch + 4 * samples)


def test_counts_do_not_depend_on_the_seed():
    totals = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        opts = ("MODEL.RPN.POST_NMS_TOPK_TEST", 20, "TEST.DETECTIONS_PER_IMAGE", 3)
        totals.add(count(QUICK_START, (64, 96), *opts)[""])
    assert len(totals) == 1


def test_table_has_differences_to_the_first_row():
    rows = [
        ("faster_rcnn_R_50_DC5_1000px_regular", 300 * 2**20, 7e9),
        ("mask_rcnn_R_50_DC5_1000px_mdconv_c3-c5_mdpool", 301 * 2**20, 9.5e9),
        ("unknown", 299 * 2**20, 7e9),
    ]
    lines = analyze_model.table(rows).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]]
    assert cells[0] == ["300.000", "51.3", "+0.000", "+0.0", "7.00", "326.7", "+0.00", "+0.0"]
    assert cells[1] == ["301.000", "53.8", "+1.000", "+2.5", "9.50", "461.1", "+2.50", "+134.4"]
    assert cells[2] == ["299.000", "", "-1.000", "", "7.00", "", "+0.00", ""]


def test_command(monkeypatch, capsys):
    opts = ["--opts", "MODEL.RPN.POST_NMS_TOPK_TEST", "10", "TEST.DETECTIONS_PER_IMAGE", "2"]
    monkeypatch.setattr(sys, "argv", ["analyze_model.py", QUICK_START, "--size", "64", "96", "--modules", "2", *opts])
    analyze_model.main()
    out = capsys.readouterr().out
    modules = count(QUICK_START, (64, 96), "MODEL.RPN.POST_NMS_TOPK_TEST", 10, "TEST.DETECTIONS_PER_IMAGE", 2)
    parameters = (48 * 49 * 128 + 128 + 128**2 + 128) / 2**20
    assert f"| roi_heads.box_head | {parameters:.3f} | {modules['roi_heads.box_head'] / 1e9:.3f} |" in out
    assert "| roi_heads.box_head.fc1 |" not in out  # deeper than asked for
    assert f"| all | 1.681 | {modules[''] / 1e9:.3f} |" in out
    assert out.splitlines()[-1].startswith(
        f"| {Path(QUICK_START).stem} | 1.681 |  | +0.000 |  | {modules[''] / 1e9:.2f} |"
    )
