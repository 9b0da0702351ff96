"""MODEL.DCNV2.CONVS: any model of Detectron2 becomes deformable wherever Detectron2 builds one."""

import numpy as np
import pytest
import torch
from dcnv2_d2 import add_dcnv2_config, load_config
from dcnv2_d2.engine import Trainer
from dcnv2_d2.layers import DeformConv2d, ModulatedDeformConv2d
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet, build_model
from detectron2.modeling.meta_arch.build import META_ARCH_REGISTRY as BUILDERS
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

# What Detectron2's Base-RetinaNet.yaml and COCO-Detection/retinanet_R_50_FPN_1x.yaml set, data and schedule aside
RETINANET = [
    *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
    *("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[x * 2 ** (i / 3) for i in range(3)] for x in (32, 64, 128, 256, 512)]),
    *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"], "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 0.0),
    *("MODEL.RETINANET.IOU_THRESHOLDS", [0.4, 0.5], "MODEL.RETINANET.IOU_LABELS", [0, -1, 1], "VERSION", 2),
]
C3_C5 = r"backbone\.bottom_up\.res[345]\..*conv2"
MDCONV = ["MODEL.RESNETS.DEFORM_MODULATED", True, "MODEL.DCNV2.CONVS", [C3_C5]]


def config(*options):
    cfg = get_cfg()
    add_dcnv2_config(cfg)
    cfg.merge_from_list([*RETINANET, "MODEL.DEVICE", "cpu", *options])
    return cfg


def deformable(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, DeformConv2d)}


EXPECTED = {f"backbone.bottom_up.res{s}.{i}.conv2" for s, n in ((3, 4), (4, 6), (5, 3)) for i in range(n)}


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    return DefaultPredictor(config(*MDCONV, "MODEL.WEIGHTS", ""))


def test_the_predictor_and_the_trainer_build_it(predictor):
    for model in (predictor.model, Trainer.build_model(config(*MDCONV))):
        assert type(model) is RetinaNet
        layers = deformable(model)
        assert layers.keys() == EXPECTED and {type(layer) for layer in layers.values()} == {ModulatedDeformConv2d}
        assert {layer.name for layer in layers.values()} == EXPECTED


def test_trains_a_step():
    model = build_model(config(*MDCONV))
    optimizer = Trainer.build_optimizer(config(*MDCONV), model)
    target = Instances((64, 96), gt_boxes=Boxes(torch.tensor([[8.0, 8, 60, 50]])), gt_classes=torch.tensor([3]))
    with EventStorage():
        losses = model([{"image": torch.rand(3, 64, 96) * 255, "instances": target}])
    sum(losses.values()).backward()
    optimizer.step()
    predictors = [layer.conv_offset.weight for layer in deformable(model).values()]
    assert all(weight.abs().max() > 0 for weight in predictors)  # they start at zero
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(weight)] for weight in predictors} == {0.1 * config().SOLVER.BASE_LR}


def test_predicts(predictor):
    predictor.model.test_score_thresh = 0.0
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    assert len(predictor(image)["instances"]) > 0


def test_from_a_command(tmp_path):
    """One expression needs no brackets; with MASK_SCALE 2 the function is that of the plain model."""
    (tmp_path / "retinanet.yaml").write_text(config().dump())
    options = ["MODEL.DCNV2.CONVS", "head.*_subnet", "MODEL.DCNV2.MASK_SCALE", "2.0", *MDCONV[:2]]
    cfg = load_config(str(tmp_path / "retinanet.yaml"), list(map(str, options)))
    plain, model = build_model(config()).eval(), build_model(cfg).eval()
    assert len(deformable(model)) == 8 and not deformable(plain)
    model.load_state_dict(plain.state_dict(), strict=False)
    image = torch.rand(3, 64, 96) * 255
    with torch.no_grad():
        expected, actual = (m([{"image": image}])[0]["instances"].scores for m in (plain, model))
    assert actual.shape == expected.shape and torch.allclose(actual, expected, atol=1e-5)


def test_v1_and_groups():
    model = build_model(config("MODEL.DCNV2.CONVS", [C3_C5, "fpn_output3"], "MODEL.RESNETS.DEFORM_NUM_GROUPS", 2))
    layers = deformable(model)
    assert layers.keys() == EXPECTED | {"backbone.fpn_output3"}
    assert all(type(layer) is DeformConv2d and layer.offset_groups == 2 for layer in layers.values())


def test_nothing_is_chosen_by_default():
    assert not deformable(build_model(config()))
    assert not deformable(build_model(get_cfg_of_detectron2()))


def get_cfg_of_detectron2():
    cfg = get_cfg()  # without this package's keys
    cfg.merge_from_list([*RETINANET, "MODEL.DEVICE", "cpu"])
    return cfg


@pytest.mark.parametrize(
    "options, message",
    [
        ([["res9"]], r"MODEL\.DCNV2\.CONVS, 'res9': where must choose at least one convolution larger than 1x1"),
        ([[C3_C5, r"res3\.0\.conv1"]], r"MODEL\.DCNV2\.CONVS, 'res3.*conv1': .* finds 1x1 ones only"),
        ([["(res3"]], r"MODEL\.DCNV2\.CONVS, '\(res3': missing \)"),
        ([[3]], r"MODEL\.DCNV2\.CONVS, 3: "),
        ([["res2"]], r"but backbone\.bottom_up\.res2\.0\.conv2 is frozen \(see MODEL\.BACKBONE\.FREEZE_AT\), 3 in all"),
        (
            [["res5"], "MODEL.DCNV2.MASK_SCALE", 0.0],
            r"MODEL\.DCNV2\.CONVS, 'res5': .*conv2 .*: mask_scale must be above 0",
        ),
    ],
)
def test_bad_keys(options, message):
    with pytest.raises(ValueError, match=message):
        build_model(config(*MDCONV[:2], "MODEL.DCNV2.CONVS", *options))


def test_the_registry_stays_detectron2s():
    """Other packages take classes from it, and register theirs, through either name."""
    assert META_ARCH_REGISTRY.get("RetinaNet") is RetinaNet
    for registry in (META_ARCH_REGISTRY, BUILDERS):

        @registry.register()
        class Somebodys(nn.Sequential):
            def __init__(self, cfg):
                super().__init__(nn.Conv2d(3, 4, 3))

        try:
            options = ["MODEL.META_ARCHITECTURE", "Somebodys", "MODEL.DCNV2.CONVS", ["0"]]
            assert deformable(build_model(config(*options))).keys() == {"0"}
        finally:
            del registry._obj_map["Somebodys"]
