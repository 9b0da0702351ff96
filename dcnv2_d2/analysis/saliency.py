"""The error-bounded saliency region of a node (Deformable ConvNets v2, section 2)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from .nodes import Respond, magnitude

BOUND = 0.1
LEVELS = 4
# Images in a batch round differently from one by itself: the search stays that much below the bound.
_MARGIN = 1 - 1e-3


@dataclass(frozen=True)
class SaliencyRegion:
    """A region whose response differs from the whole image's by less than a bound.

    Attributes:
        mask (bool Tensor[H, W]): the region.
        error: |response to the region - response to the image| / |response to the image|, measured on the mask alone.
        bound: what the error had to stay below.
        cell: side of the finest cells, in pixels.
        evaluations: images that the network ran on.
    """

    mask: Tensor
    error: float
    bound: float
    cell: int
    evaluations: int

    @property
    def area(self) -> float:
        """The region's part of the image, 0 to 1."""
        return self.mask.float().mean().item()


def saliency_region(
    respond: Respond,
    image: Tensor,
    fill: Tensor,
    *,
    bound: float = BOUND,
    cell: int | None = None,
    levels: int = LEVELS,
    batch_size: int = 16,
    progress: bool = False,
) -> SaliencyRegion:
    """Looks for the smallest region that gives the same response as the image, up to a relative error.

    A greedy search: it masks square cells, first coarse ones, then of half the side, and so on. In each round it
    measures the error that masking each remaining cell alone would add up to, and masks as many of them, the least
    important first, as stay below the bound together. The region found meets the bound; a smaller one may exist.

    Args:
        respond, image: see effective_receptive_field.
        fill (Tensor[3, 1, 1]): the colour of masked pixels, such as the model's pixel_mean.
        bound: of the relative error.
        cell: side of the finest cells, in pixels; by default the power of two nearest to 1/32 of the shorter side.
        levels: cells start at a side of cell * 2**(levels - 1).
        batch_size: images that respond is given at once.
        progress: whether to show a progress bar.

    Raises:
        ValueError: bound, cell, levels or batch_size is out of range, or the response to the image is zero.
    """
    if cell is None:
        cell = 2 ** max(round(torch.tensor(min(image.shape[-2:]) / 32).log2().item()), 0)
    for name, value in (("cell", cell), ("levels", levels), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"saliency_region: {name} must be at least 1, got {value}")
    if not 0 < bound < 1:
        raise ValueError(f"saliency_region: bound must be between 0 and 1, got {bound}")
    with torch.no_grad(), tqdm(desc="saliency", unit="image", disable=not progress, leave=False) as bar:
        search = _Search(respond, image.float(), fill, batch_size, bar)
        size = cell * 2 ** (levels - 1)
        kept = torch.ones([-(-side // size) for side in image.shape[-2:]], dtype=torch.bool, device=image.device)
        for level in range(levels):
            if level:
                size //= 2
                rows, columns = (-(-side // size) for side in image.shape[-2:])
                kept = kept.repeat_interleave(2, 0)[:rows].repeat_interleave(2, 1)[:, :columns]
            bar.set_description(f"saliency, {kept.float().mean():.0%} left, cells of {size} px")
            kept = search.shrink(kept, size, bound * _MARGIN)
        mask = search.pixels(kept, size)
        (error,) = search.errors(kept[None], size).tolist()
    return SaliencyRegion(mask, error, bound, cell, search.evaluations)


class _Search:
    def __init__(self, respond, image, fill, batch_size, bar):
        self.respond, self.image, self.batch_size, self.bar = respond, image, batch_size, bar
        self.fill = fill.to(image)
        self.target = respond(image[None]).float()
        self.norm = magnitude(self.target)
        self.evaluations = 1

    def pixels(self, kept: Tensor, size: int) -> Tensor:
        """bool [..., R, C] of cells -> [..., H, W]"""
        height, width = self.image.shape[-2:]
        return kept.repeat_interleave(size, -2)[..., :height, :].repeat_interleave(size, -1)[..., :width]

    def errors(self, masks: Tensor, size: int) -> Tensor:
        """Relative errors [N] of images with only these cells (bool [N, R, C]) left."""
        found = []
        for part in masks.split(self.batch_size):
            images = torch.where(self.pixels(part, size)[:, None], self.image, self.fill)
            found.append(torch.linalg.vector_norm(self.respond(images).float() - self.target, dim=1) / self.norm)
            self.bar.update(len(part))
        self.evaluations += len(masks)
        return torch.cat(found)

    def shrink(self, kept: Tensor, size: int, bound: float) -> Tensor:
        """Masks cells as long as a round finds enough of them; a round costs about an evaluation per cell."""
        while len(cells := kept.nonzero()):
            alone = torch.cat([self.errors(_without_each(kept, part), size) for part in cells.split(self.batch_size)])
            order = alone.argsort(stable=True)
            order = cells[order[: (alone < bound).sum()]]
            count = self._longest(kept, order, size, bound)
            kept = kept.clone()
            kept[tuple(order[:count].T)] = False
            if count <= len(cells) // 16:
                break
        return kept

    def _longest(self, kept: Tensor, order: Tensor, size: int, bound: float) -> int:
        """How many cells, from the first of `order` on, can be masked together.

        Tries evenly spaced numbers at once, then those between the best of them and the next.
        """
        low, high = 0, len(order)  # `low` cells are known to fit
        while low < high:
            step = -(-(high - low) // self.batch_size)
            counts = list(range(low + step, high, step)) + [high]
            masks = kept.repeat(len(counts), 1, 1)
            for mask, count in zip(masks, counts, strict=True):
                mask[tuple(order[:count].T)] = False
            fits = (self.errors(masks, size) < bound).nonzero().flatten().tolist()
            best = counts[fits[-1]] if fits else low
            high = min((c for c in counts if c > best), default=best + 1) - 1
            low = best
        return low


def _without_each(kept: Tensor, cells: Tensor) -> Tensor:
    """For each cell (row, column), the mask without it: [N, R, C]."""
    masks = kept.repeat(len(cells), 1, 1)
    masks[torch.arange(len(cells)), cells[:, 0], cells[:, 1]] = False
    return masks
