"""Figures 6 and 7 of Deformable ConvNets v1: samples of stacked layers, and bins of position-sensitive RoI pooling."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..layers import DeformPSRoIPool
from ..modeling.rfcn import RFCNROIHeads
from .nodes import BackboneNode, Model, evaluation, preprocess
from .sampling import record_sampling, sampling_points

LEVELS = 3  # of stacked layers: 9, 81, 729 samples for 3x3 kernels
PANEL = 3.2  # inches
NODE, PLAIN, MOVED = "#39ff14", "yellow", "red"


@torch.no_grad()
def stacked_samples(model: Model, image: Tensor, nodes: dict[str, BackboneNode]) -> dict[str, Tensor]:
    """The samples of the last three deformable layers of a backbone below each node, as in Figure 6.

    Args:
        model: a Detectron2 model.
        image (Tensor[3, H, W]): as the model takes it.
        nodes: title -> node.

    Returns:
        Tensor[P, 2] of each: (y, x) in image pixels; those outside a layer's input are left out.

    Raises:
        ValueError: no deformable layer ran.
    """
    with evaluation(model), record_sampling(model.backbone) as records:
        padded = preprocess(model, image[None].to(model.device)).tensor
        model.backbone(padded)
    if not records:
        raise ValueError("stacked_samples: model must have deformable layers in its backbone, got none")
    size = tuple(padded.shape[-2:])
    return {title: sampling_points(records[-LEVELS:], (n.y, n.x), size)[0].cpu() for title, n in nodes.items()}


@torch.no_grad()
def position_sensitive_bins(model: Model, image: Tensor, boxes: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Where R-FCN pools the scores of the classes of RoIs from, without its offsets and with them, as in Figure 7.

    Args:
        model: a Detectron2 model with RFCNROIHeads.
        image (Tensor[3, H, W]): as the model takes it.
        boxes (Tensor[K, 4]): RoIs, in image pixels.
        classes (Tensor[K]): of each RoI, C for the background.

    Returns:
        Tensor[K, bins**2, 4] of both: x1, y1, x2, y2 of the bins, row by row, in image pixels.

    Raises:
        ValueError: the model has other RoI heads, or a class is none of its own.
    """
    heads = getattr(model, "roi_heads", None)
    if not isinstance(heads, RFCNROIHeads):
        raise ValueError(f"position_sensitive_bins: model must have RFCNROIHeads, got {type(heads).__name__}")
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) <= heads.num_classes:
        raise ValueError(
            f"position_sensitive_bins: classes must be from 0 to {heads.num_classes}, got {classes.tolist()}"
        )
    pooler, boxes = heads.cls_pooler, boxes.to(model.device, torch.float32)
    bins, count = pooler.bins, len(boxes)
    # As the operator has it: whole pixels, halves away from zero, and the far one included
    corners = boxes.sign() * (boxes.abs() + 0.5).floor()
    near, size = corners[:, :2], corners[:, 2:] + 1 - corners[:, :2]
    steps = torch.arange(bins, device=boxes.device) / bins
    ys, xs = torch.meshgrid(steps, steps, indexing="ij")
    plain = near[:, None] + torch.stack([xs, ys], dim=2).flatten(0, 1) * size[:, None]  # [K, bins**2, 2]
    moved = plain
    if isinstance(pooler, DeformPSRoIPool):
        with evaluation(model):
            features = model.backbone(preprocess(model, image[None].to(model.device)).tensor)
            offset = pooler.predict(heads.conv_new_1(features[heads.in_feature]), [boxes])
        own = offset.view(count, -1, 2, bins * bins)[torch.arange(count), classes.to(offset.device)]
        moved = plain + pooler.gamma * own.transpose(1, 2) * size[:, None]
    before, after = (torch.cat([p, p + size[:, None] / bins], dim=2).cpu() for p in (plain, moved))
    return before, after


def draw_samples(path: Path, image: np.ndarray, nodes: dict[str, BackboneNode], samples: dict[str, Tensor]) -> None:
    """A panel for each node (green) with its samples (red).

    Args:
        image (uint8 array[H, W, 3]): RGB.
        nodes, samples: see stacked_samples.
    """
    figure, panels = _panels(image, len(nodes))
    for axes, (title, node) in zip(panels, nodes.items(), strict=True):
        points = samples[title].numpy()
        axes.set_title(f"{title}: {len(points)} samples", fontsize=9)
        axes.plot(points[:, 1], points[:, 0], ".", color=MOVED, markersize=3, markeredgewidth=0)
        axes.plot(node.x, node.y, "o", color=NODE, markersize=7)
    figure.savefig(path, dpi=100)


def draw_bins(path: Path, image: np.ndarray, titles: list[str], plain: Tensor, moved: Tensor) -> None:
    """A panel for each RoI: its bins without offsets (yellow) and with them (red).

    Args:
        image (uint8 array[H, W, 3]): RGB.
        titles: of the RoIs.
        plain, moved: see position_sensitive_bins.
    """
    figure, panels = _panels(image, len(titles))
    for axes, title, *bins in zip(panels, titles, plain.tolist(), moved.tolist(), strict=True):
        axes.set_title(title, fontsize=9)
        for color, width, of_color in zip((PLAIN, MOVED), (0.8, 1.2), bins, strict=True):
            for x1, y1, x2, y2 in of_color:
                # Boxes count from the corner of the image, pixels of the picture from their centres.
                corner = (x1 - 0.5, y1 - 0.5)
                axes.add_patch(Rectangle(corner, x2 - x1, y2 - y1, fill=False, color=color, linewidth=width))
    figure.savefig(path, dpi=100)


def _panels(image: np.ndarray, count: int) -> Any:
    height = PANEL * image.shape[0] / image.shape[1] + 0.3
    figure = Figure(figsize=(PANEL * count, height), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes in panels:
        axes.imshow(image)
        axes.set_axis_off()
        axes.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
    return figure, panels
