"""The config keys that DCNv2 adds to Detectron2's.

The choice of stages, v1 or v2, and offset groups are Detectron2's own MODEL.RESNETS.DEFORM_ON_PER_STAGE,
DEFORM_MODULATED and DEFORM_NUM_GROUPS.
"""

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.utils.file_io import PathManager

from . import compat
from .data import register_files
from .modeling.backbone import DETECTRON2_BUILDERS
from .modeling.meta_arch import MimickingRCNN
from .modeling.mimicking import Mimicking
from .modeling.multi_scale import check_augmentation
from .modeling.poolers import LAYERS as POOLER_LAYERS
from .modeling.roi_heads import DeformPoolers

_INSTALLED = Path(__file__).parent / "model_zoo" / "configs"
# In a checkout, an editable install too, they are beside the package.
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "configs"
logger = logging.getLogger(__name__)
# Keys whose values are lists, of which the command line may give a single entry as it is
LISTS = ("DATASETS.TRAIN", "DATASETS.TEST", "MODEL.DCNV2.CONVS")


def add_dcnv2_config(cfg: CfgNode) -> None:
    """Adds every key of this package, with its default, to a Detectron2 config."""
    cfg.MODEL.DCNV2 = CfgNode()
    # Regular expressions, found in the names of a whole model's convolutions: those become deformable, whatever the
    # model is. ["backbone.bottom_up.res[345].*conv2"] are conv3 to conv5 of a ResNet (section 4.2).
    cfg.MODEL.DCNV2.CONVS = []
    # Largest modulation of a sample or bin (section 3.2): the paper's sigmoid ends at 1; 2 leaves a pre-trained
    # network's function unchanged at the start.
    cfg.MODEL.DCNV2.MASK_SCALE = 1.0
    # Learning rate of the convolutions that predict offsets and modulation, relative to the rest (section 3.2: 0.1).
    cfg.MODEL.DCNV2.OFFSET_LR_FACTOR = 0.1
    # Channels of conv5 after its reduction, in the *_dc5_backbone and *_aspp_backbone builders (section 4.1: 256).
    cfg.MODEL.DCNV2.DC5_CHANNELS = 256
    # Deformable RoI pooling, v1 and modulated: widths of the hidden layers of the branch that predicts offsets (v1 has
    # none; v2, section 3.2, two of 1024), whether one branch serves all FPN levels, and the unit of an offset in RoI
    # sizes (gamma of v1's section 2.2).
    cfg.MODEL.DCNV2.DPOOL_FC_DIMS = []
    cfg.MODEL.DCNV2.MDPOOL_FC_DIMS = [1024, 1024]
    cfg.MODEL.DCNV2.POOL_SHARED = False
    cfg.MODEL.DCNV2.POOL_GAMMA = 0.1
    # Instead of whole stages: how many 3x3 convolutions, counted from the last one, are deformable (v1's Table 1: 0, 1,
    # 2, 3, 6), and the dilation of the last three (v1's Table 3: 4, 6, 8; 0: as the builder makes them).
    cfg.MODEL.DCNV2.DEFORM_LAST = 0
    cfg.MODEL.DCNV2.LAST_DILATION = 0
    # Whether the convolutions that predict offsets have the dilation of theirs; not so in the authors' DeepLab.
    cfg.MODEL.DCNV2.OFFSET_DILATION = True
    # R-FCN (v1's section 3.2): channels of its 1x1 convolution after conv5, which the class-aware RPN has too, and
    # whether ROI_HEADS.BATCH_SIZE_PER_IMAGE counts the proposals with the greatest losses (OHEM) or random ones.
    cfg.MODEL.RFCN = CfgNode()
    cfg.MODEL.RFCN.CONV_DIM = 1024
    cfg.MODEL.RFCN.OHEM = False
    # R-CNN feature mimicking (section 3.3), for MODEL.META_ARCHITECTURE MimickingRCNN
    cfg.MODEL.MIMIC = CfgNode()
    # Which RoIs are in Omega: fg (the paper's choice), bg or both (Table 3), and how many of an image at most (32).
    cfg.MODEL.MIMIC.REGIONS = "fg"
    cfg.MODEL.MIMIC.NUM_ROIS = 32
    # Side of the crop of an RoI in pixels (224).
    cfg.MODEL.MIMIC.CROP_SIZE = 224
    # Weights of L_mimic (Eq. 3) and of the cross-entropy of the R-CNN branch (both 0.1).
    cfg.MODEL.MIMIC.LOSS_WEIGHT = 0.1
    cfg.MODEL.MIMIC.CLS_LOSS_WEIGHT = 0.1
    # sum (Eq. 3) or mean of L_mimic over the RoIs of an image.
    cfg.MODEL.MIMIC.REDUCTION = "sum"
    # For less memory: crops in one pass through the network (0: all), and whether backward computes them again.
    cfg.MODEL.MIMIC.CHUNK = 0
    cfg.MODEL.MIMIC.CHECKPOINTING = False
    # Multi-scale testing (TEST.AUG): a kept box becomes the mean of the boxes that overlap it so much; 0: it stays.
    cfg.TEST.AUG.AVERAGE_IOU = 0.0
    # SGD (Detectron2's) or ADAMW, with SOLVER.BASE_LR and SOLVER.WEIGHT_DECAY.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # [[regular expression, factor], ...]: learning rate of the parameters whose names it finds, relative to the rest.
    cfg.SOLVER.LR_FACTORS = []


def get_config_file(config_path: str) -> str:
    """The path of one of this package's configs.

    Args:
        config_path: below configs/, such as "COCO/mask_rcnn/mask_rcnn_R_50_FPN_1x_mdconv_c3-c5.yaml".

    Raises:
        ValueError: there is none of that name; it lists those of similar names.
    """
    if (CONFIGS / config_path).is_file():
        return str(CONFIGS / config_path)
    names = {path.name: path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml")}
    near = [names[name] for name in difflib.get_close_matches(Path(config_path).name, names)]
    raise ValueError(
        f"{config_path} must be a file or the name of one of dcnv2_d2's configs, and is neither"
        f"{'; similar are ' if near else ''}{', '.join(near)}"
    )


def find_config_file(config_file: str) -> str:
    """The file itself, if it is one, else that of get_config_file, whose ValueError it raises."""
    return config_file if PathManager.isfile(config_file) else get_config_file(config_file)


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Reads a config file of this package or of Detectron2; without a GPU, the model runs on the CPU.

    Args:
        config_file: a YAML file, or a name as get_config_file takes it. Where it gives no OUTPUT_DIR, that is the
            file's name in output/, so that runs of several configs do not overwrite each other.
        opts: keys and values that come after it: ["MODEL.WEIGHTS", "model_final.pth"]. A data set in DATASETS.TRAIN or
            DATASETS.TEST can be a registered name or files, "annotations.json:folder of images".

    Raises:
        ValueError: see check_config.
    """
    cfg = get_cfg()
    add_dcnv2_config(cfg)
    _merge_file(cfg, config_file)
    cfg.merge_from_list(_with_lists(opts))
    register_files([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    choose_device(cfg)
    check_config(cfg)
    return cfg


def _merge_file(cfg: CfgNode, config_file: str) -> None:
    default = cfg.OUTPUT_DIR
    cfg.merge_from_file(find_config_file(config_file))
    if default == cfg.OUTPUT_DIR:
        cfg.OUTPUT_DIR = f"output/{Path(config_file).stem}"


def _with_lists(opts: Sequence[str]) -> list[str | tuple[str]]:
    """Keys and values, in which a single data set or expression needs no parentheses."""
    values: list[str | tuple[str]] = list(opts)
    for i, key in enumerate(opts[:-1:2]):
        value = values[2 * i + 1]
        if key in LISTS and isinstance(value, str) and value[:1] not in ("(", "["):
            values[2 * i + 1] = (value,)
    return values


def choose_device(cfg: CfgNode) -> None:
    """Sets MODEL.DEVICE to cpu, and says so, if it asks for a GPU and there is none."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("MODEL.DEVICE is %s, but no GPU is available: running on the CPU.", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"


def require_weights(cfg: CfgNode, *, resume: bool = False) -> None:
    """For commands that use a trained detector.

    Args:
        resume: whether the last checkpoint in OUTPUT_DIR is used if there is one.

    Raises:
        ValueError: MODEL.WEIGHTS is empty, or has the backbone alone.
    """
    if resume and (Path(cfg.OUTPUT_DIR) / "last_checkpoint").is_file():
        return
    if not cfg.MODEL.WEIGHTS or "ImageNetPretrained/" in cfg.MODEL.WEIGHTS:
        raise ValueError(f"MODEL.WEIGHTS must be given, those of a trained detector, got {cfg.MODEL.WEIGHTS!r}")


def check_config(cfg: CfgNode) -> None:
    """Refuses combinations of keys that would fail later, or have no effect.

    Raises:
        ValueError: names the key, what it must be and what it is.
    """
    _check_backbone(cfg.MODEL)
    check_augmentation(cfg)
    meta_arch = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if issubclass(meta_arch, GeneralizedRCNN):
        _check_heads(cfg.MODEL, meta_arch)


def _check_backbone(model: CfgNode) -> None:
    """Detectron2's own deformable layers are CUDA code in its compiled part."""
    if BACKBONE_REGISTRY.get(model.BACKBONE.NAME) not in DETECTRON2_BUILDERS:
        return
    if model.DCNV2.DEFORM_LAST or model.DCNV2.LAST_DILATION:
        raise ValueError(
            f"MODEL.BACKBONE.NAME must be {model.BACKBONE.NAME.replace('build_', 'build_dcnv2_', 1)} for "
            f"MODEL.DCNV2.DEFORM_LAST and LAST_DILATION, got {model.BACKBONE.NAME}"
        )
    if not any(model.RESNETS.DEFORM_ON_PER_STAGE):
        return
    if not compat.has_compiled_part():
        reason = "this Detectron2 has no compiled part"
    elif model.DEVICE == "cpu":
        reason = "Detectron2's own deformable layers do not run on the CPU"
    else:
        return
    raise ValueError(
        f"MODEL.BACKBONE.NAME must be {model.BACKBONE.NAME.replace('build_', 'build_dcnv2_', 1)} for "
        f"MODEL.RESNETS.DEFORM_ON_PER_STAGE, as {reason}, got {model.BACKBONE.NAME}"
    )


def _check_heads(model: CfgNode, meta_arch: type[GeneralizedRCNN]) -> None:
    heads = ROI_HEADS_REGISTRY.get(model.ROI_HEADS.NAME)
    for head, on in (("BOX", True), ("MASK", model.MASK_ON)):
        kind = model[f"ROI_{head}_HEAD"].POOLER_TYPE
        if on and kind in POOLER_LAYERS and not issubclass(heads, DeformPoolers):
            raise ValueError(
                f"MODEL.ROI_HEADS.NAME must be DCNv2ROIHeads or another of dcnv2_d2's for MODEL.ROI_{head}_HEAD."
                f"POOLER_TYPE {kind}, got {model.ROI_HEADS.NAME}"
            )
    if issubclass(heads, Mimicking) and not issubclass(meta_arch, MimickingRCNN):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE must be MimickingRCNN for MODEL.ROI_HEADS.NAME {model.ROI_HEADS.NAME}, "
            f"got {model.META_ARCHITECTURE}"
        )
