"""Whole R-CNNs, exported once, against themselves at several image sizes."""

import onnxruntime
import pytest
import torch
from dcnv2_d2.export import export_detector, export_onnx
from dcnv2_d2.layers import DeformConv2d, ModulatedDeformRoIPool
from models import FASTER, MASK, make_model

HEADS = [
    *("MODEL.ROI_HEADS.NUM_CLASSES", "5", "MODEL.ROI_BOX_HEAD.FC_DIM", "64", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "60"),
]
MDPOOL = [
    *("MODEL.ROI_HEADS.NAME", "DCNv2ROIHeads", "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ModulatedDeformRoIPool"),
    *("MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ModulatedDeformRoIPool", "MODEL.DCNV2.MDPOOL_FC_DIMS", "[64, 64]"),
]
MODELS = {"faster mdconv": (FASTER, []), "mask mdconv mdpool": (MASK, MDPOOL)}
SIZES = [(96, 131), (200, 150), (65, 66)]  # the second has more anchors on p2 than RPN.PRE_NMS_TOPK_TEST, the last none


@pytest.fixture(scope="module", params=MODELS)
def exported(request):
    """A model and its program."""
    torch.manual_seed(0)
    config, options = MODELS[request.param]
    model = make_model(config, *HEADS, *options)
    assert sum(isinstance(m, DeformConv2d) for m in model.modules()) == 13
    assert sum(isinstance(m, ModulatedDeformRoIPool) for m in model.modules()) == (8 if options else 0)
    return model, export_detector(model)


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


def test_program(exported, tmp_path):
    model, program = exported
    torch.export.save(program, tmp_path / "detector.pt2")
    module = torch.export.load(tmp_path / "detector.pt2").module()
    for size in SIZES:
        image = make_image(*size)
        with torch.no_grad():
            assert_same(module(image), raw(model, image), 1e-5)


def test_onnx_runtime(exported, tmp_path):
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
