"""Configs that cannot work are refused in one sentence, before a model is built."""

import pytest
from dcnv2_d2 import add_dcnv2_config, compat
from dcnv2_d2.config import check_config
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


@pytest.mark.parametrize("compiled", [True, False])
def test_detectron2s_own_deformable_backbone(compiled, monkeypatch):
    monkeypatch.setattr(compat, "has_compiled_part", lambda: compiled)
    cfg = config(BACKBONE__NAME="build_resnet_fpn_backbone", RESNETS__DEFORM_ON_PER_STAGE=[False, False, False, True])
    if compiled:
        check_config(cfg)
    else:
        with pytest.raises(ValueError, match=r"MODEL\.BACKBONE\.NAME must be one of the build_dcnv2_\*"):
            check_config(cfg)
