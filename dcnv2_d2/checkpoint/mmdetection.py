"""mmdetection's Faster, Mask and Cascade R-CNN with a ResNet and FPN -> Detectron2's names, and the config to run them.

Its generations: 1.x (heads at the top level, background first, conv2_offset), 2.x and 3.x (heads below roi_head,
background last, conv2.conv_offset or conv_offset_mask).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .joining import join_pool_branch

_RESNET, _HEADS = "backbone.bottom_up", "roi_heads"
_RULES = {
    r"backbone\.conv1\.(weight)": lambda p: f"{_RESNET}.stem.conv1.{p}",
    r"backbone\.bn1\.(\w+)": lambda p: f"{_RESNET}.stem.conv1.norm.{p}",
    r"backbone\.layer(\d)\.(\d+)\.conv(\d)\.(weight)": lambda s, b, c, p: f"{_block(s, b)}.conv{c}.{p}",
    r"backbone\.layer(\d)\.(\d+)\.bn(\d)\.(\w+)": lambda s, b, c, p: f"{_block(s, b)}.conv{c}.norm.{p}",
    r"backbone\.layer(\d)\.(\d+)\.conv(\d)(?:\.conv_offset|\.conv_offset_mask|_offset)\.(weight|bias)": (
        lambda s, b, c, p: f"{_block(s, b)}.conv{c}.conv_offset.{p}"
    ),
    r"backbone\.layer(\d)\.(\d+)\.downsample\.0\.(weight)": lambda s, b, p: f"{_block(s, b)}.shortcut.{p}",
    r"backbone\.layer(\d)\.(\d+)\.downsample\.1\.(\w+)": lambda s, b, p: f"{_block(s, b)}.shortcut.norm.{p}",
    r"neck\.lateral_convs\.(\d)\.conv\.(weight|bias)": lambda i, p: f"backbone.fpn_lateral{int(i) + 2}.{p}",
    r"neck\.fpn_convs\.(\d)\.conv\.(weight|bias)": lambda i, p: f"backbone.fpn_output{int(i) + 2}.{p}",
    r"rpn_head\.rpn_conv\.(weight|bias)": lambda p: f"proposal_generator.rpn_head.conv.{p}",
    r"rpn_head\.rpn_cls\.(weight|bias)": lambda p: f"proposal_generator.rpn_head.objectness_logits.{p}",
    r"rpn_head\.rpn_reg\.(weight|bias)": lambda p: f"proposal_generator.rpn_head.anchor_deltas.{p}",
    # A cascade has a number before the layer's name, for its stage; so it has here.
    r"roi_head\.bbox_head(\.\d)?\.shared_fcs\.(\d)\.(weight|bias)": (
        lambda s, i, p: f"{_HEADS}.box_head{s}.fc{int(i) + 1}.{p}"
    ),
    r"roi_head\.bbox_head(\.\d)?\.fc_cls\.(weight|bias)": lambda s, p: f"{_HEADS}.box_predictor{s}.cls_score.{p}",
    r"roi_head\.bbox_head(\.\d)?\.fc_reg\.(weight|bias)": lambda s, p: f"{_HEADS}.box_predictor{s}.bbox_pred.{p}",
    r"roi_head\.mask_head(\.\d)?\.convs\.(\d)\.conv\.(weight|bias)": (
        lambda s, i, p: f"{_HEADS}.mask_head{s}.mask_fcn{int(i) + 1}.{p}"
    ),
    r"roi_head\.mask_head(\.\d)?\.upsample\.(weight|bias)": lambda s, p: f"{_HEADS}.mask_head{s}.deconv.{p}",
    r"roi_head\.mask_head(\.\d)?\.conv_logits\.(weight|bias)": lambda s, p: f"{_HEADS}.mask_head{s}.predictor.{p}",
}
# Of a backbone: order, mean and deviation of the channels of its images, and whether its strides are in the 1x1s.
_PYTORCH = ("RGB", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375], False)
_CAFFE = ("BGR", [103.53, 116.28, 123.675], [1.0, 1.0, 1.0], True)
_POOL = r"roi_head\.bbox_roi_extractor\.roi_layers\.(\d)\.((?:offset|mask)_fc\..*)"


def _block(stage, block):
    return f"{_RESNET}.res{int(stage) + 1}.{block}"


@dataclass
class Converted:
    """A model by Detectron2's names, and what its user must know.

    Args:
        model: the state dict.
        config: the config, as nested dicts: only what differs from Detectron2's and our defaults.
        unmatched: names in the file that have no place in this model.
        notes: sentences about what is not quite the same as in mmdetection.
    """

    model: dict[str, Tensor]
    config: dict
    unmatched: list[str]
    notes: list[str] = field(default_factory=list)


def from_mmdetection(state_dict: Mapping[str, Tensor], config_text: str = "", *, caffe: bool = False) -> Converted:
    """Converts the weights of an mmdetection model.

    Args:
        state_dict: by mmdetection's names.
        config_text: mmdetection's config of the model, of which the preparation of images and the style are read.
        caffe: what to take where config_text does not say: mmdetection's style caffe instead of pytorch.

    Raises:
        ValueError: it is not a Faster, Mask or Cascade R-CNN with a ResNet and FPN; the sentence says what is missing.
    """
    legacy = any(name.startswith("bbox_head.") for name in state_dict)
    model: dict[str, Tensor] = {}
    levels: dict[int, dict[str, Tensor]] = {}
    unmatched: list[str] = []
    for name, tensor in state_dict.items():
        if name.endswith(".num_batches_tracked"):
            continue
        current = re.sub(r"^(?=(bbox|mask)_(head|roi_extractor)\.)", "roi_head.", name)
        if pool := re.fullmatch(_POOL, current):
            levels.setdefault(int(pool[1]), {})[pool[2]] = tensor
        elif new := _rename(current):
            model[new] = tensor
        else:
            unmatched.append(name)
    _require_parts(model, state_dict)

    notes = []
    style = _read_style(config_text, _CAFFE if caffe else _PYTORCH)
    if "to_rgb" not in config_text and not caffe:
        notes.append("the file does not say how its images were prepared; RGB is assumed, mmdetection's style pytorch")
    if legacy:
        _move_background_last(model)
        notes.append("mmdetection 1.x counts boxes and anchors in whole pixels (+1): expect up to 1 AP less than there")
    if levels and legacy:
        notes.append(
            "mmdetection 1.x trained deformable pooling with another operator (rounded boxes, samples at the corners "
            "of bins, those outside left out): train on before you rely on it"
        )
    for level, branch in levels.items():
        for name, tensor in join_pool_branch(branch).items():
            model[f"{_HEADS}.box_pooler.level_poolers.{level}.{name}"] = tensor
    modulated_pool = any("mask_fc.0.weight" in branch for branch in levels.values())
    return Converted(model, _config(model, bool(levels), modulated_pool, legacy, style), unmatched, notes)


def _rename(name):
    for pattern, new in _RULES.items():
        if match := re.fullmatch(pattern, name):
            return new(*(group or "" for group in match.groups()))
    return None


def _read_style(text, default):
    """What a config's text says of these, and the default where it is silent."""

    def find(pattern, read, otherwise):
        return read(match[1]) if (match := re.search(pattern, text)) else otherwise

    def numbers(listed):
        return [float(number) for number in listed.split(",") if number.strip()]

    return (
        find(r"to_rgb\s*=\s*(True|False)", {"True": "RGB", "False": "BGR"}.get, default[0]),  # 3.x: bgr_to_rgb
        find(r"\bmean\s*=\s*[\[(]([\d\s.,]+)[\])]", numbers, default[1]),
        find(r"\bstd\s*=\s*[\[(]([\d\s.,]+)[\])]", numbers, default[2]),
        find(r"\bstyle\s*=\s*['\"](\w+)", "caffe".__eq__, default[3]),
    )


def _require_parts(model, state_dict):
    parts = {
        "a ResNet (backbone.conv1, backbone.layer1 to 4)": rf"{_RESNET}\.(stem\.conv1|res[2345]\.0\.conv1)\.weight",
        "an FPN of four levels (neck.fpn_convs)": r"backbone\.fpn_output[2345]\.weight",
        "an RPN (rpn_head.rpn_conv, rpn_cls, rpn_reg)": r"proposal_generator\.rpn_head\.\w+\.weight",
        "a box head (bbox_head.shared_fcs.0, fc_cls, fc_reg)": (
            rf"{_HEADS}\.box_(head(\.0)?\.fc1|predictor(\.0)?\.\w+)\.weight"
        ),
    }
    counts = (5, 4, 3, 3)
    missing = [
        part
        for (part, pattern), count in zip(parts.items(), counts, strict=True)
        if sum(bool(re.fullmatch(pattern, name)) for name in model) != count
    ]
    if missing:
        raise ValueError(
            "state_dict must be that of mmdetection's Faster, Mask or Cascade R-CNN with a ResNet and an FPN, got one "
            f"without {', without '.join(missing)}; its first names are {', '.join(list(state_dict)[:3])}"
        )


def _move_background_last(model):
    """1.x: class 0 is the background, with box deltas and a mask of its own. Here it is the last, and has neither."""
    for name, tensor in model.items():
        if ".cls_score." in name:
            model[name] = tensor.roll(-1, 0)
        elif re.search(r"\.mask_head(\.\d)?\.predictor\.", name):
            model[name] = tensor[1:] if len(tensor) > 1 else tensor  # 1: the same mask for every class
        elif ".bbox_pred." in name and len(tensor) > 4:  # 4: the same deltas for every class
            model[name] = tensor[4:]


def _config(model, deformable_pool, modulated_pool, legacy, style):
    image_format, mean, std, stride_in_1x1 = style
    cascade = f"{_HEADS}.box_head.0.fc1.weight" in model
    stage = ".0" if cascade else ""
    fc_dim, fc_inputs = model[f"{_HEADS}.box_head{stage}.fc1.weight"].shape
    num_classes = len(model[f"{_HEADS}.box_predictor{stage}.cls_score.bias"]) - 1
    channels = len(model["backbone.fpn_output2.weight"])
    # 1.x has 2x2 samples a bin and no half-pixel alignment; later there is one sample per pixel.
    align = {"POOLER_TYPE": "ROIAlign" if legacy else "ROIAlignV2", "POOLER_SAMPLING_RATIO": 2 if legacy else 0}
    masks = f"{_HEADS}.mask_head{stage if f'{_HEADS}.mask_head.0.predictor.weight' in model else ''}"
    config = {
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "MASK_ON": f"{masks}.predictor.weight" in model,
        "PIXEL_MEAN": list(mean),
        "PIXEL_STD": list(std),
        "BACKBONE": {"NAME": "build_dcnv2_resnet_fpn_backbone"},
        "RESNETS": _resnet_config(model) | {"STRIDE_IN_1X1": stride_in_1x1},
        "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"], "OUT_CHANNELS": channels},
        "ANCHOR_GENERATOR": {"SIZES": [[32], [64], [128], [256], [512]]},
        "RPN": {
            "IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
            "PRE_NMS_TOPK_TEST": 1000,
            "POST_NMS_TOPK_TRAIN": 1000,
            "POST_NMS_TOPK_TEST": 1000,
        },
        "ROI_HEADS": {
            "NAME": "CascadeROIHeads" if cascade else "StandardROIHeads",
            "IN_FEATURES": ["p2", "p3", "p4", "p5"],
            "NUM_CLASSES": num_classes,
        },
        "ROI_BOX_HEAD": {
            "NAME": "FastRCNNConvFCHead",
            "NUM_FC": _count(rf"{_HEADS}\.box_head{re.escape(stage)}\.fc\d\.weight", model),
            "FC_DIM": fc_dim,
            "CLS_AGNOSTIC_BBOX_REG": len(model[f"{_HEADS}.box_predictor{stage}.bbox_pred.bias"]) == 4,
            "POOLER_RESOLUTION": round((fc_inputs / channels) ** 0.5),
            **align,
        },
    }
    if deformable_pool:
        key, pooler = ("MDPOOL", "ModulatedDeformRoIPool") if modulated_pool else ("DPOOL", "DeformRoIPool")
        branch = f"{_HEADS}.box_pooler.level_poolers.0.branch"
        hidden = [len(model[f"{branch}.{layer}.bias"]) for layer in (0, 2)]
        config["DCNV2"] = {f"{key}_FC_DIMS": hidden}
        config["ROI_HEADS"]["NAME"] = "DCNv2CascadeROIHeads" if cascade else "DCNv2ROIHeads"
        config["ROI_BOX_HEAD"] |= {"POOLER_TYPE": pooler, "POOLER_SAMPLING_RATIO": 0}
    if config["MASK_ON"]:
        predictor = model[f"{masks}.predictor.weight"]
        config["ROI_MASK_HEAD"] = {
            "NAME": "AveragedMaskHeads" if masks.endswith(".0") else "MaskRCNNConvUpsampleHead",
            "NUM_CONV": _count(rf"{re.escape(masks)}\.mask_fcn\d\.weight", model),
            "CONV_DIM": predictor.shape[1],
            "CLS_AGNOSTIC_MASK": len(predictor) != num_classes,
            "POOLER_RESOLUTION": 14,
            **align,
        }
    coco = {"DATASETS": {"TRAIN": ["coco_2017_train"], "TEST": ["coco_2017_val"]}} if num_classes == 80 else {}
    return {"MODEL": config, **coco, "INPUT": {"FORMAT": image_format}, "VERSION": 2}


def _resnet_config(model):
    blocks = [_count(rf"{_RESNET}\.res{stage}\.\d+\.conv1\.weight", model) for stage in range(2, 6)]
    bottleneck = f"{_RESNET}.res2.0.conv3.weight" in model
    depths = {(2, 2, 2, 2, False): 18, (3, 4, 6, 3, False): 34, (3, 4, 6, 3, True): 50, (3, 4, 23, 3, True): 101}
    depths[3, 8, 36, 3, True] = 152
    if (*blocks, bottleneck) not in depths:
        raise ValueError(f"state_dict must have the blocks of a ResNet-18, 34, 50, 101 or 152, got {blocks}")
    width, group_width = model[f"{_RESNET}.res2.0.conv2.weight"].shape[:2]
    config = {
        "DEPTH": depths[(*blocks, bottleneck)],
        "NUM_GROUPS": width // group_width,
        "WIDTH_PER_GROUP": group_width,
        "RES2_OUT_CHANNELS": 256 if bottleneck else 64,
        "NORM": "FrozenBN",
        "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    }
    predictors = {
        stage: model[name]
        for stage in range(2, 6)
        for name in model
        if re.fullmatch(rf"{_RESNET}\.res{stage}\.\d+\.conv2\.conv_offset\.weight", name)
    }
    if predictors:
        out_channels, in_channels = next(iter(predictors.values())).shape[:2]
        # 27 channels a group with a mask, 18 without. 54 could be 2 groups or 3, but 3 do not divide the input.
        modulated = out_channels % 27 == 0 and in_channels % (out_channels // 27) == 0
        config |= {
            "DEFORM_ON_PER_STAGE": [stage in predictors for stage in range(2, 6)],
            "DEFORM_MODULATED": modulated,
            "DEFORM_NUM_GROUPS": out_channels // (27 if modulated else 18),
        }
    return config


def _count(pattern, names):
    return sum(bool(re.fullmatch(pattern, name)) for name in names)
