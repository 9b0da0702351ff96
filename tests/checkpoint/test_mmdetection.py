"""Our own models under mmdetection's names, of every generation, come back with nothing unmatched and equal outputs."""

import copy
import itertools
import re

import pytest
import torch
from dcnv2_d2.checkpoint import from_mmdetection
from dcnv2_d2.ops import deform_roi_pool
from detectron2.modeling import build_model
from torch import nn

from ..models import FASTER, MASK, detect, make_config, make_model
from ..reference import assert_near

NAMES = [  # ours, mmdetection's
    ("backbone.bottom_up.stem.conv1.norm.", "backbone.bn1."),
    ("backbone.bottom_up.stem.conv1.", "backbone.conv1."),
    ("backbone.bottom_up.res2.", "backbone.layer1."),
    ("backbone.bottom_up.res3.", "backbone.layer2."),
    ("backbone.bottom_up.res4.", "backbone.layer3."),
    ("backbone.bottom_up.res5.", "backbone.layer4."),
    (".conv1.norm.", ".bn1."),
    (".conv2.norm.", ".bn2."),
    (".conv3.norm.", ".bn3."),
    (".shortcut.norm.", ".downsample.1."),
    (".shortcut.", ".downsample.0."),
    *((f"backbone.fpn_lateral{i + 2}.", f"neck.lateral_convs.{i}.conv.") for i in range(4)),
    *((f"backbone.fpn_output{i + 2}.", f"neck.fpn_convs.{i}.conv.") for i in range(4)),
    ("proposal_generator.rpn_head.conv.", "rpn_head.rpn_conv."),
    ("proposal_generator.rpn_head.objectness_logits.", "rpn_head.rpn_cls."),
    ("proposal_generator.rpn_head.anchor_deltas.", "rpn_head.rpn_reg."),
    ("roi_heads.box_head.fc1.", "roi_head.bbox_head.shared_fcs.0."),
    ("roi_heads.box_head.fc2.", "roi_head.bbox_head.shared_fcs.1."),
    ("roi_heads.box_predictor.cls_score.", "roi_head.bbox_head.fc_cls."),
    ("roi_heads.box_predictor.bbox_pred.", "roi_head.bbox_head.fc_reg."),
    *((f"roi_heads.box_head.{s}.fc1.", f"roi_head.bbox_head.{s}.shared_fcs.0.") for s in range(3)),
    *((f"roi_heads.box_head.{s}.fc2.", f"roi_head.bbox_head.{s}.shared_fcs.1.") for s in range(3)),
    *((f"roi_heads.box_predictor.{s}.cls_score.", f"roi_head.bbox_head.{s}.fc_cls.") for s in range(3)),
    *((f"roi_heads.box_predictor.{s}.bbox_pred.", f"roi_head.bbox_head.{s}.fc_reg.") for s in range(3)),
    *((f"roi_heads.mask_head.mask_fcn{i + 1}.", f"roi_head.mask_head.convs.{i}.conv.") for i in range(4)),
    ("roi_heads.mask_head.deconv.", "roi_head.mask_head.upsample."),
    ("roi_heads.mask_head.predictor.", "roi_head.mask_head.conv_logits."),
]
SPELLINGS = {"3.x": ".conv_offset.", "2.x": ".conv_offset_mask.", "1.x": "_offset."}


def to_mmdetection(model, generation):
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in NAMES:
            name = name.replace(ours, theirs)
        assert not re.search("bottom_up|fpn_lateral|fpn_output|proposal|roi_heads", name)
        name = name.replace(".conv_offset.", SPELLINGS[generation])
        if generation == "1.x":
            name = name.removeprefix("roi_head.")
            if "fc_cls" in name:
                tensor = torch.cat([tensor[-1:], tensor[:-1]])
            elif "fc_reg" in name and len(tensor) > 4:
                tensor = torch.cat([torch.full_like(tensor[:4], 7.0), tensor])
            elif "conv_logits" in name:
                tensor = torch.cat([torch.full_like(tensor[:1], 7.0), tensor])
        state[name] = tensor.clone()
        if name.endswith("running_var"):
            state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(5)
    return state


SMALL_HEADS = [
    *("MODEL.ROI_HEADS.NUM_CLASSES", "5", "MODEL.ROI_BOX_HEAD.FC_DIM", "64"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", "2", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32"),
]
CASES = {
    "3.x": (MASK, []),
    "2.x": (FASTER, ["MODEL.RESNETS.DEFORM_NUM_GROUPS", "4"]),
    "1.x": (MASK, ["MODEL.RESNETS.DEFORM_NUM_GROUPS", "2"]),
}


def run_mmdetections_way(generation):
    """What the converted config must say by itself, given to the original model."""
    pooler = ["ROIAlign", "2"] if generation == "1.x" else ["ROIAlignV2", "0"]
    options = ["INPUT.FORMAT", "RGB", "MODEL.RESNETS.STRIDE_IN_1X1", "False"]
    options += ["MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]", "MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]"]
    for head in ("BOX", "MASK"):
        options += [f"MODEL.ROI_{head}_HEAD.POOLER_TYPE", pooler[0]]
        options += [f"MODEL.ROI_{head}_HEAD.POOLER_SAMPLING_RATIO", pooler[1]]
    return options


@pytest.fixture(scope="module")
def image():
    pixels = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 255
    return torch.nn.functional.interpolate(pixels, size=(64, 96), mode="bicubic")[0]


def load(converted):
    model = build_model(make_config(converted.config)).eval()
    model.load_state_dict(converted.model, strict=True)
    return model


@pytest.mark.parametrize("generation", CASES)
def test_there_and_back(generation, image):
    config, options = CASES[generation]
    model = make_model(config, *SMALL_HEADS, *options, *run_mmdetections_way(generation))
    converted = from_mmdetection(to_mmdetection(model, generation))
    assert converted.unmatched == []
    assert ("whole pixels" in " ".join(converted.notes)) == (generation == "1.x")
    assert converted.config["INPUT"] == {"FORMAT": "RGB"}
    expected, actual = detect(model, image), detect(load(converted), image)
    assert len(expected) == 100
    for field, value in expected.get_fields().items():
        assert torch.equal(getattr(value, "tensor", value), getattr(actual.get(field), "tensor", actual.get(field)))


@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("depth, groups, width", [(101, 1, 64), (50, 32, 4)])
def test_backbones(depth, groups, width, modulated):
    """ResNet-101 and ResNeXt-50, v1 and v2, conv5 only: the config by shapes and names alone."""
    options = ["MODEL.RESNETS.DEPTH", str(depth), "MODEL.RESNETS.NUM_GROUPS", str(groups)]
    options += ["MODEL.RESNETS.WIDTH_PER_GROUP", str(width), "MODEL.RESNETS.DEFORM_MODULATED", str(modulated)]
    options += [
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE",
        "[False, False, False, True]",
        "MODEL.RESNETS.STRIDE_IN_1X1",
        "False",
    ]
    cfg = make_config(FASTER, *SMALL_HEADS, *options)
    model = build_model(cfg)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    converted = from_mmdetection(to_mmdetection(model, "3.x"))
    assert {name: tensor.shape for name, tensor in converted.model.items()} == shapes
    assert make_config(converted.config).MODEL.RESNETS == cfg.MODEL.RESNETS


@pytest.mark.parametrize("generation", ["3.x", "1.x"])
def test_cascade(generation, image):
    options = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]
    model = make_model(MASK, *SMALL_HEADS, *options, *run_mmdetections_way(generation))
    source = {n: t for n, t in to_mmdetection(model, generation).items() if "mask_head." not in n}
    heads = [model.roi_heads.mask_head, *(copy.deepcopy(model.roi_heads.mask_head) for _ in range(2))]
    for stage, head in enumerate(heads):
        nn.init.normal_(head.predictor.weight, 0, 0.3)
        model.roi_heads.mask_head = head
        for name, tensor in to_mmdetection(model, generation).items():
            if "mask_head." in name:
                source[name.replace("mask_head.", f"mask_head.{stage}.")] = tensor
    converted = from_mmdetection(source)
    assert converted.unmatched == []
    actual = detect_masks(load(converted), image)
    expected = [detect_masks(use(model, head), image) for head in heads]
    assert len(actual) > 50 and (expected[0].pred_masks - expected[1].pred_masks).abs().max() > 0.1
    assert torch.equal(actual.pred_boxes.tensor, expected[0].pred_boxes.tensor)
    assert torch.equal(actual.scores, expected[0].scores)
    assert_near(actual.pred_masks, torch.stack([e.pred_masks for e in expected]).mean(0), 1e-5)


def use(model, mask_head):
    model.roi_heads.mask_head = mask_head
    return model


@torch.no_grad()
def detect_masks(model, image):
    """Instances with the probabilities of their masks."""
    (instances,) = model.inference([{"image": image}], do_postprocess=False)
    return instances


@pytest.fixture(scope="module")
def state():
    cfg = make_config(MASK, *SMALL_HEADS)
    return to_mmdetection(build_model(cfg), "3.x")


PYTORCH = ("RGB", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375], False)
CAFFE = ("BGR", [103.53, 116.28, 123.675], [1.0, 1.0, 1.0], True)
STYLES = {  # config text -> what is converted, by default and with caffe=True
    "": (PYTORCH, CAFFE),
    "model = dict(rpn_head=dict(target_means=[.0, .0, .0, .0]))": (PYTORCH, CAFFE),
    # 1.x and 2.x; weights of Detectron's own mean
    "backbone=dict(\n style='caffe'))\nimg_norm_cfg = dict(\n mean=[102.9801, 115.9465, 122.7717], std=[1, 1., 1.0],"
    " to_rgb=False)": (("BGR", [102.9801, 115.9465, 122.7717], [1.0, 1.0, 1.0], True),) * 2,
    # 3.x; mmdetection's ResNeXt-101 32x8d is BGR, but has the other strides
    "data_preprocessor=dict(bgr_to_rgb=False, mean=[\n 103.53,\n 116.28,\n 123.675,\n ], std=[57.375, 57.12, 58.395]),"
    'backbone=dict(style="pytorch")': (("BGR", [103.53, 116.28, 123.675], [57.375, 57.12, 58.395], False),) * 2,
    "data_preprocessor=dict(bgr_to_rgb=True,mean=[123.675,116.28,103.53],std=[58.395,57.12,57.375]),style='pytorch'": (
        (PYTORCH,) * 2
    ),
}


@pytest.mark.parametrize("text", STYLES)
@pytest.mark.parametrize("caffe", [False, True])
def test_style(state, text, caffe):
    converted = from_mmdetection(state, text, caffe=caffe)
    cfg = make_config(converted.config)
    found = (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.MODEL.RESNETS.STRIDE_IN_1X1)
    assert found == STYLES[text][caffe]
    assert any("RGB is assumed" in note for note in converted.notes) == ("to_rgb" not in text and not caffe)


def test_unmatched_is_listed(state):
    extra = {"backbone.layer1.0.conv2.gamma": torch.zeros(1), "roi_head.mask_iou_head.fc.weight": torch.zeros(1)}
    assert sorted(from_mmdetection(state | extra).unmatched) == sorted(extra)


@pytest.mark.parametrize(
    "prefix, sentence",
    [
        ("backbone.layer4.0.conv1", "without a ResNet"),
        ("neck.fpn_convs.3", "without an FPN"),
        ("rpn_head.rpn_reg", "without an RPN"),
        ("roi_head.bbox_head.fc_cls", "without a box head"),
    ],
)
def test_another_model_is_refused(state, prefix, sentence):
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    with pytest.raises(ValueError, match=f"must be that of mmdetection's .* got one {sentence}"):
        from_mmdetection(rest)


def test_another_depth_is_refused(state):
    rest = {name: tensor for name, tensor in state.items() if not name.startswith("backbone.layer3.5.")}
    with pytest.raises(ValueError, match=r"blocks of a ResNet-18, .*, got \[3, 4, 5, 3\]"):
        from_mmdetection(rest)


def pack(modulated):
    """The branches of one level of mmcv's pooling, of small weights."""

    def layers(*sizes):
        modules = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*modules[:-1])

    branches = {"offset_fc": layers(256 * 49, 24, 24, 2 * 49)}
    if modulated:
        branches["mask_fc"] = nn.Sequential(*layers(256 * 49, 24, 49), nn.Sigmoid())
    return nn.ModuleDict(branches)


@pytest.mark.parametrize("generation", ["3.x", "1.x"])
@pytest.mark.parametrize("modulated", [True, False])
def test_deformable_pooling(modulated, generation):
    plain = build_model(make_config(FASTER, *SMALL_HEADS))
    source, packs = to_mmdetection(plain, generation), [pack(modulated) for _ in range(4)]
    prefix = "bbox_roi_extractor.roi_layers" if generation == "1.x" else "roi_head.bbox_roi_extractor.roi_layers"
    for level, branches in enumerate(packs):
        source |= {f"{prefix}.{level}.{name}": tensor for name, tensor in branches.state_dict().items()}

    converted = from_mmdetection(source)
    assert converted.unmatched == []
    assert any("another operator" in note for note in converted.notes) == (generation == "1.x")
    cfg = make_config(converted.config)
    assert cfg.MODEL.ROI_HEADS.NAME == "DCNv2ROIHeads"
    assert ("ModulatedDeformRoIPool" if modulated else "DeformRoIPool") == cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE
    hidden = cfg.MODEL.DCNV2.MDPOOL_FC_DIMS if modulated else cfg.MODEL.DCNV2.DPOOL_FC_DIMS
    assert hidden == ([48, 48] if modulated else [24, 24])
    poolers = load(converted).roi_heads.box_pooler.level_poolers
    boxes = torch.tensor([[0.0, 3, 5, 60, 40], [0, 10, 2, 30, 58]])
    x = torch.randn(1, 256, 16, 16)
    for pooler, branches in zip(poolers, packs, strict=True):
        assert pooler.sampling_ratio == 0 and pooler.gamma == 0.1
        features = deform_roi_pool(x, boxes, None, 7, pooler.spatial_scale).flatten(1)
        with torch.no_grad():
            offset, mask = pooler.predict(x, boxes)
            expected = branches["offset_fc"](features).view(2, 2, 7, 7)
            assert_near(offset, expected, 1e-6)
            assert expected.std() > 0.01
            if modulated:
                assert_near(mask, branches["mask_fc"](features).view(2, 1, 7, 7), 1e-6)
