"""Where the stacked deformable layers sample the image (the sampling locations of section 2)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import DeformConv2d


@dataclass(frozen=True)
class SamplingRecord:
    """What one deformable layer sampled, for the first image of the batch.

    Attributes:
        name: the layer's name in the model.
        position (Tensor[G*K, 2, Ho, Wo]): (y, x) of every sample, in pixels of the layer's input.
        mask (Tensor[G*K, Ho, Wo]): its modulation; ones for a v1 layer.
        in_size: height and width of the layer's input.
        kernel_size: of the layer; K is its product.
    """

    name: str
    position: Tensor
    mask: Tensor
    in_size: tuple[int, int]
    kernel_size: tuple[int, int]


@contextmanager
def record_sampling(model: nn.Module) -> Iterator[list[SamplingRecord]]:
    """Records every deformable layer that runs inside the block, in that order; an empty batch leaves no record."""
    records: list[SamplingRecord] = []

    def recorder(name):
        @torch.no_grad()
        def hook(layer, inputs):
            x = inputs[0][:1]
            offset, mask = layer.predict(x)
            if len(x) == 0:
                return
            # In float32: half precision would move the grid of a large map.
            offset = offset[0].float().unflatten(0, (-1, 2))  # [G*K, 2, Ho, Wo]
            mask = torch.ones_like(offset[:, 0]) if mask is None else mask[0].float()
            position = regular_grid(layer, offset) + offset
            records.append(SamplingRecord(name, position, mask, tuple(x.shape[-2:]), layer.kernel_size))

        return hook

    handles = [
        layer.register_forward_pre_hook(recorder(name))
        for name, layer in model.named_modules()
        if isinstance(layer, DeformConv2d)
    ]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def strides(image_size: Sequence[int], map_size: Sequence[int]) -> Tensor:
    """Image pixels per pixel of a map, (vertical, horizontal): Tensor[2]. Cell i sits at image pixel i * stride."""
    return (torch.tensor(image_size) / torch.tensor(map_size)).round()


def regular_grid(layer: DeformConv2d, like: Tensor) -> Tensor:
    """(y, x) of the samples without offsets, in input pixels: Tensor[G*K, 2, Ho, Wo]."""
    axes = []
    for axis, outputs in enumerate(like.shape[-2:]):
        taps = torch.arange(layer.kernel_size[axis], device=like.device) * layer.dilation[axis] - layer.padding[axis]
        axes.append(taps[:, None] + torch.arange(outputs, device=like.device) * layer.stride[axis])
    ys, xs = axes  # [kh, Ho], [kw, Wo]
    shape = (len(ys), len(xs), like.shape[-2], like.shape[-1])
    grid = torch.stack([ys[:, None, :, None].expand(shape), xs[None, :, None, :].expand(shape)], dim=2)
    return grid.flatten(0, 1).repeat(layer.offset_groups, 1, 1, 1)


def sampling_points(
    records: list[SamplingRecord], node: tuple[float, float], image_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Follows a node of the last recorded layer down through all of them: every sample's samples, and so on.

    Args:
        records: the layers to go through, in forward order, such as the last three of record_sampling.
        node: (y, x) of the node, in image pixels.
        image_size: height and width of the tensor that went into the network, padding included.

    Returns:
        Tensor[P, 2]: (y, x) of the samples in image pixels, and Tensor[P]: the product of the modulations on the way.
        Samples that fall outside a layer's input count as zero and are left out.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("records must hold at least one deformable layer, got none")
    device = records[-1].position.device
    points = torch.tensor([node], dtype=torch.float32, device=device)
    weights = torch.ones(1, device=device)
    for record in reversed(records):
        out_size = torch.tensor(record.position.shape[-2:], device=device)
        in_size = torch.tensor(record.in_size, device=device)
        out_stride = strides(image_size, record.position.shape[-2:]).to(device)
        in_stride = strides(image_size, record.in_size).to(device)
        cell = (points / out_stride).round().long().clamp(min=torch.zeros_like(out_size), max=out_size - 1)
        position = record.position[:, :, cell[:, 0], cell[:, 1]].permute(2, 0, 1)  # [P, G*K, 2]
        weights = (weights[:, None] * record.mask[:, cell[:, 0], cell[:, 1]].T).flatten()
        points = position.flatten(0, 1)
        inside = ((points > -1) & (points < in_size)).all(dim=1)
        points, weights = points[inside] * in_stride, weights[inside]
    return points, weights
