"""Effective dilation, the measure of Deformable ConvNets v1: how far apart the samples of a filter are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import BoxMode
from tabulate import tabulate
from torch import Tensor

from .nodes import Model, evaluation, preprocess
from .sampling import SamplingRecord, record_sampling, strides

CLASSES = ("small", "medium", "large", "background")
AREAS = (32**2, 96**2)  # COCO's bounds of small and medium


@dataclass(frozen=True)
class DilationTable:
    """Effective dilations of the deformable layers of a model over a data set.

    Attributes:
        layers: names, in the order of running.
        mean, std (Tensor[layers, 4]): over the filters of each of CLASSES, in pixels of the layer's input.
        count (Tensor[layers, 4]): of filters: output positions, times offset groups.
    """

    layers: list[str]
    mean: Tensor
    std: Tensor
    count: Tensor

    def __str__(self) -> str:
        """A Markdown table, mean ± standard deviation."""
        rows = [
            [name] + [f"{m:.2f} ± {s:.2f}" if n else "" for m, s, n in zip(*stats, strict=True)]
            for name, *stats in zip(self.layers, self.mean, self.std, self.count, strict=True)
        ]
        return tabulate(rows, ["layer", *CLASSES], tablefmt="github")


def effective_dilation(model: Model, inputs: Iterable[dict], areas: Sequence[float] = AREAS) -> DilationTable:
    """Measures the deformable layers of a model's backbone on annotated images.

    A filter belongs to the class of the box that its centre is in, of the smallest one if there are several, or to the
    background. A box's class is that of its area.

    Args:
        model: a Detectron2 model with a backbone.
        inputs: what the model takes for each image, with "height", "width" and "annotations" of the original image, as
            Detectron2's data set dictionaries have them; crowds do not count.
        areas: of the largest small and the largest medium box, in pixels of the original image.

    Raises:
        ValueError: no deformable layer ran, or there are no images.
    """
    layers: dict[str, Tensor] = {}  # sums of 1, dilation and its square: [3, 4]
    for record in inputs:
        with torch.no_grad(), evaluation(model), record_sampling(model.backbone) as samplings:
            images = preprocess(model, record["image"][None])
            model.backbone(images.tensor)
        for sampling in samplings:
            classes = _classes_of_filters(sampling, record, images.tensor.shape[-2:], areas)
            distance = filter_dilation(sampling).double()  # [G, Ho, Wo]
            distance = distance[:, : classes.shape[0], : classes.shape[1]]  # filters in the padding do not count
            classes = classes.to(distance.device).expand(distance.shape).flatten()
            sums = layers.setdefault(sampling.name, distance.new_zeros(3, len(CLASSES)))
            for i in range(3):
                sums[i].index_add_(0, classes, distance.flatten() ** i)
    if not layers:
        raise ValueError(
            "effective_dilation: model must have deformable layers in its backbone and inputs at least one image; the "
            "effective dilation of a regular convolution is its dilation"
        )
    count, total, squares = torch.stack(list(layers.values())).cpu().unbind(1)
    mean = total / count
    std = (squares / count - mean**2).clamp(min=0).sqrt()
    return DilationTable(list(layers), mean, std, count.long())


def filter_dilation(record: SamplingRecord) -> Tensor:
    """The mean distance between samples that are neighbours in the kernel: Tensor[G, Ho, Wo], NaN for a 1x1 kernel."""
    position = record.position.unflatten(0, (-1, *record.kernel_size))  # [G, kh, kw, 2, Ho, Wo]
    distances = [position.diff(dim=dim).norm(dim=3).flatten(1, 2) for dim in (1, 2)]
    return torch.cat(distances, dim=1).mean(dim=1)


def _classes_of_filters(
    record: SamplingRecord, inputs: dict, padded_size: Sequence[int], areas: Sequence[float]
) -> Tensor:
    """The index into CLASSES of each output position of a layer that is in the image: Tensor[h, w]."""
    step = strides(padded_size, record.position.shape[-2:]).int().tolist()
    resized = inputs["image"].shape[-2:]
    shape = tuple(min(n, -(-size // s)) for n, size, s in zip(record.position.shape[-2:], resized, step, strict=True))
    # Centres of the filters as points of the original image; pixel i reaches from i to i + 1.
    ys, xs = (
        (torch.arange(n) * s + 0.5) * original / new
        for n, s, original, new in zip(shape, step, (inputs["height"], inputs["width"]), resized, strict=True)
    )
    classes = torch.full(shape, CLASSES.index("background"))
    boxes = [
        BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
        for a in inputs["annotations"]
        if not a.get("iscrowd", 0)
    ]
    size = {tuple(box): (box[2] - box[0]) * (box[3] - box[1]) for box in boxes}
    for (x1, y1, x2, y2), area in sorted(size.items(), key=lambda item: -item[1]):  # the smallest box last
        inside = ((ys >= y1) & (ys < y2))[:, None] & ((xs >= x1) & (xs < x2))
        classes[inside] = sum(area > bound for bound in areas)
    return classes
