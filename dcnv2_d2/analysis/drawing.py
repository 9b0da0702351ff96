"""Figures, drawn with Detectron2's Visualizer and matplotlib without a display."""

import json
import re
from pathlib import Path

import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

PANEL = 3.2  # inches


def _panels(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(PANEL * columns, PANEL * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _show(axes: Axes, image: np.ndarray, title: str) -> None:
    axes.imshow(image)
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def draw_predictions(path: Path, samples: list[tuple[np.ndarray, dict, Instances]], metadata: Metadata) -> None:
    """Pairs of pictures: predictions beside ground truth.

    Args:
        samples: per image, the image [H, W, 3] in RGB, its Detectron2 data set record, the predicted Instances.
        metadata: the data set's, for class names.
    """
    columns = 2  # pairs
    figure, axes = _panels(-(-len(samples) // columns), 2 * columns)
    for a in axes.flat:
        a.set_axis_off()
    for i, (image, record, instances) in enumerate(samples):
        scale = max(1.0, 400 / max(image.shape[:2]))  # small images leave no room for labels
        row, column = divmod(i, columns)
        predicted = Visualizer(image, metadata, scale=scale).draw_instance_predictions(instances.to("cpu"))
        truth = Visualizer(image, metadata, scale=scale).draw_dataset_dict(record)
        _show(axes[row, 2 * column], predicted.get_image(), "predictions")
        _show(axes[row, 2 * column + 1], truth.get_image(), "ground truth")
    figure.savefig(path, dpi=110)


def draw_sampling(path: Path, samples: list[tuple[np.ndarray, str, tuple[float, float], Tensor, Tensor]]) -> None:
    """Sampling points of nodes, coloured by modulation; the node is a green cross.

    Args:
        samples: per node, the image [H, W, 3] in RGB, a title, the node's (y, x), the points [P, 2] as (y, x) and their
            modulation [P], all in pixels of that image.
    """
    columns = min(len(samples), 3)
    figure, axes = _panels(-(-len(samples) // columns), columns)
    for a in axes.flat:
        a.set_axis_off()
    for a, (image, title, node, points, modulation) in zip(axes.flat, samples, strict=False):
        _show(a, image, title)
        order = modulation.argsort()  # the strongest on top
        (y, x), shade = points[order].T.cpu(), modulation[order].cpu()
        dots = a.scatter(x, y, c=shade, s=5, cmap="autumn_r", linewidths=0)
        a.plot(node[1], node[0], "+", color="lime", markersize=12, markeredgewidth=2)
        a.set_xlim(-0.5, image.shape[1] - 0.5)
        a.set_ylim(image.shape[0] - 0.5, -0.5)
        figure.colorbar(dots, ax=a, shrink=0.7, label="modulation")
    figure.savefig(path, dpi=110)


def draw_curves(path: Path, metrics_file: Path) -> None:
    """Losses, average precision and the deformable layers' statistics over the iterations of a training run.

    Args:
        metrics_file: what Detectron2's JSONWriter wrote, metrics.json. Of an iteration that a resumed run repeated, the
            last line counts.
    """
    lines: dict[int, dict] = {}
    for line in metrics_file.read_text().splitlines():
        entry = json.loads(line)
        lines.setdefault(entry["iteration"], {}).update(entry)
    series: dict[str, list] = {}
    for iteration, entry in sorted(lines.items()):
        for name, value in entry.items():
            series.setdefault(name, []).append((iteration, value))

    precision = "average precision"
    groups = {
        "loss": lambda name: "loss" in name,
        "mimicking, mean cosine of foreground RoIs": lambda name: name == "mimic/cosine_fg",
        precision: lambda name: name.rsplit("/", 1)[-1] in ("AP", "AP50"),
        "mean |offset|, input pixels": lambda name: name.endswith("/offset_mean") and "pooler" not in name,
        "mean |offset|, RoI sizes": lambda name: name.endswith("/offset_mean") and "pooler" in name,
        "mean modulation": lambda name: name.endswith("/mask_mean"),
    }
    of_crops = re.compile("mimic/.*/")  # the layers' statistics of the crops that mimicking makes
    names = [name for name in series if not of_crops.match(name)]
    names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    chosen = {title: list(filter(test, names)) for title, test in groups.items()}
    chosen = {title: names for title, names in chosen.items() if names}
    figure, axes = _panels(1, max(len(chosen), 1))
    figure.set_size_inches(4.5 * max(len(chosen), 1), 4.5)
    for a, (title, names) in zip(axes.flat, chosen.items(), strict=False):
        a.set_title(title)
        if title == precision and all(len(series[name]) == 1 for name in names):  # a single evaluation
            a.bar_label(a.barh(names, [series[name][0][1] for name in names]), fmt="%.1f", padding=3)
            a.margins(x=0.15)
            a.invert_yaxis()
            continue
        count = len(names)
        palette = colormaps["tab10" if count <= 10 else "tab20" if count <= 20 else "turbo"]
        places = range(count) if count <= 20 else np.linspace(0, 1, count)  # of a list of colours, of a scale
        a.set_prop_cycle(color=[palette(place) for place in places])
        for name in names:
            label = name.removesuffix("/offset_mean").removesuffix("/mask_mean")
            a.plot(*zip(*series[name], strict=True), label=label, marker="." if len(series[name]) < 3 else None)
        a.set_xlabel("iteration")
        a.grid(alpha=0.3)
        a.legend(fontsize=6, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(path, dpi=110)
