"""DeepLab's head: its logits and loss from their definition, at image sizes that are no multiples of the stride."""

import pytest
import torch
import torch.nn.functional as F
from dcnv2_d2 import add_dcnv2_config
from dcnv2_d2.modeling.deeplab import DeepLabHead
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model

SHAPES = {"res4": ShapeSpec(channels=5, stride=16), "res5": ShapeSpec(channels=6, stride=16)}


def make_cfg(**changes):
    cfg = get_cfg()
    add_dcnv2_config(cfg)
    head = {
        "NAME": "DeepLabHead",
        "IN_FEATURES": ["res5"],
        "COMMON_STRIDE": 16,
        "CONVS_DIM": 7,
        "NUM_CLASSES": 4,
        **changes,
    }
    cfg.merge_from_list([x for key, value in head.items() for x in (f"MODEL.SEM_SEG_HEAD.{key}", value)])
    return cfg


def make_head(**changes):
    head = DeepLabHead(make_cfg(**changes), SHAPES)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head


def upsampled(logits, stride=16):
    """Bilinear, from the centres of cells: pixel i lies at (i + 0.5) / stride - 0.5, clamped to the map."""
    for dim in (2, 3):
        size = logits.shape[dim]
        at = ((torch.arange(size * stride) + 0.5) / stride - 0.5).clamp(0, size - 1)
        low = at.floor().long().clamp(max=size - 2)
        weight = (at - low).view([-1 if d == dim else 1 for d in range(4)])
        logits = logits.index_select(dim, low) * (1 - weight) + logits.index_select(dim, low + 1) * weight
    return logits


def test_logits_and_loss():
    head = make_head(LOSS_WEIGHT=0.5)
    x = torch.randn(2, 6, 3, 4)
    hidden = torch.einsum("oc,nchw->nohw", head.fc6.weight[:, :, 0, 0], x) + head.fc6.bias[:, None, None]
    small = torch.einsum("oc,nchw->nohw", head.score.weight[:, :, 0, 0], hidden.clamp(min=0))
    expected = upsampled(small + head.score.bias[:, None, None])
    logits, losses = head.eval()({"res5": x})
    assert losses == {} and logits.shape == (2, 4, 48, 64)
    assert torch.allclose(logits, expected, atol=1e-4)
    targets = torch.randint(0, 4, (2, 41, 63))
    targets[:, :5] = 255
    nothing, losses = head.train()({"res5": x}, targets)
    assert nothing is None and losses.keys() == {"loss_sem_seg"}
    log_p = expected[:, :, :41, :63].log_softmax(1)
    own = [log_p[n, targets[n, i, j], i, j] for n in range(2) for i in range(5, 41) for j in range(63)]
    assert losses["loss_sem_seg"].item() == pytest.approx(-0.5 * torch.stack(own).mean().item(), rel=1e-4)


def test_no_labelled_pixel_is_no_loss():
    head = make_head()
    _, losses = head({"res5": torch.randn(1, 6, 2, 2)}, torch.full((1, 20, 30), 255))
    losses["loss_sem_seg"].backward()
    assert losses["loss_sem_seg"].item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_segmentor_takes_images_of_any_size():
    cfg = make_cfg()
    options = {
        "DEVICE": "cpu",
        "META_ARCHITECTURE": "SemanticSegmentor",
        "BACKBONE.NAME": "build_dcnv2_resnet_backbone",
        "RESNETS.STEM_OUT_CHANNELS": 8,
        "RESNETS.RES2_OUT_CHANNELS": 16,
        "RESNETS.WIDTH_PER_GROUP": 4,
        "RESNETS.RES5_DILATION": 2,
        "RESNETS.OUT_FEATURES": ["res5"],
        "DCNV2.DEFORM_LAST": 3,
        "DCNV2.OFFSET_DILATION": False,
    }
    cfg.merge_from_list([x for key, value in options.items() for x in (f"MODEL.{key}", value)])
    model = build_model(cfg)
    inputs = [
        {"image": torch.rand(3, h, w) * 255, "sem_seg": torch.randint(0, 4, (h, w)), "height": 2 * h, "width": 2 * w}
        for h, w in ((91, 125), (70, 131))
    ]
    losses = model(inputs)
    losses["loss_sem_seg"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        outputs = model.eval()(inputs)
    assert [tuple(o["sem_seg"].shape) for o in outputs] == [(4, 182, 250), (4, 140, 262)]
    features = model.backbone(F.pad((inputs[1]["image"] - model.pixel_mean) / model.pixel_std, (0, 0, 0, 21))[None])
    logits = model.sem_seg_head(features)[0][:, :, :70, :131]
    assert torch.allclose(outputs[1]["sem_seg"], F.interpolate(logits, (140, 262), mode="bilinear")[0], atol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"IN_FEATURES": ["res4", "res5"]}, r"IN_FEATURES must be one map .* got \['res4', 'res5'\]"),
        ({"COMMON_STRIDE": 4}, r"COMMON_STRIDE must be the stride of res5 \(16\) .* got 4"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        make_head(**changes)
