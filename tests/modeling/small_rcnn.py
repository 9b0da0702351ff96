"""Small detectors with feature mimicking for the tests, their input, and which of their parameters get no gradient."""

from pathlib import Path

import torch
from dcnv2_d2 import add_dcnv2_config
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

CONFIG = Path(__file__).parents[2] / "configs" / "quick_start" / "mask_rcnn_small_mdconv_c3-c5_mdpool_mimic.yaml"
SMALL = {
    "DEVICE": "cpu",
    "RESNETS.STEM_OUT_CHANNELS": 8,
    "RESNETS.RES2_OUT_CHANNELS": 8,
    "RESNETS.DEFORM_ON_PER_STAGE": [False, False, False, True],
    "DCNV2.DC5_CHANNELS": 8,
    "DCNV2.MDPOOL_FC_DIMS": [8, 8],
    "ROI_BOX_HEAD.FC_DIM": 16,
    "ROI_BOX_HEAD.POOLER_RESOLUTION": 3,
    "ROI_MASK_HEAD.POOLER_RESOLUTION": 6,
    "ROI_MASK_HEAD.CONV_DIM": 8,
    "RPN.CONV_DIMS": [8],
    "MIMIC.CROP_SIZE": 32,
}
PLAIN = {"META_ARCHITECTURE": "GeneralizedRCNN", "ROI_HEADS.NAME": "DCNv2ROIHeads"}
ALIGN = {"ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2", "ROI_MASK_HEAD.POOLER_TYPE": "ROIAlignV2"}
DPOOL = {"ROI_BOX_HEAD.POOLER_TYPE": "DeformRoIPool", "ROI_MASK_HEAD.POOLER_TYPE": "DeformRoIPool"}
CASCADE = {"ROI_HEADS.NAME": "MimickingCascadeROIHeads", "ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}
FROZEN = {"RESNETS.NORM": "FrozenBN"}
RESNET = {
    "RESNETS.DEPTH": 50,
    "RESNETS.STEM_OUT_CHANNELS": 8,
    "RESNETS.WIDTH_PER_GROUP": 4,
    "RESNETS.STRIDE_IN_1X1": False,
}
# The paper's own: conv5 at stride 16.
DC5 = {"BACKBONE.NAME": "build_dcnv2_resnet_dc5_backbone", "RESNETS.RES5_DILATION": 2, **RESNET}
FPN = {
    "BACKBONE.NAME": "build_dcnv2_resnet_fpn_backbone",
    "RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "FPN.OUT_CHANNELS": 8,
    "ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [128], [256]],
    "RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MIMIC.CROP_SIZE": 64,
    **RESNET,
}


def make_cfg(changes=()):
    cfg = get_cfg()
    add_dcnv2_config(cfg)
    cfg.merge_from_file(str(CONFIG))
    cfg.merge_from_list([x for key, value in {**SMALL, **dict(changes)}.items() for x in (f"MODEL.{key}", value)])
    cfg.freeze()
    return cfg


def make_model(changes=(), seed=0):
    """A model none of whose parameters is 0, so that each of them has a part in the losses."""
    torch.manual_seed(seed)
    model = build_model(make_cfg(changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def make_image(boxes, size=(96, 128), classes=None, seed=0):
    """An image of noise and its ground truth: any number of (x1, y1, x2, y2), with masks as large as the boxes."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    target = Instances(size, gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
    target.gt_classes = torch.arange(len(boxes)) % 3 if classes is None else torch.tensor(classes)
    noise = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return {"image": noise, "instances": target, "height": size[0], "width": size[1]}


def two_images():
    """Of unequal sizes, so that one is padded."""
    return [
        make_image([(20.5, 10.25, 90, 70), (5, 40, 40, 90)]),
        make_image([(10, 8, 60.75, 60)], size=(80, 72), seed=1),
    ]


def losses_of(model, inputs, seed=0):
    """Losses of a step; the seed decides on the proposals and on Omega."""
    torch.manual_seed(seed)
    with EventStorage():
        return model(inputs)


def gradients_of(model, loss):
    """Gradients by name, None for a parameter that has none; the model keeps nothing of them."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True), strict=True))


def unused_parameters(model, losses):
    """As detectron2.utils.analysis.find_unused_parameters, the module of which cannot be imported everywhere."""
    return [name for name, grad in gradients_of(model, sum(losses.values())).items() if grad is None]


def calls_of(module):
    """A list to which every call of a module adds the batch size of its input."""
    calls = []
    module.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return calls


def assert_equal_gradients(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert (actual[name] is None) == (grad is None), name
        if grad is not None:
            assert (actual[name] - grad).abs().max() <= tolerance * max(grad.abs().max(), 1e-6), name
