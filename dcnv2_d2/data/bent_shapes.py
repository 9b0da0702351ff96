"""Scenes of articulated bodies, drawn from a seed: the geometry varies far more than the appearance.

Every body is a set of parts around randomly bent spines, so that the classes differ in structure (what sits where
along the spine) rather than in colour or outline. Sizes are in pixels of a 192-pixel scene, scaled to the image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

GENERATOR_VERSION = 2  # increase it with any change to a picture: it is part of the path of the stored data
SCENE_SIZE = 192
MAX_HIDDEN = 0.25  # of an object's mask, by everything in front of it together
_SUPERSAMPLING = 2
_MAX_TRIES = 100
# Positions along a spine, dense at its ends where the caps are round.
_ARC = (1 - np.cos(np.pi * np.linspace(0, 1, 16))) / 2


@dataclass(frozen=True)
class SceneSpec:
    """What a scene holds.

    Attributes:
        classes: names of BODIES.
        objects, clutter: the least and the greatest number of bodies, and of pieces behind them.
        smallest: least extent of a body, in scene pixels.
        muted: background and clutter in greys, so that colour alone tells bodies from the rest.
        image_size: in pixels.
    """

    classes: tuple[str, ...]
    objects: tuple[int, int]
    clutter: tuple[int, int] = (4, 8)
    smallest: float = 28
    muted: bool = False
    image_size: int = 128


def draw_scene(seed: int, index: int, spec: SceneSpec) -> tuple[np.ndarray, list[dict]]:
    """Draw image `index` of the data set `seed`. A pure function of its arguments.

    Returns:
        image (uint8 array[S, S, 3]): RGB.
        annotations: COCO's "segmentation" (polygons of the parts, their union is the mask), "bbox" (XYWH, the polygons'
            extent), "area" (of the rasterised mask), "category_id" (from 1) and "iscrowd", in image pixels and drawing
            order. Masks are of whole bodies: at most a quarter of one is hidden, and that is not cut out.
    """
    rng = np.random.default_rng([seed, index])
    size, scale = spec.image_size, spec.image_size / SCENE_SIZE
    mean_color = rng.uniform(50, 205, 3)
    canvas = mean_color + rng.uniform(10, 30) * _noise(rng, size, 3)
    if spec.muted:
        mean_color = np.full(3, mean_color.mean())
        canvas[:] = canvas.mean(2, keepdims=True)
    canvas = canvas.repeat(_SUPERSAMPLING, 0).repeat(_SUPERSAMPLING, 1)

    for _ in range(rng.integers(spec.clutter[0], spec.clutter[1] + 1)):
        _paint(canvas, [_clutter(rng, rng.uniform(12, 60) * scale, size)], _clutter_color(rng, spec), rng)

    masks: list[np.ndarray] = []
    annotations: list[dict] = []
    for _ in range(rng.integers(spec.objects[0], spec.objects[1] + 1)):
        category = int(rng.integers(len(spec.classes)))
        for _ in range(_MAX_TRIES):
            extent = spec.smallest * (140 / spec.smallest) ** rng.uniform() * scale  # log-uniform, to 140 scene pixels
            parts = _pose(rng, BODIES[spec.classes[category]](rng), extent, size)
            mask = np.asarray(_rasterize(parts, size).any(0))
            if not _hides_too_much(mask, masks):
                break
        else:
            continue  # a crowded scene: one body fewer, so that none is hidden
        masks.append(mask)
        annotations.append(_annotation(parts, mask, category + 1))
        shade = rng.uniform(0.8, 1.2, (len(parts), 1))
        _paint(canvas, parts, np.clip(_color_unlike(rng, mean_color, spec.muted) * shade, 0, 255), rng)

    for _ in range(rng.integers(0, 3)):
        piece = [_clutter(rng, rng.uniform(10, 24) * scale, size)]
        mask = _rasterize(piece, size)[0]
        if not _hides_too_much(mask, masks):
            masks.append(mask)
            _paint(canvas, piece, _clutter_color(rng, spec), rng)

    image = canvas.reshape(size, _SUPERSAMPLING, size, _SUPERSAMPLING, 3).mean(1).mean(2)
    image += rng.normal(0, rng.uniform(3, 8), image.shape)
    return image.clip(0, 255).round().astype(np.uint8), annotations


def _spine(rng: np.random.Generator, length: float = 1.0, bend: float = 1.0, heading: float = 0.0) -> np.ndarray:
    """A line (array[16, 2]) from the origin: an arc and an S-bend, turning by up to about 3 rad times `bend` in all."""
    # At most 5 rad per length: a tube thinner than 1/5 on each side never folds over itself.
    angle = heading + bend * (rng.uniform(-2.5, 2.5) * _ARC + rng.uniform(-0.4, 0.4) * np.sin(2 * np.pi * _ARC))
    steps = np.diff(_ARC) * length
    middle = (angle[1:] + angle[:-1]) / 2
    line = np.cumsum(steps[:, None] * np.stack([np.cos(middle), np.sin(middle)], 1), 0)
    return np.concatenate([np.zeros((1, 2)), line])


def _tube(spine: np.ndarray, start: float, end: float) -> np.ndarray:
    """The outline of a tube with round ends whose radius goes from `start` to `end`."""
    radius = (start + (end - start) * _ARC) * np.sqrt(1 - np.abs(2 * _ARC - 1) ** 12)
    tangent = np.gradient(spine, axis=0)
    normal = tangent[:, ::-1] * [-1, 1] / np.linalg.norm(tangent, axis=1, keepdims=True)
    side = normal * radius[:, None]
    return np.concatenate([spine + side, (spine - side)[::-1]])


def _disc(center: np.ndarray, radius: float) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    return center + radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def _worm(rng):
    radius = rng.uniform(0.075, 0.11)
    return [_tube(_spine(rng), radius, radius * rng.uniform(0.5, 0.8))]


def _tadpole(rng):
    spine, radius = _spine(rng), rng.uniform(0.08, 0.11)
    return [_tube(spine, radius, 0.04), _disc(spine[0], radius * rng.uniform(1.8, 2.2))]


def _dumbbell(rng):
    spine, radius = _spine(rng), rng.uniform(0.045, 0.065)
    return [_tube(spine, radius, radius)] + [_disc(spine[i], rng.uniform(0.14, 0.19)) for i in (0, -1)]


def _starfish(rng):
    headings = 2 * np.pi / 5 * np.arange(5) + rng.uniform(-0.25, 0.25, 5)
    arms = [_tube(_spine(rng, rng.uniform(0.85, 1.15), 0.5, heading), 0.2, 0.08) for heading in headings]
    return arms + [_disc(np.zeros(2), rng.uniform(0.25, 0.32))]


def _fork(rng):
    handle, radius = _spine(rng), rng.uniform(0.055, 0.075)
    heading = np.arctan2(*(handle[0] - handle[1])[::-1])  # the tines start where the handle does
    tines = [_spine(rng, rng.uniform(0.5, 0.65), 0.4, heading + spread) for spread in (-0.7, 0, 0.7)]
    return [_tube(handle, radius, radius)] + [_tube(tine, radius, radius * 0.8) for tine in tines]


BODIES: dict[str, Callable[[np.random.Generator], list[np.ndarray]]] = {
    "worm": _worm,
    "tadpole": _tadpole,
    "dumbbell": _dumbbell,
    "starfish": _starfish,
    "fork": _fork,
}


def _clutter(rng: np.random.Generator, extent: float, size: int) -> np.ndarray:
    """An angular piece: no part of any body looks like it."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
    ring = rng.uniform(0.5, 1, (len(angle), 1)) * np.stack([np.cos(angle), np.sin(angle)], 1)
    return _pose(rng, [ring], extent, size)[0]


def _pose(rng: np.random.Generator, parts: list[np.ndarray], extent: float, size: int) -> list[np.ndarray]:
    """Stretch, shear, rotate and place a body so that it is `extent` long and wholly in the image.

    Bends and shears have either sign, which makes mirror images equally likely.
    """
    angle, shear, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(-0.4, 0.4), 1.35 ** rng.uniform(-0.5, 0.5)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    affine = rotation @ [[1, shear], [0, 1]] @ np.diag([stretch, 1 / stretch])
    parts = [part @ affine.T for part in parts]
    points = np.concatenate(parts)
    low, high = points.min(0), points.max(0)
    zoom = extent / (high - low).max()
    corner = rng.uniform(1, size - 1 - zoom * (high - low))
    # Rounded here, so that the drawing, the mask and the stored text are of the same polygon.
    return [((part - low) * zoom + corner).round(2) for part in parts]


def _rasterize(parts: list[np.ndarray], size: int, scale: int = 1) -> np.ndarray:
    """COCO's masks (bool array[parts, size * scale, size * scale]) of the parts magnified by `scale`."""
    polygons = [(part * scale).ravel().tolist() for part in parts]
    return mask_util.decode(mask_util.frPyObjects(polygons, size * scale, size * scale)).transpose(2, 0, 1) > 0


def _hides_too_much(mask: np.ndarray, masks: list[np.ndarray]) -> bool:
    """Whether one more thing in front would hide more than a quarter of any of `masks`, which are in drawing order."""
    for below in reversed(masks):
        if np.count_nonzero(below & mask) > MAX_HIDDEN * np.count_nonzero(below):
            return True
        mask = mask | below
    return False


def _annotation(parts: list[np.ndarray], mask: np.ndarray, category_id: int) -> dict:
    points = np.concatenate(parts)
    low = points.min(0)
    return {
        "segmentation": [part.ravel().tolist() for part in parts],
        "bbox": np.concatenate([low, points.max(0) - low]).round(2).tolist(),
        "area": int(mask.sum()),
        "category_id": category_id,
        "iscrowd": 0,
    }


def _paint(canvas: np.ndarray, parts: list[np.ndarray], colors: np.ndarray, rng: np.random.Generator) -> None:
    """Fill each part with its colour (array[parts, 3]) and a gradient of light."""
    size = canvas.shape[0]
    masks = _rasterize(parts, size // _SUPERSAMPLING, _SUPERSAMPLING)
    for part, mask, color in zip(parts, masks, colors, strict=True):
        rows, columns = np.nonzero(mask)
        offset = np.stack([columns, rows], 1) - part.mean(0) * _SUPERSAMPLING
        canvas[rows, columns] = color + offset @ rng.uniform(-60, 60, (2, 1)) / size


def _color_unlike(rng: np.random.Generator, color: np.ndarray, vivid: bool) -> np.ndarray:
    while True:
        candidate = rng.uniform(10, 245, 3)
        if np.linalg.norm(candidate - color) > 90 and (not vivid or np.ptp(candidate) > 120):
            return candidate


def _clutter_color(rng: np.random.Generator, spec: SceneSpec) -> np.ndarray:
    color = rng.uniform(20, 235, (1, 3))
    return np.full((1, 3), color.mean()) if spec.muted else color


def _noise(rng: np.random.Generator, size: int, channels: int) -> np.ndarray:
    """Smooth noise of several octaves (array[size, size, channels]) with about unit variance."""
    total = np.zeros((channels, size, size))
    for cells in (2, 4, 8, 16, 32):
        for plane, grid in zip(total, rng.normal(size=(channels, cells, cells)), strict=True):
            grid = Image.fromarray((grid / cells**0.5).astype(np.float32))
            plane += np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))
    return total.transpose(1, 2, 0)
