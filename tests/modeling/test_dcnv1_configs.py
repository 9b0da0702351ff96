"""The configs of the first paper: each is what its name says, builds, takes a training step and infers, on a CPU."""

import csv
import re
from pathlib import Path

import pytest
import torch
from dcnv2_d2 import analyze_model, load_config
from dcnv2_d2.layers import DeformConv2d, DeformPSRoIPool, DeformRoIPool, PSRoIPool
from dcnv2_d2.modeling.aligned_inception import AlignedInceptionBlock
from dcnv2_d2.modeling.class_aware_rpn import ClassAwareRPN
from dcnv2_d2.modeling.multi_scale import with_augmentation
from dcnv2_d2.modeling.rfcn import RFCNROIHeads
from dcnv2_d2.solver import build_optimizer
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import GeneralizedRCNN, SemanticSegmentor
from detectron2.utils.events import EventStorage
from torchvision.ops import RoIPool

from .test_configs import make_input, one_thread  # noqa: F401

CONFIGS = Path(__file__).parents[2] / "configs"
PAPER = {p.stem: p for p in sorted((CONFIGS / "dcnv1").glob("table*/*.yaml"))}
QUICK_START = {p.stem: p for p in sorted((CONFIGS / "quick_start").glob("*.yaml")) if "rcnn" not in p.stem}
SMALL = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.RESNETS.WIDTH_PER_GROUP", 4),
    *("MODEL.DCNV2.DC5_CHANNELS", 8, "MODEL.RFCN.CONV_DIM", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 16, "MODEL.RPN.CONV_DIMS", [16]),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 200, "MODEL.RPN.PRE_NMS_TOPK_TEST", 100, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32, "TEST.AUG.MAX_SIZE", 120),
]
LOSSES = {
    "deeplab": {"loss_sem_seg"},
    "rpn": {"loss_cls", "loss_box_reg"},
    "faster": {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"},
    "rfcn": {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"},
}
KINDS = {"deeplab": SemanticSegmentor, "rpn": ClassAwareRPN, "faster": GeneralizedRCNN, "rfcn": GeneralizedRCNN}


def load(path, *opts):
    return load_config(str(path), ["MODEL.DEVICE", "cpu", *opts])


@pytest.mark.parametrize("stem", [*PAPER, *QUICK_START])
def test_trains_a_step_and_infers(stem):
    path = (PAPER | QUICK_START)[stem]
    cfg = load(path, *(SMALL if stem in PAPER else []))
    torch.manual_seed(0)
    model = build_model(cfg)
    assert_named(stem, model)
    system = stem.split("_")[0]
    assert isinstance(model, KINDS[system])
    optimizer = build_optimizer(cfg, model)
    with EventStorage():
        losses = model(make_input())
    assert losses.keys() == LOSSES[system] and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    optimizer.step()
    with torch.no_grad():
        (output,) = with_augmentation(cfg, model.eval())(make_input())
    if system == "deeplab":
        assert output["sem_seg"].shape == (cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, 91, 125)
    else:
        assert output["instances"].image_size == (91, 125)


def assert_named(stem, model):
    modules = dict(model.named_modules())
    last_three = [m for name, m in modules.items() if re.search(r"res5\.\d\.conv2$", name)]
    dilated = re.search(r"_dilation(\d)", stem)
    count = re.search(r"_dconv(\d)", stem)
    deformable = [m for m in modules.values() if isinstance(m, DeformConv2d)]
    if "AIR" in stem:
        assert any(isinstance(m, AlignedInceptionBlock) for m in modules.values())
        assert len(deformable) == (9 if "_dconv_c5" in stem else 0)
    elif "small" not in stem:
        assert len(deformable) == (int(count[1]) if count else 0)
        assert {m.dilation for m in last_three} == {(int(dilated[1]),) * 2 if dilated else (2, 2)}
    if "deeplab" in stem and "small" not in stem:
        assert {m.conv_offset.dilation for m in deformable} <= {(1, 1)}
    elif "small" not in stem:
        assert all(m.conv_offset.dilation == m.dilation for m in deformable)
    heads, deform = getattr(model, "roi_heads", None), "_dpool" in stem
    if isinstance(heads, RFCNROIHeads):
        assert {type(m) for m in (heads.cls_pooler, heads.bbox_pooler)} == {DeformPSRoIPool if deform else PSRoIPool}
    elif heads is not None:
        assert {type(m) for m in heads.box_pooler.level_poolers} == {DeformRoIPool if deform else RoIPool}


def weights(stem, *opts):
    """Parameters but biases and norms, as the paper's differences count them."""
    cfg = load(PAPER[stem], *opts)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(cfg).parameters() if p.dim() > 1)


@pytest.mark.parametrize(
    "plain, deformable, opts, millions",
    [
        ("deeplab_R_101_voc_regular", "deeplab_R_101_voc_dconv3", (), 0.249),
        ("rpn_R_101_voc_regular", "rpn_R_101_voc_dconv3", (), 0.249),
        ("faster_rcnn_R_101_voc_regular", "faster_rcnn_R_101_voc_dconv3_dpool", (), 1.478),
        ("rfcn_R_101_voc_regular", "rfcn_R_101_voc_dconv3_dpool", (), 2.457),
        ("rfcn_R_101_voc_regular", "rfcn_R_101_voc_dconv3_dpool", ("MODEL.RESNETS.DEFORM_NUM_GROUPS", 4), 3.203),
    ],
)
def test_parameters_of_table_4(plain, deformable, opts, millions):
    assert round((weights(deformable, *opts) - weights(plain)) / 1e6, 3) == millions


def test_every_row_and_column_has_a_config_and_published_figures():
    with (CONFIGS / "dcnv1" / "published.csv").open() as file:
        rows = {row["config"]: row for row in csv.DictReader(file)}
    assert rows.keys() == PAPER.keys()
    counted = {stem: row for stem, row in rows.items() if row["params"]}
    assert len(counted) == 8 and {stem: analyze_model.published()[stem] for stem in counted} == counted
    for stem, row in rows.items():
        assert row["source"] == f"Deformable ConvNets v1 Table {PAPER[stem].parent.name[-1]}"
        figures = {key for key in ("ap", "ap50", "ap70", "miou") if row[key]}
        expected = {"miou"} if "deeplab" in stem else {"ap"} if "coco" in stem else {"ap50", "ap70"}
        assert figures == expected and all(0 < float(row[key]) < 100 for key in figures)
    systems = (
        "deeplab_R_101_voc",
        "deeplab_R_101_cityscapes",
        "rpn_R_101_voc",
        "faster_rcnn_R_101_voc",
        "rfcn_R_101_voc",
    )
    one = {f"{s}_{row}" for s in systems for row in ("regular", "dconv1", "dconv2", "dconv3", "dconv6")}
    three = {f"{s}_dilation{d}" for s in systems for d in (4, 6, 8)}
    three |= {f"{s}_{row}" for s in systems[3:] for row in ("dpool", "dconv3_dpool")}
    tables = {n: {stem for stem, path in PAPER.items() if path.parent.name == f"table{n}"} for n in (1, 3, 5)}
    assert (tables[1], tables[3], len(tables[5])) == (one, three, 14)


def test_every_config_is_linked_by_its_figures():
    with (CONFIGS / "dcnv1" / "published.csv").open() as file:
        rows = list(csv.DictReader(file))
    page = (CONFIGS.parent / "docs" / "dcnv1.md").read_text()
    for row in rows:
        figures = " / ".join(filter(None, (row[key] for key in ("ap", "ap50", "ap70", "miou"))))
        assert page.count(f"[{figures}](../{PAPER[row['config']].relative_to(CONFIGS.parent)})") == 1


@pytest.mark.parametrize("stem", PAPER)
def test_settings(stem):
    cfg = load(PAPER[stem])
    assert f"output/{stem}" == cfg.OUTPUT_DIR
    solver, model = cfg.SOLVER, cfg.MODEL
    assert (solver.MOMENTUM, solver.WEIGHT_DECAY, solver.GAMMA) == (0.9, 5e-4, 0.1)
    assert pytest.approx(5e-4 * solver.IMS_PER_BATCH) == solver.BASE_LR
    assert model.DCNV2.OFFSET_LR_FACTOR == 1 and not model.RESNETS.DEFORM_MODULATED
    assert model.RESNETS.NORM == "FrozenBN" and model.BACKBONE.FREEZE_AT == 2
    assert model.WEIGHTS == "" if "AIR" in stem else model.WEIGHTS.endswith("/R-101.pkl")
    if "deeplab" in stem:
        assert (21 if "voc" in stem else 19) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        assert (30000 if "voc" in stem else 45000) == solver.MAX_ITER and solver.STEPS == (solver.MAX_ITER * 2 // 3,)
        return
    coco = "coco" in stem
    epoch = 2 * (117266 if coco else 16551) / solver.IMS_PER_BATCH
    assert round((8 if coco else 7) * epoch) == solver.MAX_ITER
    assert (round((5.333 if coco else 4.83) * epoch),) == solver.STEPS
    assert (("coco_2017_test-dev",) if coco else ("voc_2007_test",)) == cfg.DATASETS.TEST
    assert (80 if coco else 20) == model.ROI_HEADS.NUM_CLASSES
    assert [[64, 128, 256, 512][not coco :]] == model.ANCHOR_GENERATOR.SIZES
    assert (model.RPN.PRE_NMS_TOPK_TRAIN, model.RPN.POST_NMS_TOPK_TRAIN, model.RPN.NMS_THRESH) == (6000, 300, 0.7)
    assert (model.ROI_HEADS.BATCH_SIZE_PER_IMAGE, model.ROI_HEADS.NMS_THRESH_TEST) == (128, 0.3)
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TEST) == ((600,), 1000)
    assert ("multiscale" in stem) == cfg.TEST.AUG.ENABLED
    assert bool(cfg.TEST.AUG.AVERAGE_IOU) == ("averaged" in stem)


@pytest.mark.parametrize(
    "stem, pattern, factor",
    [
        ("rfcn_R_101_voc_dconv3_dpool", r"conv_new_1", 3.0),
        ("rpn_R_101_coco_dconv3", r"conv_new_1", 3.0),
        ("faster_rcnn_R_101_voc_dpool", r"box_pooler.*branch", 0.01),
        ("deeplab_R_101_voc_dconv3", r"\.bias$", 2.0),
        ("rfcn_R_101_voc_regular", r"nothing", 1.0),
    ],
)
def test_learning_rates(stem, pattern, factor):
    cfg = load(PAPER[stem], *SMALL)
    model = build_model(cfg)
    rates = {id(p): group["lr"] for group in build_optimizer(cfg, model).param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad and (re.search(pattern, name) or stem != "rfcn_R_101_voc_regular"):
            expected = factor if re.search(pattern, name) else 1.0
            assert rates[id(p)] == pytest.approx(cfg.SOLVER.BASE_LR * expected), name
