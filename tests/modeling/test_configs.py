"""Every config file is what its name says, builds, takes a training step and infers on a CPU."""

import re

import pytest
import torch
from dcnv2_d2 import load_config
from dcnv2_d2.config import CONFIGS
from dcnv2_d2.layers import DeformConv2d, DeformRoIPool, ModulatedDeformConv2d, ModulatedDeformRoIPool
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torchvision.ops import RoIPool

# test_dcnv1_configs.py has those of the first paper
FIRST_PAPER = re.compile(r"/dcnv1/|/(rfcn|rpn|deeplab)_")
LEAVES = sorted(
    p for p in CONFIGS.rglob("*.yaml") if not p.name.startswith("Base") and not FIRST_PAPER.search(p.as_posix())
)
# Fewer channels, the same layers; those of quick_start are small as they are.
SMALL = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.FPN.OUT_CHANNELS", 16),
    *("MODEL.DCNV2.DC5_CHANNELS", 32, "MODEL.DCNV2.MDPOOL_FC_DIMS", [16, 16], "MODEL.ROI_BOX_HEAD.FC_DIM", 32),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "MODEL.RETINANET.NUM_CONVS", 1),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 200, "MODEL.RPN.PRE_NMS_TOPK_TEST", 100, "MODEL.RPN.POST_NMS_TOPK_TEST", 50),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32, "MODEL.MIMIC.NUM_ROIS", 2, "MODEL.MIMIC.CROP_SIZE", 64),
]
LAYERS = {"R_50": (4, 6, 3), "R_101": (4, 23, 3), "X_101": (4, 23, 3), "small": (4, 4, 4)}  # conv3 to conv5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These networks are so small that threads mostly wait for each other, very long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(path):
    return load_config(str(path), ["MODEL.DEVICE", "cpu"])  # raises on a key that is not known


def make_input():
    """An image whose sides are no multiples of anything, with an object."""
    masks = torch.zeros(1, 91, 125, dtype=torch.bool)
    masks[:, 10:70, 20:90] = True
    target = Instances((91, 125), gt_boxes=Boxes(torch.tensor([[20.0, 10, 90, 70]])), gt_classes=torch.tensor([2]))
    target.gt_masks = BitMasks(masks)
    image = torch.randint(0, 255, (3, 91, 125), dtype=torch.uint8)
    return [{"image": image, "instances": target, "sem_seg": masks[0].long(), "height": 91, "width": 125}]


OUTCOMES = {}


def train_and_infer(cfg):
    """The model of a config, the names of its losses and of its results; once for configs of the same model."""
    key = cfg.MODEL.dump()
    if key not in OUTCOMES:
        torch.manual_seed(0)
        model = build_model(cfg)
        with EventStorage():
            losses = model(make_input())
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            (output,) = model.eval()(make_input())
        OUTCOMES[key] = model, losses.keys(), output.keys()
    return OUTCOMES[key]


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)
def test_config(path):
    cfg = load(path)
    if path.parent.name != "quick_start":
        width = 1 if "X_101" in path.stem else 8
        cfg.merge_from_list([*SMALL, "MODEL.RESNETS.WIDTH_PER_GROUP", width])
    model, losses, output = train_and_infer(cfg)
    assert_deformable_as_named(path.stem, model)
    detector = "rcnn" in path.stem or "panoptic" in path.stem
    expected = {"loss_rpn_cls": detector, "loss_mask": detector and "faster" not in path.stem}
    expected |= {"loss_mimic": "mimic" in path.stem, "loss_mimic_cls": "mimic" in path.stem}
    expected |= {"loss_box_reg_stage2": "cascade" in path.stem}
    expected |= {"loss_sem_seg": "semantic" in path.stem or "panoptic" in path.stem}
    assert {name: name in losses for name in expected} == expected
    kinds = {"instances": "semantic" not in path.stem, "sem_seg": expected["loss_sem_seg"]}
    assert {name: name in output for name in kinds} == kinds


def assert_deformable_as_named(stem, model):
    """dconv, mdconv with stages and groups; dpool, mdpool, roipool; the ResNet."""
    modules = list(model.modules())
    convs = [m for m in modules if isinstance(m, DeformConv2d)]
    counts = next(count for name, count in LAYERS.items() if name in stem)
    named = re.search(r"_(m?)dconv_c(\d)(?:-c5|-c4)?(_g4)?", stem)
    assert len(convs) == (sum(counts[int(named[2]) - 3 :]) if named else 0)
    if named:
        assert {type(m) for m in convs} == {ModulatedDeformConv2d if named[1] else DeformConv2d}
        assert {m.offset_groups for m in convs} == {4 if named[3] else 1}
    if "X_101" in stem:
        assert {m.groups for m in modules if getattr(m, "kernel_size", 0) == (3, 3)} >= {32}
    heads = getattr(model, "roi_heads", None)
    for name in ("box", "mask"):
        pooler = getattr(heads, f"{name}_pooler", None)
        types = {type(m) for m in pooler.level_poolers} if pooler else set()
        pools = {"_mdpool": ModulatedDeformRoIPool, "_dpool": DeformRoIPool, "_roipool": RoIPool}
        wanted = next((pool for key, pool in pools.items() if key in stem), None)
        assert types == {wanted} if wanted and pooler else not types & set(pools.values())


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)
def test_settings(path):
    cfg, stem, folder = load(path), path.stem, path.parent.name
    if folder == "quick_start":
        return
    solver, output, tests = cfg.SOLVER, cfg.OUTPUT_DIR, cfg.DATASETS.TEST
    steps, iterations = solver.STEPS, solver.MAX_ITER
    assert output == f"output/{stem}"
    assert (solver.IMS_PER_BATCH, solver.MOMENTUM, solver.WEIGHT_DECAY) == (16, 0.9, 1e-4)
    assert f"mimic_{cfg.MODEL.MIMIC.REGIONS}" in stem or "mimic_" not in stem
    weights = "X-101-32x8d" if "X_101_32x8d" in stem else "R-101" if "R_101" in stem else "R-50"
    assert cfg.MODEL.WEIGHTS.endswith(f"/{weights}.pkl")
    if path.parts[-3] == "COCO":
        assert tests[0].startswith("coco_2017_val")
        assert iterations == (270000 if "_3x" in stem else 90000)
        assert steps == ((210000, 250000) if "_3x" in stem else (60000, 80000))
        return
    # Sixteen epochs of 117,266 images, section 4.1
    assert (solver.BASE_LR, solver.GAMMA, iterations) == (0.02, 0.1, 16 * 117266 // 16)
    assert steps == tuple(round(epochs * 117266 / 16) for epochs in (10, 14))
    side = 800 if "800px" in stem else 1000
    assert (folder == "table2") == (side == 800)
    assert (*cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST) == (side, side)
    assert tests == (("coco_2017_test-dev",) if "test-dev" in stem else ("coco_2017_val",))
    rpn, heads = cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS
    assert (rpn.NMS_THRESH, rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST) == (0.7, 2000, 1000)
    assert (rpn.BATCH_SIZE_PER_IMAGE, rpn.POSITIVE_FRACTION) == (256, 0.5)
    assert (heads.BATCH_SIZE_PER_IMAGE, heads.POSITIVE_FRACTION) == (512, 0.25)
    assert len(cfg.MODEL.ANCHOR_GENERATOR.SIZES[0]) == 5 and len(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS[0]) == 3
    assert (cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM) == (2, 1024)
