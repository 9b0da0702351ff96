"""MimickingRCNN and its ROI heads: whole detectors in training and at inference, every composition, checkpoints."""

import copy
import logging
import math
import pickle

import pytest
import torch
from dcnv2_d2 import add_dcnv2_config
from dcnv2_d2.solver import build_optimizer
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, build_model
from detectron2.utils.events import EventStorage
from torch import nn

from .small_rcnn import (
    ALIGN,
    CASCADE,
    DC5,
    DPOOL,
    FPN,
    FROZEN,
    PLAIN,
    assert_equal_gradients,
    calls_of,
    gradients_of,
    losses_of,
    make_cfg,
    make_image,
    make_model,
    two_images,
    unused_parameters,
)

CLASSIFIER = {"roi_heads.mimicking.cls_score.weight", "roi_heads.mimicking.cls_score.bias"}
COMPOSITIONS = {
    "mdpool-fewer-positives-than-rois": {"MIMIC.NUM_ROIS": 32},
    "mdpool-boxes": {"MASK_ON": False},
    "plain-poolers": ALIGN,
    "dpool": DPOOL,
    "cascade": CASCADE,
    "cascade-plain-boxes": {**CASCADE, **ALIGN, "MASK_ON": False},
    "dc5": DC5,
    "dc5-dpool-boxes": {**DC5, **DPOOL, "MASK_ON": False},
    "fpn": FPN,
    "fpn-plain": {**FPN, **ALIGN},
    "fpn-shared-cascade": {**FPN, **CASCADE, "DCNV2.POOL_SHARED": True},
    "train-on-predicted-boxes": {"ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": True},
    "chunks-again": {"MIMIC.CHUNK": 1, "MIMIC.CHECKPOINTING": True},
}


def test_defaults_are_the_papers():
    cfg = get_cfg()
    add_dcnv2_config(cfg)
    mimic = dict(cfg.MODEL.MIMIC)
    assert mimic.pop("CHUNK") == 0 and mimic.pop("CHECKPOINTING") is False
    assert mimic == {
        "REGIONS": "fg",
        "NUM_ROIS": 32,
        "CROP_SIZE": 224,
        "LOSS_WEIGHT": 0.1,
        "CLS_LOSS_WEIGHT": 0.1,
        "REDUCTION": "sum",
    }


def test_registered():
    assert META_ARCH_REGISTRY.get("MimickingRCNN").__name__ == "MimickingRCNN"
    for name in ("MimickingROIHeads", "MimickingCascadeROIHeads"):
        assert ROI_HEADS_REGISTRY.get(name).__name__ == name


# --- training


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_trains_in_every_composition(name):
    model = make_model(COMPOSITIONS[name])
    batches = {
        "two images": two_images(),
        "one image": [make_image([(20, 10, 90, 70)])],
        "one image without ground truth": [make_image([]), two_images()[1]],
        "no ground truth": [make_image([]), make_image([], size=(80, 72))],
    }
    for batch, inputs in batches.items():
        losses = losses_of(model, inputs)
        assert all(loss.isfinite() for loss in losses.values()), (batch, losses)
        for loss in ("loss_mimic", "loss_mimic_cls"):
            assert (losses[loss] == 0) == (batch == "no ground truth"), batch
        assert unused_parameters(model, losses) == [], batch
    assert len(model.eval()(two_images())) == 2


@pytest.mark.parametrize("regions, chosen", [("fg", {0, 1}), ("bg", {3}), ("both", {0, 1, 3})])
def test_config_keys(regions, chosen):
    options = {"REGIONS": regions, "NUM_ROIS": 6, "LOSS_WEIGHT": 0.2, "CLS_LOSS_WEIGHT": 0.3}
    options = {f"MIMIC.{key}": value for key, value in options.items()}
    model, seen = make_model(options), []
    sample = model.roi_heads.mimicking.sample
    model.roi_heads.mimicking.sample = lambda proposals: seen.append(sample(proposals)) or seen[-1]
    backbone = calls_of(model.backbone)
    losses = losses_of(model, two_images())
    classes = [instances.gt_classes.tolist() for instances in seen[0]]
    assert set(sum(classes, [])) == chosen and max(map(len, classes)) <= 6
    assert backbone == [2, len(sum(classes, []))]

    weights = {"MIMIC.LOSS_WEIGHT": 0.4, "MIMIC.CLS_LOSS_WEIGHT": 0.9, "MIMIC.REDUCTION": "mean"}
    others = losses_of(make_model(options | weights), two_images())
    assert others["loss_mimic_cls"].item() == pytest.approx(3 * losses["loss_mimic_cls"].item())
    if len(classes[0]) == len(classes[1]):
        mean = 2 * losses["loss_mimic"].item() / len(classes[0])
        assert others["loss_mimic"].item() == pytest.approx(mean, rel=1e-5)
    else:
        assert others["loss_mimic"] < 2 * losses["loss_mimic"]


def test_fpn_crops_of_224_land_on_p4():
    model = make_model(FPN | {"MIMIC.CROP_SIZE": 224, "MIMIC.NUM_ROIS": 2})
    calls = [[] for _ in range(4)]
    for pooler, seen in zip(model.roi_heads.box_pooler.level_poolers, calls, strict=True):
        pooler.register_forward_pre_hook(lambda m, args, seen=seen: seen.append((len(args[1]), *args[0].shape[2:])))
    backbone = calls_of(model.backbone)
    losses_of(model, two_images())
    # The head's proposals, the crops, the same RoIs in the images
    assert [len(seen) for seen in calls] == [3] * 4
    assert [seen[1] for seen in calls] == [(0, 56, 56), (0, 28, 28), (backbone[1], 14, 14), (0, 7, 7)]


@pytest.mark.parametrize(
    "changes, chunk, checkpointing",
    [({}, 1, False), ({}, 3, False), ({}, 0, True), ({}, 100, True), (FPN, 3, True), (CASCADE, 3, True)],
)
def test_chunks_and_checkpointing_change_nothing(changes, chunk, checkpointing):
    changes = {**changes, **FROZEN, "MIMIC.REGIONS": "both"}
    whole, parts = (
        make_model(changes),
        make_model(changes | {"MIMIC.CHUNK": chunk, "MIMIC.CHECKPOINTING": checkpointing}),
    )
    calls = calls_of(parts.backbone)
    expected, actual = losses_of(whole, two_images()), losses_of(parts, two_images())
    chunks = calls[1:]
    assert chunks == {0: [8], 1: [1] * 8, 3: [3, 3, 2], 100: [8]}[chunk]
    for name, loss in expected.items():
        assert actual[name].item() == pytest.approx(loss.item(), rel=1e-5), name
    grads = [gradients_of(m, sum(losses.values())) for m, losses in ((parts, actual), (whole, expected))]
    assert_equal_gradients(*grads, 1e-4)
    assert calls[1 + len(chunks) :] == (chunks[::-1] if checkpointing else [])


def test_checkpointing_with_batch_norm_in_training_mode():
    whole, again = make_model(), make_model({"MIMIC.CHECKPOINTING": True})
    expected, actual = losses_of(whole, two_images()), losses_of(again, two_images())
    grads = [gradients_of(m, sum(losses.values())) for m, losses in ((again, actual), (whole, expected))]
    assert_equal_gradients(*grads, 1e-4)
    for (name, value), other in zip(again.named_buffers(), whole.buffers(), strict=True):
        assert torch.equal(value, other), name


def test_the_branch_leaves_no_trace_in_running_statistics():
    # In the box head, too
    norm = {"ROI_BOX_HEAD.NUM_CONV": 1, "ROI_BOX_HEAD.CONV_DIM": 8, "ROI_BOX_HEAD.NORM": "BN"}
    model, plain = make_model({**norm, "MIMIC.CHUNK": 2}), make_model({**norm, **PLAIN})
    assert plain.load_state_dict(model.state_dict(), strict=False).unexpected_keys
    before = {name: value.clone() for name, value in model.named_buffers()}
    losses_of(model, two_images()), losses_of(plain, two_images())
    for (name, value), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(value, other), name
        assert not name.endswith("running_mean") or not torch.equal(value, before[name])
    assert "roi_heads.box_head.conv1.norm.running_mean" in before


def test_after_an_exception_in_the_branch_everything_is_as_before():
    model, twin = make_model(), make_model()
    box_head = model.roi_heads.box_head
    calls = calls_of(box_head)

    def fail(module, args):
        if len(calls) == 2:
            raise RuntimeError("in the second pass")

    handle = box_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the second pass"):
        losses_of(model, two_images())
    handle.remove()
    losses_of(twin, two_images())
    for m in (model, twin):
        assert all(n.momentum == 0.1 for n in m.modules() if isinstance(n, nn.BatchNorm2d))
    for (name, value), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(value, other), name


def test_training_step_under_autocast():
    model = make_model(FROZEN)
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(model, two_images())
    assert all(loss.isfinite() for loss in losses.values()) and losses["loss_mimic"].dtype == torch.float32
    exact = losses_of(model, two_images())
    assert 0 <= losses["loss_mimic"] <= 2 * 0.1 * 4 and losses.keys() == exact.keys()
    grads = gradients_of(model, losses["loss_mimic"] + losses["loss_mimic_cls"])
    assert all(grad is None or grad.isfinite().all() for grad in grads.values())
    assert any(grad is not None and grad.abs().sum() > 0 for grad in grads.values())


def test_step_writes_its_scalars():
    model = make_model()
    for inputs, rois in ((two_images(), True), ([make_image([])], False)):
        torch.manual_seed(0)
        with EventStorage() as storage:
            model(inputs)
        latest = {name: value for name, (value, _) in storage.latest().items()}
        assert ("mimic/cosine_fg" in latest) == rois and -1 <= latest.get("mimic/cosine_fg", 0) <= 1
        assert 0 < latest["mimic/num_rois"] <= 4 if rois else latest["mimic/num_rois"] == 0
        # The layers' own statistics: those of the images stay what they are without mimicking.
        plain = make_model(PLAIN)
        plain.load_state_dict(model.state_dict(), strict=False)
        torch.manual_seed(0)
        with EventStorage() as plain_storage:
            plain(inputs)
        recorded = {name: value for name, (value, _) in plain_storage.latest().items() if name.endswith("_mean")}
        assert {"res5.0.conv1/offset_mean", "box_pooler.0/offset_mean", "box_pooler.0/mask_mean"} <= recorded.keys()
        for name, value in recorded.items():
            assert latest[name] == value, name
            assert "mask_pooler" in name or latest[f"mimic/{name}"] != value, name


# --- inference, checkpoints, copies


@pytest.mark.parametrize("changes", [{}, CASCADE, FPN, ALIGN], ids=["mdpool", "cascade", "fpn", "plain"])
def test_at_inference_it_is_generalized_rcnn(changes):
    model = make_model(changes).eval()
    heads = changes.get("ROI_HEADS.NAME", "").replace("Mimicking", "DCNv2") or PLAIN["ROI_HEADS.NAME"]
    plain = build_model(make_cfg(changes | PLAIN | {"ROI_HEADS.NAME": heads})).eval()
    names, plain_names = (list(dict(m.named_parameters(remove_duplicate=False))) for m in (model, plain))
    assert set(names) - set(plain_names) == CLASSIFIER and [n for n in names if n not in CLASSIFIER] == plain_names
    assert model.state_dict().keys() - CLASSIFIER == plain.state_dict().keys()
    pointers = [p.data_ptr() for p in model.state_dict(keep_vars=True).values() if isinstance(p, nn.Parameter)]
    assert len(pointers) == len(set(pointers)) == len(names)
    plain.load_state_dict(model.state_dict(), strict=False)

    def never(*args):
        raise AssertionError("a part of the branch runs")

    model.roi_heads.crop_features = never
    model.roi_heads.mimicking.register_forward_pre_hook(never)
    model.roi_heads.mimicking.cls_score.register_forward_pre_hook(never)
    calls, plain_calls = ([], [])
    for m, seen in ((model, calls), (plain, plain_calls)):
        for name, part in m.named_modules():
            part.register_forward_hook(lambda part, args, out, seen=seen, name=name: seen.append(name))
    with torch.no_grad():
        outputs, expected = model(two_images()), plain(two_images())
    assert calls == plain_calls and calls
    for actual, wanted in zip(outputs, expected, strict=True):
        actual, wanted = actual["instances"].get_fields(), wanted["instances"].get_fields()
        assert actual.keys() == wanted.keys() and len(actual["scores"]) > 0
        for field, value in wanted.items():
            value, other = (getattr(x, "tensor", x) for x in (value, actual[field]))
            assert torch.equal(value, other), field


@pytest.fixture
def checkpointer_log(caplog):
    """What Detectron2's checkpointer says; its logger may have been told not to pass records on."""
    logger = logging.getLogger("fvcore.common.checkpoint")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger.name):
        yield caplog
    logger.removeHandler(caplog.handler)


def test_checkpoint_loads_into_the_plain_model(tmp_path, checkpointer_log):
    model, plain = make_model(), make_model(PLAIN, seed=1)
    DetectionCheckpointer(model, str(tmp_path)).save("mimicking")
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    checkpointer_log.clear()
    DetectionCheckpointer(plain).load(str(tmp_path / "mimicking.pth"))
    unused = [r.getMessage() for r in checkpointer_log.records if r.levelno >= logging.WARNING]
    unused = list(dict.fromkeys(unused))
    assert len(unused) == 1 and "not used by the model" in unused[0]
    assert "roi_heads.mimicking.cls_score.{bias, weight}" in unused[0].replace("\x1b[35m", "").replace("\x1b[0m", "")
    assert len(unused[0].splitlines()) == 2
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    assert any(not torch.equal(value, state[name]) for name, value in before.items())


def test_plain_checkpoint_starts_mimicking(tmp_path, checkpointer_log):
    model, plain = make_model(), make_model(PLAIN, seed=1)
    DetectionCheckpointer(plain, str(tmp_path)).save("plain")
    checkpointer_log.clear()
    DetectionCheckpointer(model).load(str(tmp_path / "plain.pth"))
    text = "\n".join(r.getMessage() for r in checkpointer_log.records if r.levelno >= logging.WARNING)
    assert "not found in the checkpoint" in text and "mimicking.cls_score" in text and "box_head" not in text
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    def step(model, optimizer, seed):
        losses = losses_of(model, two_images(), seed)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    cfg = make_cfg()
    model, resumed = make_model(), make_model(seed=1)
    optimizer, resumed_optimizer = build_optimizer(cfg, model), build_optimizer(cfg, resumed)
    step(model, optimizer, seed=0)
    DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model", iteration=0)
    extra = DetectionCheckpointer(resumed, str(tmp_path), optimizer=resumed_optimizer).resume_or_load("", resume=True)
    assert extra["iteration"] == 0
    state = {name: value.clone() for name, value in model.state_dict().items()}
    step(model, optimizer, seed=1), step(resumed, resumed_optimizer, seed=1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert not torch.equal(state["roi_heads.mimicking.cls_score.weight"], model.roi_heads.mimicking.cls_score.weight)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_use_their_own_backbone(copied):
    model = make_model()
    twin = copied(model)
    expected = losses_of(model, two_images())["loss_mimic"].item()
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.fill_(math.nan)
    calls, calls_of_twin = calls_of(model.backbone), calls_of(twin.backbone)
    losses = losses_of(twin, two_images())
    assert losses["loss_mimic"].item() == expected
    assert len(calls_of_twin) == 2 and not calls
    assert unused_parameters(twin, losses) == []
    assert list(twin.state_dict()) == list(model.state_dict())


# --- errors


@pytest.mark.parametrize("name", ["MimickingROIHeads", "MimickingCascadeROIHeads"])
def test_the_heads_need_their_meta_architecture_to_train(name):
    model = make_model(CASCADE | {"META_ARCHITECTURE": "GeneralizedRCNN", "ROI_HEADS.NAME": name})
    with pytest.raises(ValueError, match=f"MODEL.META_ARCHITECTURE must be MimickingRCNN .*{name}"):
        losses_of(model, two_images())
    assert len(model.eval()(two_images())) == 2  # but not to infer


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"ROI_HEADS.NAME": "DCNv2ROIHeads"}, ["MODEL.ROI_HEADS.NAME", "MimickingROIHeads", "got DCNv2ROIHeads"]),
        ({"ROI_HEADS.NAME": "StandardROIHeads", **ALIGN}, ["MODEL.ROI_HEADS.NAME", "got StandardROIHeads"]),
        ({"MIMIC.REGIONS": "foreground"}, ["MODEL.MIMIC.REGIONS", "fg, bg, both", "got 'foreground'"]),
        ({"MIMIC.REDUCTION": "max"}, ["MODEL.MIMIC.REDUCTION", "sum, mean", "got 'max'"]),
        ({"MIMIC.NUM_ROIS": -3}, ["MODEL.MIMIC.NUM_ROIS", "at least 1", "got -3"]),
        ({"MIMIC.CROP_SIZE": 0}, ["MODEL.MIMIC.CROP_SIZE", "at least 1", "got 0"]),
        ({"MIMIC.CHUNK": -1}, ["MODEL.MIMIC.CHUNK", "at least 0", "got -1"]),
        ({**FPN, "MIMIC.CROP_SIZE": 80}, ["MODEL.MIMIC.CROP_SIZE", "multiple", "32", "got 80"]),
        ({"RESNETS.NORM": "SyncBN", "MIMIC.CHUNK": 8}, ["MODEL.MIMIC.CHUNK", "must be 0", "got 8"]),
        ({"RESNETS.NORM": "naiveSyncBN", "MIMIC.CHUNK": 8}, ["MODEL.MIMIC.CHUNK", "must be 0", "got 8"]),
    ],
)
def test_errors(changes, words):
    with pytest.raises(ValueError) as error:
        build_model(make_cfg(changes))
    assert all(word in str(error.value) for word in words), error.value


def test_crops_of_any_size_suit_a_backbone_without_divisibility():
    assert losses_of(make_model({"MIMIC.CROP_SIZE": 37}), two_images())["loss_mimic"] > 0


def test_synchronized_norms_suit_one_pass():
    for norm in ("SyncBN", "naiveSyncBN"):
        build_model(make_cfg({"RESNETS.NORM": norm}))
