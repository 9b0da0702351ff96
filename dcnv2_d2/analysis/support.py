"""All measurements of one node, from which the figures of section 2 are drawn."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data.detection_utils import convert_image_to_rgb
from torch import Tensor

from .locations import LAYERS, Locations, effective_locations
from .nodes import BackboneNode, Model, RoINode, evaluation
from .receptive_field import effective_receptive_field
from .saliency import SaliencyRegion, saliency_region


@dataclass(frozen=True)
class Support:
    """The support of a node in an image.

    Attributes:
        node: the node that was measured.
        title: for figures.
        image (uint8 array[H, W, 3]): RGB.
        locations, receptive_field, saliency: what effective_locations, effective_receptive_field and saliency_region
            found.
    """

    node: BackboneNode | RoINode
    title: str
    image: np.ndarray
    locations: list[Locations]
    receptive_field: Tensor
    saliency: SaliencyRegion

    def save(self, path: Path) -> None:
        """Writes the raw arrays, in the units of the instruments, as an npz file.

        `node` is (x, y) or (x1, y1, x2, y2); `saliency` the mask, beside `saliency_error`, `saliency_bound` and
        `saliency_cell`; each layer has `<name>/position`, `<name>/gradient` (rows y, x) and `<name>/modulation`.
        """
        node = self.node
        arrays: dict[str, Any] = {
            "image": self.image,
            "node": [node.x, node.y] if isinstance(node, BackboneNode) else [node.x1, node.y1, node.x2, node.y2],
            "receptive_field": self.receptive_field.cpu().numpy(),
            "saliency": self.saliency.mask.cpu().numpy(),
            "saliency_error": self.saliency.error,
            "saliency_bound": self.saliency.bound,
            "saliency_cell": self.saliency.cell,
        }
        for layer in self.locations:
            for name in ("position", "gradient", "modulation"):
                arrays[f"{layer.name}/{name}"] = getattr(layer, name).cpu().numpy()
        np.savez_compressed(path, **arrays)


def find_support(
    model: Model, image: Tensor, node: BackboneNode | RoINode, title: str = "", *, layers: str = LAYERS, **search: Any
) -> Support:
    """Measures a node with all three instruments.

    Args:
        model: a Detectron2 model.
        image (Tensor[3, H, W]): as the model takes it: intensity 0 to 255, resized, in its channel order.
        node: BackboneNode or RoINode.
        title: for figures.
        layers: see effective_locations.
        search: options of saliency_region. Masked pixels have the model's mean colour.

    Raises:
        ValueError: see the instruments and the nodes.
    """
    respond = partial(node.respond, model)
    image = image.to(model.device)
    return Support(
        node,
        title,
        convert_image_to_rgb(image.permute(1, 2, 0), model.input_format),
        effective_locations(respond, image, model, layers),
        effective_receptive_field(respond, image),
        saliency_region(respond, image, model.pixel_mean, **search),
    )


@torch.no_grad()
def choose_nodes(model: Model, image: Tensor, score: float = 0.5) -> dict[str, tuple[BackboneNode, RoINode]]:
    """Nodes on a small object, a large object and the background, by the model's own detections.

    Args:
        model, image: see find_support.
        score: least score of an object.

    Returns:
        For "small object" (of the smallest box), "large object" (of the largest; with one detection there is only this)
        and "background" (the largest square free of boxes, those of any score), a node at the object's or square's
        middle and one of its box. The middle of a mask is its pixel nearest to its centre of mass.

    Raises:
        ValueError: nothing is detected.
    """
    height, width = image.shape[-2:]
    with evaluation(model):
        detections = model([{"image": image, "height": height, "width": width}])[0]["instances"]
    found = detections[detections.scores >= score]
    if len(found) == 0:
        raise ValueError(f"choose_nodes: the model must detect something of a score of at least {score}, got nothing")
    boxes = found.pred_boxes.tensor.cpu()
    order = found.pred_boxes.area().cpu().argsort(stable=True).tolist()
    chosen = {"small object": order[0], "large object": order[-1]} if len(order) > 1 else {"large object": order[0]}
    nodes = {}
    for name, i in chosen.items():
        x, y = _middle(boxes[i], found.pred_masks[i].cpu() if found.has("pred_masks") else None)
        nodes[name] = BackboneNode(x, y), RoINode(*boxes[i].tolist())
    x, y, half = _background(detections.pred_boxes.tensor.cpu(), height, width)
    nodes["background"] = BackboneNode(x, y), RoINode(x - half, y - half, x + half, y + half)
    return nodes


def _middle(box: Tensor, mask: Tensor | None) -> tuple[float, float]:
    if mask is None or not mask.any():
        return tuple(((box[:2] + box[2:]) / 2).tolist())
    pixels = mask.nonzero().float()
    y, x = pixels[(pixels - pixels.mean(dim=0)).norm(dim=1).argmin()].tolist()
    return x, y


def _background(boxes: Tensor, height: int, width: int) -> tuple[float, float, float]:
    """(x, y, half the side) of the largest square that touches neither a box nor the border."""
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    free = torch.stack([xs, ys, width - xs, height - ys]).amin(dim=0).float()
    for x1, y1, x2, y2 in boxes:
        free = free.minimum(torch.stack([x1 - xs, xs - x2, y1 - ys, ys - y2]).amax(dim=0))
    y, x = divmod(free.argmax().item(), width)
    return float(x), float(y), max(free.max().item(), 1.0)
