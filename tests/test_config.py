"""Configs that cannot work are refused in one sentence, before a model is built."""

import subprocess
import sys

import pytest
from dcnv2_d2 import add_dcnv2_config, compat
from dcnv2_d2.config import check_config, require_weights
from detectron2.config import get_cfg


def config(**keys):
    cfg = get_cfg()
    add_dcnv2_config(cfg)
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.BACKBONE.NAME = "build_dcnv2_resnet_fpn_backbone"
    cfg.merge_from_list([part for key, value in keys.items() for part in ("MODEL." + key.replace("__", "."), value)])
    return cfg


DEFORMABLE = "ModulatedDeformRoIPool"


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"ROI_HEADS__NAME": "DCNv2ROIHeads", "ROI_BOX_HEAD__POOLER_TYPE": DEFORMABLE},
        {"ROI_HEADS__NAME": "DCNv2CascadeROIHeads", "ROI_BOX_HEAD__POOLER_TYPE": "DeformRoIPool"},
        {"ROI_HEADS__NAME": "MimickingROIHeads", "META_ARCHITECTURE": "MimickingRCNN"},
        {"ROI_MASK_HEAD__POOLER_TYPE": DEFORMABLE},  # with MASK_ON False
        {"META_ARCHITECTURE": "RetinaNet", "ROI_BOX_HEAD__POOLER_TYPE": DEFORMABLE},
        {"RESNETS__DEFORM_ON_PER_STAGE": [False, True, True, True]},
    ],
    ids=str,
)
def test_good(keys):
    check_config(config(**keys))


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            {"ROI_BOX_HEAD__POOLER_TYPE": DEFORMABLE},
            r"MODEL\.ROI_HEADS\.NAME must be DCNv2ROIHeads .* MODEL\.ROI_BOX_HEAD\.POOLER_TYPE .* got StandardROIHeads",
        ),
        ({"MASK_ON": True, "ROI_MASK_HEAD__POOLER_TYPE": DEFORMABLE}, r"MODEL\.ROI_MASK_HEAD\.POOLER_TYPE"),
        (
            {"ROI_HEADS__NAME": "MimickingCascadeROIHeads"},
            r"MODEL\.META_ARCHITECTURE must be MimickingRCNN .*MimickingCascadeROIHeads, got GeneralizedRCNN",
        ),
    ],
    ids=str,
)
def test_bad(keys, message):
    with pytest.raises(ValueError, match=message):
        check_config(config(**keys))


@pytest.mark.parametrize(
    "compiled, device, reason",
    [
        (True, "cuda", None),
        (True, "cpu", "Detectron2's own deformable layers do not run on the CPU"),
        (False, "cuda", "this Detectron2 has no compiled part"),
    ],
)
@pytest.mark.parametrize("builder", ["resnet_backbone", "resnet_fpn_backbone", "retinanet_resnet_fpn_backbone"])
def test_detectron2s_own_deformable_backbone(builder, compiled, device, reason, monkeypatch):
    monkeypatch.setattr(compat, "has_compiled_part", lambda: compiled)
    cfg = config(BACKBONE__NAME=f"build_{builder}", RESNETS__DEFORM_ON_PER_STAGE=[False, False, False, True])
    cfg.MODEL.DEVICE = device
    if reason is None:
        check_config(cfg)
    else:
        with pytest.raises(ValueError, match=f"BACKBONE.NAME must be build_dcnv2_{builder} .* as {reason}, got"):
            check_config(cfg)


@pytest.mark.parametrize("weights", ["", "detectron2://ImageNetPretrained/MSRA/R-50.pkl"])
def test_weights_are_required(weights, tmp_path):
    cfg = config(WEIGHTS=weights)
    cfg.OUTPUT_DIR = str(tmp_path)
    message = rf"MODEL\.WEIGHTS must be given, those of a trained detector, got '{weights}'"
    for resume in (False, True):
        with pytest.raises(ValueError, match=message):
            require_weights(cfg, resume=resume)
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    require_weights(cfg, resume=True)
    with pytest.raises(ValueError, match=message):
        require_weights(cfg)
    cfg.MODEL.WEIGHTS = "model_final.pth"
    require_weights(cfg)


def test_no_root_logger_is_touched(tmp_path):
    """Messages come with the name of their module, and nothing sets up the logging of the user's program."""
    (tmp_path / "config.yaml").write_text("MODEL: {DEVICE: cuda}")
    program = f"""
import logging, dcnv2_d2, torch
torch.cuda.is_available = lambda: False
assert dcnv2_d2.load_config({str(tmp_path / "config.yaml")!r}).MODEL.DEVICE == "cpu"
assert not logging.getLogger().handlers
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "MODEL.DEVICE is cuda, but no GPU is available: running on the CPU." in process.stderr
