"""NMS as an operator of our own: the shape rule of torchvision's assumes that at least two boxes are kept."""

import torch
from detectron2 import layers
from torch import Tensor


@torch.library.custom_op("dcnv2_d2::batched_nms", mutates_args=())
def batched_nms(boxes: Tensor, scores: Tensor, classes: Tensor, num_classes: int, iou_threshold: float) -> Tensor:
    """Detectron2's batched_nms.

    Args:
        boxes (Tensor[R, 4]), scores (Tensor[R]), classes (Tensor[R]): only boxes of the same class suppress each other.
        num_classes: classes are below it; ONNX needs to know.
        iou_threshold: boxes that overlap more with a better one are left out.

    Returns:
        Tensor[K]: the indices of those that stay, best first.
    """
    return layers.batched_nms(boxes, scores, classes, iou_threshold)


@batched_nms.register_fake
def _(boxes, scores, classes, num_classes, iou_threshold):
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(min=0), dtype=torch.int64)
