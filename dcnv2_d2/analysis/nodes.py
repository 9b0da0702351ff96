"""Nodes of a network, and what they respond to an image (Deformable ConvNets v2, section 2)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from detectron2.modeling import GeneralizedRCNN, RetinaNet, SemanticSegmentor
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from .sampling import strides

# These have no base class of their own; any other model with backbone, device, pixel_mean and preprocess_image will do.
Model: TypeAlias = GeneralizedRCNN | RetinaNet | SemanticSegmentor
Respond = Callable[[Tensor], Tensor]  # images Tensor[N, 3, H, W] -> responses Tensor[N, D]


@dataclass(frozen=True)
class BackboneNode:
    """The channel vector at one position of a feature map.

    Attributes:
        x, y: in image pixels; cell i of a map of stride s sits at pixel i * s, and the nearest cell is the node.
        feature: a map of the backbone or of the ResNet in it; by default the ResNet's last one, conv5.
    """

    x: float
    y: float
    feature: str | None = None

    def respond(self, model: Model, images: Tensor) -> Tensor:
        """
        Args:
            model: a Detectron2 model; it runs in evaluation mode, and is left in the modes it was in.
            images (Tensor[N, 3, H, W]): of intensity 0 to 255, in the model's channel order.

        Returns:
            Tensor[N, C]: the node's response to each image.

        Raises:
            ValueError: the position is outside the image, or there is no such map.
        """
        height, width = images.shape[-2:]
        if not (-0.5 <= self.x <= width - 0.5 and -0.5 <= self.y <= height - 0.5):
            raise ValueError(f"BackboneNode: x, y must be in the image ({width} x {height}), got {self.x}, {self.y}")
        with evaluation(model):
            padded = preprocess(model, images).tensor
            body: nn.Module = getattr(model.backbone, "bottom_up", model.backbone)
            features = body(padded)
            if self.feature is not None and self.feature not in features:
                features = model.backbone(padded)
        feature = next(reversed(features)) if self.feature is None else self.feature
        if feature not in features:
            raise ValueError(f"BackboneNode: feature must be one of {', '.join(features)}, got {feature!r}")
        cells = features[feature].shape[-2:]
        nearest = (torch.tensor([self.y, self.x]) / strides(padded.shape[-2:], cells)).round().long()
        row, column = (min(max(i, 0), n - 1) for i, n in zip(nearest.tolist(), cells, strict=True))
        return features[feature][:, :, row, column]


@dataclass(frozen=True)
class RoINode:
    """The box head's features of one RoI, which classification and regression use; of a cascade, the first stage's.

    Attributes:
        x1, y1, x2, y2: the RoI, in image pixels; it is clipped to the image, as the detector clips its proposals.
    """

    x1: float
    y1: float
    x2: float
    y2: float

    def respond(self, model: Model, images: Tensor) -> Tensor:
        """As BackboneNode.respond.

        Raises:
            ValueError: nothing of the box is in the image, or the model has no box head.
        """
        box = self.clipped(images.shape[-2:])
        predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
        if predictor is None:
            raise ValueError(
                f"RoINode: model must have roi_heads with a box_predictor, got {type(model).__name__}; "
                "take a BackboneNode"
            )
        with evaluation(model):
            inputs = preprocess(model, images)
            features = model.backbone(inputs.tensor)
            boxes = [Boxes(inputs.tensor.new_tensor([box])) for _ in inputs.image_sizes]
            proposals = [
                Instances(size, proposal_boxes=b, objectness_logits=b.tensor.new_zeros(1))
                for size, b in zip(inputs.image_sizes, boxes, strict=True)
            ]
            first = predictor[0] if isinstance(predictor, nn.ModuleList) else predictor
            # Each kind of RoI heads calls its predictor differently; what follows is not needed.
            handle = first.register_forward_pre_hook(_stop)
            try:
                model.roi_heads(inputs, features, proposals)
            except _Reached as reached:
                return reached.response.flatten(1)
            finally:
                handle.remove()
        raise RuntimeError("RoINode: the RoI heads did not run their box_predictor")

    def clipped(self, image_size: Sequence[int]) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2) of the part that is in an image of (height, width)."""
        height, width = image_size
        x1, x2 = max(self.x1, 0.0), min(self.x2, float(width))
        y1, y2 = max(self.y1, 0.0), min(self.y2, float(height))
        if not (x1 < x2 and y1 < y2):
            raise ValueError(
                f"RoINode: box x1, y1, x2, y2 must overlap the image ({width} x {height}), "
                f"got {self.x1}, {self.y1}, {self.x2}, {self.y2}"
            )
        return x1, y1, x2, y2


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a block, as batch norm must not mix images; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def magnitude(response: Tensor) -> Tensor:
    """The norm of a node's response Tensor[1, D], whose gradient stands for the node's.

    Raises:
        ValueError: it is zero, or not finite: there is no gradient to look at.
    """
    norm = torch.linalg.vector_norm(response.float())
    if not 0 < norm.item() < float("inf"):
        raise ValueError(
            f"response: the node's response must have a norm above 0, got {norm.item()}; take another node"
        )
    return norm


class _Reached(Exception):
    def __init__(self, response: Tensor):
        self.response = response


def _stop(module, inputs):
    raise _Reached(inputs[0])


def preprocess(model: Model, images: Tensor) -> ImageList:
    """Images of intensity 0 to 255, Tensor[N, 3, H, W], as the backbone takes them: normalised and padded."""
    return model.preprocess_image([{"image": image} for image in images])
