"""Detectors as torch.export programs and ONNX files, for images of any size."""

import torch
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from torch.export import Dim, ExportedProgram

from .detector import Detector

__all__ = ["Detector", "export_detector", "export_onnx"]

MIN_SIZE, MAX_SIZE = 65, 4096  # pixels
MIN_OPSET = 19
MIN_TORCH = "2.8"


@torch.no_grad()
def export_detector(model: GeneralizedRCNN | RetinaNet) -> ExportedProgram:
    """Exports the tensor part of a RetinaNet, Faster or Mask R-CNN: from pixels Tensor[3, H, W] to Detector's results.

    H and W may be anything from 65 (RetinaNet: 129) to 4096. Save it with torch.export.save; to run a loaded one,
    dcnv2_d2.export must have been imported.

    Raises:
        ValueError: the model is another kind of detector.
        ImportError: PyTorch is older than 2.8, whose torch.export cannot follow a detector at any image size.
    """
    detector = Detector(model)
    if torch.__version__ < f"{MIN_TORCH}.0a0":
        raise ImportError(f"export_detector: torch must be {MIN_TORCH} or later, got {torch.__version__}")
    image = torch.zeros((3, 224, 320), device=model.device)
    least = max(MIN_SIZE, detector.coarsest_stride + 1)  # a map of a single cell would be a case of its own
    sizes = {1: Dim("height", min=least, max=MAX_SIZE), 2: Dim("width", min=least, max=MAX_SIZE)}
    return torch.export.export(detector, (image,), dynamic_shapes={"image": sizes}, strict=False)


def export_onnx(program: ExportedProgram, path: str, opset: int = MIN_OPSET) -> None:
    """Writes what export_detector made, or any other exported program with our operators, as ONNX.

    deform_conv2d becomes DeformConv, deform_roi_pool RoiAlign and arithmetic: the file has standard operators only.
    ONNX Runtime has DeformConv on the CPU from 1.25 on.

    Raises:
        ValueError: opset is below 19, the first with DeformConv.
        ImportError: onnxscript is not installed.
    """
    if opset < MIN_OPSET:
        raise ValueError(f"export_onnx: opset must be {MIN_OPSET} or later, the first with DeformConv, got {opset}")
    from .onnx import TRANSLATIONS

    torch.onnx.export(
        program,
        f=path,
        dynamo=True,
        opset_version=opset,
        custom_translation_table=TRANSLATIONS,
        output_names=_output_names(program),
        external_data=False,
        verbose=False,
    )


def _output_names(program):
    """Of a detector; another program keeps the names that PyTorch gives."""
    if not any(name.startswith("model.proposal_generator.") for name in program.state_dict):  # Detector's
        return None
    return ["boxes", "scores", "classes", "masks"][: len(program.graph_signature.user_outputs)]
