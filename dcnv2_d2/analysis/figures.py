"""The figure of section 2 of Deformable ConvNets v2: what nodes of several models see."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .nodes import BackboneNode
from .support import Support

ROWS = ("sampling locations", "effective receptive field", "saliency region")
PANEL = 1.75  # inches
DPI = 110
NODE = "#39ff14"


def draw_supports(path: Path, supports: dict[str, list[Support]]) -> None:
    """A block of columns for each model, a column for each node, and three rows.

    Strengths are drawn by their square root, relative to the strongest of the panel. Dots are the samples of all
    layers that were looked at; for RoI nodes, squares are the bins. The green cross or box is the node. What is not in
    the saliency region is grey.

    Args:
        supports: model -> the supports of its nodes.
    """
    widths = [len(nodes) for nodes in supports.values()]
    figure = Figure(figsize=(PANEL * sum(widths) + 0.4, PANEL * len(ROWS) + 0.7), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    blocks = figure.subfigures(1, len(supports), squeeze=False, width_ratios=widths)
    for block, (model, nodes) in zip(blocks.flat, supports.items(), strict=True):
        block.suptitle(model, fontsize=11, fontweight="bold")
        panels = block.subplots(len(ROWS), len(nodes), squeeze=False)
        for column, support in zip(panels.T, nodes, strict=True):
            column[0].set_title(support.title, fontsize=9)
            for axes, draw in zip(column, (_draw_locations, _draw_receptive_field, _draw_saliency), strict=True):
                draw(axes, support)
                _mark_node(axes, support.node)
                height, width = support.image.shape[:2]
                axes.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
                axes.spines[:].set_visible(False)
    for axes, name in zip(blocks[0, 0].axes[:: widths[0]], ROWS, strict=True):
        axes.set_ylabel(name, fontsize=9)
    figure.savefig(path, dpi=DPI)


def _draw_locations(axes, support: Support) -> None:
    axes.imshow(_grey(support.image, 0.5), vmin=0, vmax=1)
    bins = [layer for layer in support.locations if layer.of_bins]
    position, strength = (
        np.concatenate([getattr(layer, name).cpu().numpy() for layer in bins or support.locations])
        for name in ("position", "strength")
    )
    shade = _shade(strength)
    order = shade.argsort()  # the strongest on top
    style = {"marker": "s", "s": 16} if bins else {"marker": ".", "s": 4 + 20 * shade[order]}
    axes.scatter(
        position[order, 1], position[order, 0], c=shade[order], cmap="YlOrRd", vmin=0, vmax=1, linewidths=0, **style
    )


def _draw_receptive_field(axes, support: Support) -> None:
    shade = _shade(support.receptive_field.cpu().numpy())
    axes.imshow(_grey(support.image, 0.5), vmin=0, vmax=1)
    axes.imshow(shade, cmap="inferno", alpha=np.clip(2 * shade, 0, 1), vmin=0, vmax=1)


def _draw_saliency(axes, support: Support) -> None:
    region = support.saliency.mask.cpu().numpy()
    axes.imshow(np.where(region[..., None], support.image / 255, _grey(support.image, 0.25)))
    axes.set_xlabel(f"{support.saliency.area:.0%} of the image, error {support.saliency.error:.3f}", fontsize=7)


def _mark_node(axes, node) -> None:
    if isinstance(node, BackboneNode):
        axes.plot(node.x, node.y, "+", color=NODE, markersize=10, markeredgewidth=1.8)
    else:  # boxes count from the corner of the image, pictures from the middle of the first pixel
        corner, size = (node.x1 - 0.5, node.y1 - 0.5), (node.x2 - node.x1, node.y2 - node.y1)
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=NODE, linewidth=1.5))


def _shade(strength: np.ndarray) -> np.ndarray:
    return np.sqrt(strength / max(strength.max(initial=0), 1e-12))


def _grey(image: np.ndarray, light: float) -> np.ndarray:
    """Dark and colourless, so that colours on top of it are legible: [H, W, 3] of 0 to 1."""
    return (image.mean(axis=2, keepdims=True) * light / 255).repeat(3, axis=2)
