"""The figure of section 2 of Deformable ConvNets v2: what nodes of several models see."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torchvision.transforms.functional import gaussian_blur

from .nodes import BackboneNode, RoINode
from .support import Support

INSTRUMENTS = ("sampling locations", "effective receptive field", "saliency region")
PANEL = 1.7  # inches, its width; so are the rest
GAP, MODEL_GAP = 0.05, 0.2
LEFT, TOP, BOTTOM = 0.3, 0.45, 0.22
DPI = 90
NODE = "#39ff14"
DOTS, HEAT = "autumn_r", "hot"


def draw_supports(path: Path, supports: dict[str, list[Support]], rows: Sequence[str] = INSTRUMENTS) -> None:
    """A block of columns for each model, a column for each node, and a row for each instrument.

    Dots are the samples of all layers that were looked at or, for RoI nodes, squares are the bins. Strengths are drawn
    by their square root, relative to the strongest of the panel, the receptive field blurred by a pixel or so. What is
    not in the saliency region is dark. The green cross or box is the node.

    Args:
        supports: model -> the supports of its nodes; all images have the first one's aspect ratio.
        rows: of INSTRUMENTS.
    """
    draws = dict(zip(INSTRUMENTS, (_draw_locations, _draw_receptive_field, _draw_saliency), strict=True))
    first = next(iter(supports.values()))[0].image
    height = PANEL * first.shape[0] / first.shape[1]
    widths = [len(nodes) * (PANEL + GAP) + MODEL_GAP for nodes in supports.values()]
    size = np.array([LEFT + sum(widths) - MODEL_GAP, TOP + len(rows) * (height + GAP) + BOTTOM])
    figure = Figure(figsize=tuple(size), dpi=DPI)

    def place(x: float, y: float) -> tuple[float, float]:
        """Figure coordinates of a point in inches from the upper left corner."""
        return x / size[0], 1 - y / size[1]

    for (model, nodes), width, end in zip(supports.items(), widths, accumulate(widths), strict=True):
        start = LEFT + end - width
        figure.text(*place(start + (width - MODEL_GAP) / 2, 0.03), model, ha="center", va="top", weight="bold")
        for i, support in enumerate(nodes):
            x = start + i * (PANEL + GAP)
            figure.text(*place(x + PANEL / 2, TOP - 0.03), support.title, ha="center", va="bottom", size=8)
            for j, name in enumerate(rows):
                lower_left = place(x, TOP + j * (height + GAP) + height)
                axes = figure.add_axes((*lower_left, *([PANEL, height] / size)), xticks=[], yticks=[])
                draws[name](axes, support)
                _mark_node(axes, support.node)
                axes.set(xlim=(-0.5, support.image.shape[1] - 0.5), ylim=(support.image.shape[0] - 0.5, -0.5))
                axes.spines[:].set_visible(False)
            if rows[-1] == "saliency region":
                note = f"{support.saliency.area:.1%} of the image, error {support.saliency.error:.3f}"
                figure.text(*place(x + PANEL / 2, size[1] - BOTTOM + 0.02), note, ha="center", va="top", size=7)
    for j, name in enumerate(rows):
        figure.text(
            *place(LEFT / 2, TOP + j * (height + GAP) + height / 2), name, rotation=90, ha="center", va="center", size=8
        )
    figure.savefig(path, pil_kwargs={"optimize": True})


def _draw_locations(axes: Axes, support: Support) -> None:
    axes.imshow(_muted(support.image, 0.7))
    node = support.node
    layers = [layer for layer in support.locations if layer.of_bins or isinstance(node, BackboneNode)]
    position, strength = (
        np.concatenate([getattr(layer, name).cpu().numpy() for layer in layers]) for name in ("position", "strength")
    )
    shade = _shade(strength)
    order = shade.argsort()  # the strongest on top
    (y, x), shade = position[order].T, shade[order]
    if isinstance(node, RoINode):
        spacing = ((node.x2 - node.x1) * (node.y2 - node.y1) / len(x)) ** 0.5 * PANEL * 72 / support.image.shape[1]
        style: dict[str, Any] = {"s": min(0.8 * spacing, 4.5) ** 2, "marker": "s", "edgecolors": "k", "linewidths": 0.4}
    else:
        style = {"s": 2 + 16 * shade, "marker": "o", "alpha": shade, "linewidths": 0}
    axes.scatter(x, y, c=shade, cmap=DOTS, vmin=0, vmax=1, **style)


def _draw_receptive_field(axes: Axes, support: Support) -> None:
    axes.imshow(_muted(support.image, 0.7))
    field = support.receptive_field[None].cpu()
    side = 2 * (min(field.shape[-2:]) // 128) + 3
    shade = _shade(gaussian_blur(field, side)[0].numpy())
    axes.imshow(shade, cmap=HEAT, alpha=np.clip(1.5 * shade, 0, 1), vmin=0, vmax=1)


def _draw_saliency(axes: Axes, support: Support) -> None:
    region = support.saliency.mask.cpu().numpy()
    axes.imshow(np.where(region[..., None], support.image, _muted(support.image, 0.35)))


def _mark_node(axes: Axes, node: BackboneNode | RoINode) -> None:
    if isinstance(node, BackboneNode):
        axes.plot(node.x, node.y, "+", color=NODE, markersize=9, markeredgewidth=1.8)
    else:  # boxes count from the corner of the image, pictures from the middle of the first pixel
        corner = (node.x1 - 0.5, node.y1 - 0.5)
        axes.add_patch(
            Rectangle(corner, node.x2 - node.x1, node.y2 - node.y1, fill=False, edgecolor=NODE, linewidth=1.4)
        )


def _shade(strength: np.ndarray) -> np.ndarray:
    return np.sqrt(strength / max(strength.max(initial=0), 1e-12))


def _muted(image: np.ndarray, light: float) -> np.ndarray:
    """Darker and less colourful, so that what is drawn on top of it is legible: uint8 [H, W, 3]."""
    grey = image.mean(axis=2, keepdims=True)
    return (light * (grey + image) / 2).astype(np.uint8)
