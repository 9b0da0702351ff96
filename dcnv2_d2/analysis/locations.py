"""The effective sampling and bin locations of a node (Deformable ConvNets v2, section 2)."""

import copy
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn

from ..layers import DeformConv2d, DeformRoIPool
from .nodes import Respond, magnitude
from .sampling import regular_grid, strides

LAYERS = r"res[345]\."  # conv3 to conv5, the stages that the paper makes deformable


@dataclass(frozen=True)
class Locations:
    """Where one layer samples for a node.

    Attributes:
        name: the layer's name in the model.
        position (Tensor[P, 2]): (y, x) of the samples or, for RoI pooling, of the bins' centres, in image pixels;
            pixel centres have whole numbers.
        gradient (Tensor[P, 2]): of the norm of the node's response by the position (y, x), per image pixel.
        modulation (Tensor[P]): ones for layers that do not modulate.
        of_bins: whether the layer pools RoIs.
    """

    name: str
    position: Tensor
    gradient: Tensor
    modulation: Tensor
    of_bins: bool = False

    @property
    def strength(self) -> Tensor:
        """Tensor[P]: how strongly each location contributes, the norm of its gradient."""
        return self.gradient.norm(dim=1)


def effective_locations(respond: Respond, image: Tensor, model: nn.Module, layers: str = LAYERS) -> list[Locations]:
    """The locations of the stacked layers below a node, with the strength of their contributions.

    Deformable and regular layers are treated alike: a regular convolution is a deformable one without offsets, and so
    is RoIAlign. All bins are there, and the samples that feed the node: moving or modulating them changes it. At
    whole pixels, where all samples of a regular convolution are, bilinear interpolation has a kink; the derivative
    there is the one towards the next row and column.

    Args:
        respond, image: see effective_receptive_field.
        model: what respond runs. Its `backbone`, or it itself if it has none, takes the padded image.
        layers: a regular expression to be found in the names of convolutions larger than 1x1. The RoI pooler below the
            node is always among the results.

    Returns:
        One entry for each layer that feeds the node, in the order of running.

    Raises:
        ValueError: the response is zero, `layers` chooses no convolution, or one that cannot be deformable; or the RoI
            is pooled by something else than ROIAlignV2 or a deformable layer.
    """
    with torch.enable_grad(), _watch(model, layers) as seen:
        response = magnitude(respond(image.detach()[None].float()))
    gradients = torch.autograd.grad(
        response, [v for layer in seen for v in (layer.shift, layer.gain)], allow_unused=True
    )
    found = []
    for layer, by_shift, by_gain in zip(seen, gradients[::2], gradients[1::2], strict=True):
        if by_shift is None:  # it ran, but not below this node
            continue
        feeds = (by_shift != 0).any(dim=1) | (by_gain != 0) | layer.of_bins
        if feeds.any():
            position, gradient = (t.movedim(1, -1)[feeds] for t in (layer.position, by_shift / layer.unit))
            found.append(Locations(layer.name, position, gradient, layer.modulation[feeds], layer.of_bins))
    return found


@dataclass(frozen=True)
class _Seen:
    """A layer that ran, with the variables that move and modulate its samples."""

    name: str
    of_bins: bool
    position: Tensor  # [P, 2, H, W], image pixels
    modulation: Tensor  # [P, H, W]
    unit: Tensor  # image pixels per unit of the layer's offset, in y and x; [1 or P, 2, 1, 1]
    shift: Tensor  # zeros like position, in units of the offset
    gain: Tensor  # zeros like modulation

    @classmethod
    def create(cls, name, of_bins, position, modulation, unit):
        zeros = (torch.zeros_like(t, requires_grad=True) for t in (position, modulation))
        return cls(name, of_bins, position.detach(), modulation.detach(), unit, *zeros)


@contextmanager
def _watch(model: nn.Module, pattern: str) -> Iterator[list[_Seen]]:
    """Lets the chosen convolutions and the RoI poolers that run inside the block add themselves to a list."""
    modules = dict(model.named_modules())
    predictions = {id(m.conv_offset) for m in modules.values() if isinstance(m, DeformConv2d)}
    layers = {
        name: m
        for name, m in modules.items()
        if isinstance(m, nn.Conv2d)
        and id(m) not in predictions
        and m.kernel_size != (1, 1)
        and re.search(pattern, name)
    }
    if not layers:
        raise ValueError(f"layers must choose at least one convolution larger than 1x1 of the model, got {pattern!r}")
    for name, m in modules.items():
        if isinstance(m, ROIPooler):
            layers |= {f"{name}.level_poolers.{i}": layer for i, layer in enumerate(m.level_poolers)}
    seen: list[_Seen] = []
    image_size: list[int] = []

    def note_size(module, inputs):
        image_size[:] = inputs[0].shape[-2:]

    def spy_on(name, layer):
        def predict(x, *boxes):
            offset, mask = type(layer).predict(layer, x, *boxes)
            if boxes:
                return _see_bins(seen, name, layer, boxes[0], offset, mask)
            return _see_samples(seen, name, layer, x, image_size, offset, mask)

        layer.predict = predict  # hides the class's until it is deleted
        return layer

    def twin_of(name):
        return lambda layer, inputs, output: spy_on(name, _deformable_twin(layer, inputs[0]))(*inputs)

    network = getattr(model, "backbone", model)
    starts = {network, getattr(network, "bottom_up", network)}  # a backbone node may run the latter alone
    handles = [start.register_forward_pre_hook(note_size) for start in starts]
    deformable = {name: m for name, m in layers.items() if isinstance(m, (DeformConv2d, DeformRoIPool))}
    handles += [m.register_forward_hook(twin_of(name)) for name, m in layers.items() if name not in deformable]
    for name, layer in deformable.items():
        spy_on(name, layer)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for layer in deformable.values():
            del layer.predict


def _deformable_twin(layer: nn.Module, x: Tensor) -> nn.Module:
    """A new deformable layer, which has no offsets yet, that computes what a regular one does."""
    if isinstance(layer, nn.Conv2d):
        bare = copy.copy(layer)  # shares its parameters, but not the hooks that watch it, which from_conv refuses
        bare._forward_hooks, bare._forward_pre_hooks = OrderedDict(), OrderedDict()
        return DeformConv2d.from_conv(bare)
    if not (isinstance(layer, ROIAlign) and layer.aligned):
        kind = "ROIAlign with aligned=False" if isinstance(layer, ROIAlign) else type(layer).__name__
        raise ValueError(f"model: the pooler must be ROIAlignV2 or a deformable one for bins to be located, got {kind}")
    return DeformRoIPool(x.shape[1], layer.output_size, layer.spatial_scale, layer.sampling_ratio).to(x).eval()


def _see_samples(seen, name, layer, x, image_size, offset, mask):
    shape = offset.shape
    offset = offset[0].float().unflatten(0, (-1, 2))  # [G*K, 2, Ho, Wo]
    mask = torch.ones_like(offset[:, 0]) if mask is None else mask[0]
    unit = strides(image_size, x.shape[-2:]).to(offset)[None, :, None, None]
    entry = _Seen.create(name, False, (regular_grid(layer, offset) + offset) * unit, mask, unit)
    seen.append(entry)
    return (offset + entry.shift).reshape(shape), (mask + entry.gain)[None]


def _see_bins(seen, name, layer, boxes, offset, mask):
    if len(boxes) == 0:  # another level's
        return offset, mask
    mask = torch.ones_like(offset[:, :1]) if mask is None else mask
    sizes = (boxes[:, 3:] - boxes[:, 1:3])[..., None, None]  # x, y
    steps = [(torch.arange(n, device=boxes.device) + 0.5) / n for n in reversed(layer.output_size)]
    centres = torch.stack(torch.meshgrid(*steps, indexing="xy"))  # [2, Ph, Pw], x then y, parts of the RoI
    # Half a pixel less: boxes count from the corner of the image.
    position = boxes[:, 1:3, None, None] + sizes * (centres + layer.gamma * offset) - 0.5
    entry = _Seen.create(name, True, position.flip(1), mask[:, 0], layer.gamma * sizes.flip(1))
    seen.append(entry)
    return offset + entry.shift.flip(1), mask + entry.gain[:, None]
