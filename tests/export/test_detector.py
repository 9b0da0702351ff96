"""Whole detectors, exported once, against themselves at several image sizes."""

import cv2
import pytest
import torch
from dcnv2_d2 import export_model
from dcnv2_d2.config import CONFIGS
from dcnv2_d2.export import MIN_TORCH, Detector, export_detector, export_onnx
from dcnv2_d2.layers import ModulatedDeformConv2d, ModulatedDeformRoIPool
from detectron2.layers import ROIAlign
from detectron2.modeling import build_model

from ..modeling.test_convs import MDCONV, RETINANET
from ..models import FASTER, MASK, make_config, make_model

HEADS = [
    *("MODEL.ROI_HEADS.NUM_CLASSES", "5", "MODEL.ROI_BOX_HEAD.FC_DIM", "64", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "60"),
]
MDPOOL = [
    *("MODEL.ROI_HEADS.NAME", "DCNv2ROIHeads", "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ModulatedDeformRoIPool"),
    *("MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ModulatedDeformRoIPool", "MODEL.DCNV2.MDPOOL_FC_DIMS", "[64, 64]"),
]
MODELS = {"faster mdconv": (FASTER, []), "mask mdconv mdpool": (MASK, MDPOOL)}
SMALL = CONFIGS / "quick_start/mask_rcnn_small_mdconv_c3-c5_mdpool.yaml"
# The first has more anchors on p2 than RPN.PRE_NMS_TOPK_TEST; the second is the smallest there may be.
SIZES = [(160, 131), (65, 66)]


def export(model):
    if torch.__version__ < f"{MIN_TORCH}.0a0":
        pytest.skip(f"torch is older than {MIN_TORCH}")
    return export_detector(model)


@pytest.fixture(scope="module", params=MODELS)
def exported(request):
    """ResNet-50 with FPN and mdconv, without and with mdpool in both heads, and its program."""
    torch.manual_seed(0)
    config, options = MODELS[request.param]
    model = make_model(config, *HEADS, *options)
    layers = [type(m) for m in model.modules()]
    assert layers.count(ModulatedDeformConv2d) == 13
    assert (layers.count(ModulatedDeformRoIPool), layers.count(ROIAlign)) == ((8, 0) if options else (0, 4))
    return model, export(model)


def make_image(height, width):
    pixels = torch.rand(1, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(1)) * 255
    return torch.nn.functional.interpolate(pixels, size=(height, width), mode="bicubic")[0]


def raw(model, image):
    """Detectron2's own results, before masks are pasted: boxes, scores, classes and masks."""
    with torch.no_grad():
        (instances,) = model.inference([{"image": image}], do_postprocess=False)
    masks = [instances.pred_masks[:, 0]] if instances.has("pred_masks") else []
    return [instances.pred_boxes.tensor, instances.scores, instances.pred_classes, *masks]


def assert_same(actual, expected, tolerance):
    assert len(actual) == len(expected) and len(expected[0]) > 20
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert (a.double() - e.double()).abs().max() <= tolerance
    assert actual[1][0] > 0.5 and actual[1].std() > 0.01 and len(actual[2].unique()) > 2


def test_program(exported):
    model, program = exported
    module = program.module()
    for size in SIZES:
        image = make_image(*size)
        with torch.no_grad():
            assert_same(module(image), raw(model, image), 1e-5)


def test_onnx_runtime(exported, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", "1.25")
    model, program = exported
    path = tmp_path / "detector.onnx"
    export_onnx(program, path)
    session = onnxruntime.InferenceSession(path)
    names = ["boxes", "scores", "classes", "masks"]
    assert [o.name for o in session.get_outputs()] == names[: 4 if model.roi_heads.mask_on else 3]
    for size in SIZES:
        image = make_image(*size)
        results = [torch.from_numpy(r) for r in session.run(None, {"image": image.numpy()})]
        assert_same(results, raw(model, image), 1e-4)


@pytest.fixture(scope="module")
def small():
    """A Mask R-CNN of one level, without padding to whole strides, mdpool in both heads, and its program."""
    torch.manual_seed(0)
    model = make_model(SMALL)
    return model, export(model)


def assert_small(results, model, image):
    expected = raw(model, image)
    assert [r.shape for r in results] == [e.shape for e in expected] and len(expected[0]) == 20
    for actual, e in zip(results, expected, strict=True):
        assert (actual.double() - e.double()).abs().max() < 1e-3


def test_small_detector_from_a_file(small, tmp_path):
    model, program = small
    torch.export.save(program, tmp_path / "small.pt2")
    module = torch.export.load(tmp_path / "small.pt2").module()
    for image in (make_image(128, 128), make_image(99, 160)):
        with torch.no_grad():
            assert_small(module(image), model, image)
    parameters = dict(module.named_parameters())
    parameters["model.roi_heads.box_predictor.cls_score.bias"].data[-1] = 100.0  # all is background
    assert [len(r) for r in module(make_image(128, 128))] == [0, 0, 0, 0]


def test_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr("dcnv2_d2.export.MIN_TORCH", "99.1")
    with pytest.raises(ImportError, match="export_detector: torch must be 99.1 or later, got "):
        export_detector(make_model(SMALL))


@pytest.fixture(scope="module")
def retinanet():
    """Detectron2's own RetinaNet, deformable by keys alone, with scores on both sides of the threshold; its program."""
    torch.manual_seed(0)
    model = make_model(
        {}, *RETINANET, *MDCONV, "MODEL.RETINANET.NUM_CLASSES", "5", "MODEL.RETINANET.NUM_CONVS", "1",
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST", "150", "MODEL.FPN.OUT_CHANNELS", "64",
    )  # fmt: skip
    model.head.cls_score.weight.data.mul_(3)
    model.head.cls_score.bias.data.zero_()
    model.test_score_thresh = 0.5
    assert sum(isinstance(m, ModulatedDeformConv2d) for m in model.modules()) == 13
    return model, export(model)


# The first has more candidates than are kept; the second is the smallest there may be.
RETINANET_SIZES = [(260, 231), (129, 130)]


def raw_retinanet(model, image):
    with torch.no_grad():
        (output,) = model([{"image": image}])
    instances = output["instances"]
    return [instances.pred_boxes.tensor, instances.scores, instances.pred_classes]


def test_retinanet(retinanet):
    model, program = retinanet
    for size in RETINANET_SIZES:
        image = make_image(*size)
        with torch.no_grad():
            assert_same(program.module()(image), raw_retinanet(model, image), 1e-5)


def test_retinanet_in_onnx_runtime(retinanet, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", "1.25")
    model, program = retinanet
    export_onnx(program, tmp_path / "retinanet.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "retinanet.onnx")
    for size in RETINANET_SIZES:
        image = make_image(*size)
        results = [torch.from_numpy(r) for r in session.run(None, {"image": image.numpy()})]
        assert_same(results, raw_retinanet(model, image), 1e-4)


def test_exporting_leaves_the_model_alone(retinanet):
    model, _ = retinanet
    modules = [(module, module.forward) for module in model.modules()]
    with torch.no_grad():
        before = raw_retinanet(model, make_image(130, 140))
        Detector(model)(make_image(130, 140))
        after = raw_retinanet(model, make_image(130, 140))
    assert all(module.forward == forward for module, forward in modules)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_without_masks():
    model, image = make_model(SMALL, "MODEL.MASK_ON", "False"), make_image(99, 160)
    with torch.no_grad():
        assert_small(Detector(model)(image), model, image)


@pytest.fixture
def command(monkeypatch, capsys):
    """The command in this process: what it prints."""

    def run(*args):
        monkeypatch.setattr("sys.argv", ["export_model.py", "--config-file", str(SMALL), *map(str, args)])
        export_model.main()
        return capsys.readouterr().out

    return run


def test_the_command(small, command, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", "1.25")
    model, _ = small
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    cv2.imwrite(str(tmp_path / "photo.png"), make_image(128, 160).numpy().transpose(1, 2, 0))
    options = ["--output", tmp_path / "small.onnx", "--opset", "20", "--image", tmp_path / "photo.png"]
    printed = command(*options, "--opts", "MODEL.WEIGHTS", tmp_path / "model.pth", "INPUT.MIN_SIZE_TEST", "128")
    assert "20 detections in an image of 160 x 128" in printed
    differences = dict(line.split() for line in printed.splitlines()[-4:])
    assert list(differences) == ["boxes", "scores", "classes", "masks"]
    assert all(float(difference) < 1e-3 for difference in differences.values())
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    for image in (make_image(128, 128), make_image(99, 160)):
        results = session.run(None, {"image": image.numpy()})
        assert_small([torch.from_numpy(r) for r in results], model, image)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--output", "model.onnx", "--opset", "18"], "--opset must be 19 or later, the first with DeformConv, got 18"),
        (["--output", "model.pt"], "--output must end in .onnx or .pt2, got model.pt"),
        (["--output", "model.pt2"], "MODEL.WEIGHTS must be given, those of a trained detector, got ''"),
    ],
)
def test_the_command_refuses(options, sentence, command, capsys):
    with pytest.raises(SystemExit) as error:
        command(*options)
    assert sentence in capsys.readouterr().err + str(error.value)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"], "Cascade"),
        (["MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.ROI_HEADS.NAME", "CascadeROIHeads",
          "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"], "CascadeROIHeads"),
        (["MODEL.META_ARCHITECTURE", "SemanticSegmentor"], "SemanticSegmentor"),
    ],
)  # fmt: skip
def test_other_models_are_refused(options, sentence):
    model = build_model(make_config(FASTER, *options))
    with pytest.raises(ValueError, match=f"Detector: model must .*got .*{sentence}"):
        export_detector(model)
