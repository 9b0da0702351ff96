"""DCNv2ROIHeads and DCNv2CascadeROIHeads beside Detectron2's own, on given features and proposals."""

import copy
import math

import pytest
import torch
from dcnv2_d2 import add_dcnv2_config
from dcnv2_d2.layers import DeformRoIPool, ModulatedDeformRoIPool
from dcnv2_d2.modeling.backbone import build_small_resnet_dc5_backbone
from dcnv2_d2.solver import build_optimizer
from detectron2.config import get_cfg
from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY, build_backbone
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads, build_roi_heads
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from ..reference import assert_near

V1, V2 = "DeformRoIPool", "ModulatedDeformRoIPool"
STANDARD, CASCADE = "DCNv2ROIHeads", "DCNv2CascadeROIHeads"
HEIGHT, WIDTH = 192, 256
FPN = {f"p{i}": 2**i for i in range(2, 6)}


def make_cfg(heads=STANDARD, box=V2, mask=None, **changes):
    """A small config; `mask` is the mask head's POOLER_TYPE, None for no such head."""
    cfg = get_cfg()
    add_dcnv2_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.MASK_ON = mask is not None
    cfg.MODEL.DCNV2.MDPOOL_FC_DIMS = [8, 7]
    cfg.MODEL.ROI_HEADS.merge_from_list(["NAME", heads, "IN_FEATURES", list(FPN), "NUM_CLASSES", 3])
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 24
    fc = ["NAME", "FastRCNNConvFCHead", "NUM_FC", 1, "FC_DIM", 16, "CLS_AGNOSTIC_BBOX_REG", "Cascade" in heads]
    cfg.MODEL.ROI_BOX_HEAD.merge_from_list(["POOLER_TYPE", box, "POOLER_RESOLUTION", 7, *fc])
    convolutions = ["NAME", "MaskRCNNConvUpsampleHead", "NUM_CONV", 1, "CONV_DIM", 6]
    cfg.MODEL.ROI_MASK_HEAD.merge_from_list(["POOLER_TYPE", mask or V2, "POOLER_RESOLUTION", 14, *convolutions])
    cfg.merge_from_list([item for key, value in changes.items() for item in (f"MODEL.{key}", value)])
    cfg.freeze()
    return cfg


def shapes(cfg, channels=4):
    return {name: ShapeSpec(channels=channels, stride=FPN[name]) for name in cfg.MODEL.ROI_HEADS.IN_FEATURES}


def build(*args, channels=4, **changes):
    cfg = make_cfg(*args, **changes)
    return build_roi_heads(cfg, shapes(cfg, channels))


def bend(heads):
    """The branches predict something, of each box's own, and no ReLU of theirs is dead."""
    for name, p in heads.box_pooler.named_parameters():
        if name.endswith("bias"):
            nn.init.uniform_(p, 0, 0.5)
        else:
            nn.init.normal_(p, std=1 / math.sqrt(p.shape[1]))
    return heads


def features(n=2, channels=4):
    return {name: torch.randn(n, channels, HEIGHT // stride, WIDTH // stride) for name, stride in FPN.items()}


def proposals(counts=(14, 0)):
    """For each image so many boxes, of 10 to 220 pixels."""
    found = []
    for count in counts:
        size = 10 * 22 ** torch.linspace(0, 1, count)[:, None] * (0.8 + 0.4 * torch.rand(count, 2))
        center = torch.rand(count, 2) * torch.tensor([WIDTH, HEIGHT])
        boxes = Boxes(torch.cat([center - size / 2, center + size / 2], 1))
        boxes.clip((HEIGHT, WIDTH))
        found.append(Instances((HEIGHT, WIDTH), proposal_boxes=boxes, objectness_logits=torch.randn(count)))
    return found


def targets(counts=(2, 1)):
    corners = torch.tensor([[20.0, 30, 60, 80], [50, 10, 250, 180]])
    found = []
    for count in counts:
        masks = torch.rand(count, HEIGHT, WIDTH) > 0.3
        labels = {"gt_boxes": Boxes(corners[:count]), "gt_classes": torch.tensor([2, 0])[:count]}
        found.append(Instances((HEIGHT, WIDTH), **labels, gt_masks=BitMasks(masks)))
    return found


def train(heads, x, boxes=None, truth=None):
    """The losses; every call has the same proposals and chooses the same ones for the heads."""
    torch.manual_seed(5)
    return heads.train()(None, x, copy.deepcopy(boxes or proposals()), truth or targets())[1]


@torch.no_grad()
def infer(heads, x, boxes=None):
    torch.manual_seed(6)
    return heads.eval()(None, x, boxes or proposals((9, 5)))[0]


@pytest.fixture(autouse=True)
def storage():
    with EventStorage() as storage:
        yield storage


def assert_equal_results(actual, expected, tolerance=0):
    for a, e in zip(actual, expected, strict=True):
        assert set(a.get_fields()) == set(e.get_fields()) and len(a) == len(e) > 0
        for name, value in e.get_fields().items():
            got, wanted = (getattr(v, "tensor", v) for v in (a.get(name), value))
            assert_near(got, wanted, tolerance, name)


def assert_equal_losses(actual, expected, tolerance=0):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_near(actual[name], expected[name], tolerance, name)


def branches(heads):
    return {name for name in heads.state_dict() if ".branch." in name}


def test_registered():
    assert issubclass(ROI_HEADS_REGISTRY.get(STANDARD), StandardROIHeads)
    assert issubclass(ROI_HEADS_REGISTRY.get(CASCADE), CascadeROIHeads)


@pytest.mark.parametrize("kind", ["ROIAlign", "ROIAlignV2", "ROIPool"])
@pytest.mark.parametrize("heads", [STANDARD, CASCADE])
def test_plain_types_are_detectron2s(heads, kind):
    x, built = features(), []
    for name in (heads, heads.replace("DCNv2ROI", "StandardROI").replace("DCNv2", "")):
        torch.manual_seed(3)
        built.append(build(name, kind, kind, **{"ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 1}))
    ours, theirs = built
    assert type(theirs) in (StandardROIHeads, CascadeROIHeads)
    assert str(ours.box_pooler) == str(theirs.box_pooler) and str(ours.mask_pooler) == str(theirs.mask_pooler)
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    assert_equal_losses(train(ours, x), train(theirs, x))
    assert_equal_results(infer(ours, x), infer(theirs, x))


@pytest.mark.parametrize("kind, per_branch", [(V2, 14_046_355), (V1, 1_229_410)])
@pytest.mark.parametrize("mask", [None, "ROIAlignV2", "same"])
@pytest.mark.parametrize("heads, changes, count", [
    (STANDARD, {}, 4), (STANDARD, {"DCNV2.POOL_SHARED": True}, 1), (CASCADE, {"DCNV2.POOL_SHARED": True}, 1),
    (CASCADE, {"ROI_HEADS.IN_FEATURES": ["p4"]}, 1),
])  # fmt: skip
def test_parameters_are_those_of_the_box_pooler_s_branches(heads, changes, count, mask, kind, per_branch):
    def parameters(box, mask):
        with torch.device("meta"):
            built = build(heads, box, mask, channels=256, **changes, **{"DCNV2.MDPOOL_FC_DIMS": [1024, 1024]})
        return sum(p.numel() for p in built.parameters())

    added = parameters(kind, kind if mask == "same" else mask) - parameters("ROIAlignV2", mask and "ROIAlignV2")
    assert added == count * per_branch


@pytest.mark.parametrize("kind, cls", [(V1, DeformRoIPool), (V2, ModulatedDeformRoIPool)])
def test_config_keys(kind, cls):
    changes = {"DCNV2.POOL_GAMMA": 0.3, "DCNV2.MASK_SCALE": 1.5, "DCNV2.DPOOL_FC_DIMS": [3]}
    ratios = {"ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2, "ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": 3}
    heads = build(STANDARD, kind, kind, **changes, **ratios)
    for name, size, ratio in (("box_pooler", 7, 2), ("mask_pooler", 14, 3)):
        for i, layer in enumerate(getattr(heads, name).level_poolers):
            assert type(layer) is cls and layer.name == f"{name}.{i}" and layer.gamma == 0.3
            assert layer.output_size == (size, size) and layer.sampling_ratio == ratio
            assert layer.spatial_scale == 1 / 2 ** (i + 2) and getattr(layer, "mask_scale", 1.5) == 1.5
            assert layer.branch_owner is heads.box_pooler.level_poolers[i]
    widths = [m.out_features for m in heads.box_pooler.level_poolers[3].branch if isinstance(m, nn.Linear)]
    assert widths == ([3, 98] if kind == V1 else [8, 7, 147])


@pytest.mark.parametrize("kind", [V1, V2])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("heads", [STANDARD, CASCADE])
def test_state_dict(heads, shared, kind):
    ours = build(heads, kind, kind, **{"DCNV2.POOL_SHARED": shared})
    theirs = build(heads, "ROIAlignV2", "ROIAlignV2")
    parts = [f"{i}.{p}" for i in ((0,) if kind == V1 else (0, 2, 4)) for p in ("weight", "bias")]
    added = {f"box_pooler.level_poolers.{i}.branch.{part}" for i in range(1 if shared else 4) for part in parts}
    assert ours.state_dict().keys() - theirs.state_dict().keys() == added == branches(ours)
    assert theirs.state_dict().keys() < ours.state_dict().keys()


@pytest.mark.parametrize("kind", [V1, V2])
@pytest.mark.parametrize("heads", [STANDARD, CASCADE])
def test_fresh_heads_are_the_regular_heads(heads, kind):
    theirs = build(heads, "ROIAlignV2", "ROIAlignV2")
    for name, p in theirs.named_parameters():
        if name.endswith("cls_score.weight"):
            nn.init.normal_(p)  # scores so different that rounding does not reorder them
    ours, x = build(heads, kind, kind, **{"DCNV2.MASK_SCALE": 2.0}), features()
    result = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert set(result.missing_keys) == branches(ours) and not result.unexpected_keys
    assert_equal_losses(train(ours, x), train(theirs, x), 1e-4)
    assert_equal_results(infer(ours, x), infer(theirs, x), 1e-4)


@pytest.mark.parametrize(
    "box, mask, shared", [(V1, V1, True), (V2, V2, False), (V2, None, True), (V1, "ROIPool", False)]
)
@pytest.mark.parametrize("heads", [STANDARD, CASCADE])
def test_train_and_infer(heads, box, mask, shared, storage):
    ours = bend(build(heads, box, mask, **{"DCNV2.POOL_SHARED": shared}))
    calls, x = [], {name: level.requires_grad_() for name, level in features().items()}
    ours.box_pooler.register_forward_hook(lambda *_: calls.append("box"))
    if mask:
        ours.mask_pooler.register_forward_hook(lambda *_: calls.append("mask"))
    losses = train(ours, x)
    # One pooler, and with it one set of branches, for the three stages of a cascade.
    assert calls == ["box"] * (3 if heads == CASCADE else 1) + ["mask"] * bool(mask)
    assert ("loss_mask" in losses) == bool(mask) and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    unused = {name for name, p in ours.named_parameters() if p.grad is None}
    assert not unused and all(level.grad.isfinite().all() for level in x.values())
    for i in (0,) if shared else (0, 1):  # the boxes are too small for p4 and p5
        assert all(p.grad.any() for p in ours.box_pooler.level_poolers[i].parameters())
    keys = ["offset_mean", "offset_max"] + ["mask_mean"] * (box == V2)
    poolers = ["box_pooler"] + ["mask_pooler"] * (mask in (V1, V2))
    written = {name for name in storage.latest() if "_pooler." in name}
    assert written == {f"{name}.{i}/{key}" for name in poolers for i in (0, 1) for key in keys}

    calls.clear()
    before = dict(storage.latest())
    for instances in infer(ours, x):
        assert instances.has("pred_boxes") and instances.has("pred_masks") == bool(mask)
    assert calls == ["box"] * (3 if heads == CASCADE else 1) + ["mask"] * bool(mask)
    assert storage.latest() == before  # no statistics of inference


@pytest.mark.parametrize("heads", [STANDARD, CASCADE])
@pytest.mark.parametrize("box, mask", [(V1, V1), (V2, V2)])
def test_no_proposals_at_all(box, mask, heads):
    ours, x = bend(build(heads, box, mask)), features()
    losses = train(ours, x, proposals((0, 0)), targets((0, 0)))
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    # Distributed training waits for every parameter's gradient.
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())
    assert [len(instances) for instances in infer(ours, x, proposals((0, 0)))] == [0, 0]


def test_the_mask_loss_alone_trains_the_box_pooler_s_branches():
    ours = bend(build(STANDARD, V2, V2))
    train(ours, features())["loss_mask"].backward()
    assert any(p.grad is not None and p.grad.any() for p in ours.box_pooler.parameters())
    assert all(p.grad is None for p in ours.box_head.parameters())


def test_a_copy_of_the_heads_keeps_its_own_branches():
    ours, x = bend(build(STANDARD, V2, V2)), features()
    twin, expected = copy.deepcopy(ours), infer(ours, x)
    own = {id(layer) for layer in twin.box_pooler.level_poolers}
    assert all(id(layer.branch_owner) in own for layer in twin.mask_pooler.level_poolers)
    bend(twin)
    assert_equal_results(infer(ours, x), expected)
    twin.load_state_dict(ours.state_dict())
    assert_equal_results(infer(twin, x), expected)


@pytest.mark.parametrize("heads", [STANDARD, CASCADE])
def test_autocast(heads):
    ours, x = bend(build(heads, V2, V2)), features()
    seen = []
    for pooler in (ours.box_pooler, ours.mask_pooler):
        pooler.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(ours, {name: level.bfloat16() for name, level in x.items()})
        assert set(seen) == {torch.bfloat16}
        train(ours, x)
    assert set(seen) == {torch.bfloat16, torch.float32}  # the maps'
    sum(losses.values()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("heads", [STANDARD, CASCADE])
@pytest.mark.parametrize("kind", [V1, V2])
def test_keypoint_heads_keep_detectron2s_pooler(kind, heads):
    changes = {"KEYPOINT_ON": True, "ROI_KEYPOINT_HEAD.CONV_DIMS": [4]}
    with pytest.raises(ValueError) as error:
        build(heads, kind, **changes, **{"ROI_KEYPOINT_HEAD.POOLER_TYPE": kind})
    assert str(error.value) == f"MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE must be one of Detectron2's, got {kind}"
    with pytest.raises(ValueError, match="MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE"):  # a plain box pooler lends nothing
        build(heads, "ROIAlignV2", **changes, **{"ROI_KEYPOINT_HEAD.POOLER_TYPE": kind})
    built = build(heads, kind, **changes)
    assert {type(layer) for layer in built.keypoint_pooler.level_poolers} == {ROIAlign}
    # Without a keypoint head its keys mean nothing.
    build(heads, kind, **{"ROI_KEYPOINT_HEAD.POOLER_TYPE": kind})


@pytest.mark.parametrize("heads", [STANDARD, CASCADE])
@pytest.mark.parametrize("box, mask", [("ROIAlignV2", V2), ("ROIPool", V1), (V1, V2), (V2, V1)])
def test_a_mask_pooler_needs_a_box_pooler_of_its_type(box, mask, heads):
    with pytest.raises(ValueError) as error:
        build(heads, box, mask)
    assert str(error.value) == (
        "MODEL.ROI_MASK_HEAD.POOLER_TYPE must be a plain type or, as it uses the branch of the box head's pooler, "
        f"equal MODEL.ROI_BOX_HEAD.POOLER_TYPE ({box}), got {mask}"
    )
    build(heads, box, None, **{"ROI_MASK_HEAD.POOLER_TYPE": mask})  # without a mask head its keys mean nothing


@pytest.mark.parametrize("key", ["ROI_BOX_HEAD", "ROI_MASK_HEAD"])
def test_unknown_pooler_type(key):
    with pytest.raises(ValueError, match="DeformedRoIPool"):
        build(STANDARD, V2, V2, **{f"{key}.POOLER_TYPE": "DeformedRoIPool"})


def test_mask_scale_error():
    with pytest.raises(ValueError, match="mask_scale must be above 0, got 0.0"):
        build(STANDARD, V2, **{"DCNV2.MASK_SCALE": 0.0})


def test_config_is_not_modified():
    cfg = make_cfg(STANDARD, V2, V2)
    before = cfg.dump()
    build_roi_heads(cfg, shapes(cfg))
    assert cfg.dump() == before and cfg.is_frozen()


@pytest.mark.parametrize("kind", [V1, V2])
@pytest.mark.parametrize("factor", [0.1, 0.0])
def test_branches_learn_at_the_base_rate(factor, kind):
    cfg = make_cfg(STANDARD, kind, kind, **{"DCNV2.OFFSET_LR_FACTOR": factor})
    heads = build_roi_heads(cfg, shapes(cfg))
    rates = {id(p): group["lr"] for group in build_optimizer(cfg, heads).param_groups for p in group["params"]}
    assert len(rates) == len(list(heads.parameters())) and set(rates.values()) == {cfg.SOLVER.BASE_LR}
    assert {id(p) for p in heads.box_pooler.parameters()} < rates.keys()


class Detector(nn.Module):
    """A backbone and ROI heads, without an RPN, whose choice of boxes could turn on rounding."""

    def __init__(self, cfg, backbone):
        super().__init__()
        self.backbone = backbone
        self.roi_heads = build_roi_heads(cfg, backbone.output_shape())

    def losses(self, image):
        return train(self.roi_heads, self.backbone(image))


@pytest.mark.parametrize("kind, heads", [(V1, CASCADE), (V2, STANDARD)])
def test_without_learning_offsets_a_deformable_model_is_the_regular_model(kind, heads):
    """The paper's degeneration statement, for a backbone with a pooler, before and while training."""
    changes = {
        "BACKBONE.NAME": "build_dcnv2_small_resnet_dc5_backbone", "BACKBONE.FREEZE_AT": 0,
        "RESNETS.DEFORM_ON_PER_STAGE": [False, True, False, True], "RESNETS.DEFORM_MODULATED": kind == V2,
        "RESNETS.STEM_OUT_CHANNELS": 4, "RESNETS.RES2_OUT_CHANNELS": 4, "RESNETS.NORM": "BN",
        "RESNETS.OUT_FEATURES": ["res5"], "ROI_HEADS.IN_FEATURES": ["res5"],
        "DCNV2.DC5_CHANNELS": 6, "DCNV2.MASK_SCALE": 2.0, "DCNV2.OFFSET_LR_FACTOR": 0.0,
    }  # fmt: skip
    cfg = make_cfg(heads, kind, kind, **changes)
    regular_cfg = make_cfg(heads, "ROIAlignV2", "ROIAlignV2", **changes)
    ours = Detector(cfg, build_backbone(cfg)).double()
    regular = Detector(regular_cfg, build_small_resnet_dc5_backbone(regular_cfg, ShapeSpec(channels=3))).double()
    result = ours.load_state_dict(regular.state_dict(), strict=False)
    assert result.missing_keys and all("conv_offset" in n or ".branch." in n for n in result.missing_keys)
    assert not result.unexpected_keys
    for p in ours.roi_heads.box_pooler.parameters():
        p.requires_grad_(False)  # OFFSET_LR_FACTOR is of the convolutions only
    image = torch.randn(2, 3, 64, 96).double()
    optimizers = {model: build_optimizer(cfg, model) for model in (ours, regular)}
    first = None
    for _ in range(2):
        losses, expected = (model.losses(image) for model in (ours, regular))
        assert_equal_losses(losses, expected, 1e-9)
        first = first or expected
        for (model, optimizer), total in zip(optimizers.items(), (losses, expected), strict=True):
            model.zero_grad()
            sum(total.values()).backward()
            optimizer.step()
    assert not any(torch.isclose(expected[name], first[name], 1e-7) for name in first)  # it has learned
    state = ours.state_dict()
    for name, value in regular.state_dict().items():
        assert_near(state[name], value, 1e-9, name)
    assert not any(state[name].any() for name in state if "conv_offset" in name)
    for model in (ours, regular):
        model.eval()
    x, boxes = ours.backbone(image), [p.proposal_boxes for p in proposals((6, 4))]
    assert_near(x["res5"], regular.backbone(image)["res5"], 1e-9)
    for pooler in ("box_pooler", "mask_pooler"):
        actual, expected = (getattr(m.roi_heads, pooler)([x["res5"]], boxes) for m in (ours, regular))
        assert_near(actual, expected, 1e-9, pooler)
