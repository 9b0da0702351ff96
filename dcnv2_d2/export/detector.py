"""The tensor part of a detector, in a form that torch.export can follow."""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicStem
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers, StandardROIHeads
from torch import Tensor, nn

from .nms import batched_nms


class Detector(nn.Module):
    """A Faster or Mask R-CNN or a RetinaNet of Detectron2 at inference, from the pixels of one image to its detections.

    The parts are the model's own; only what lies between them is written anew, without Python decisions on values:
    Detectron2's own code there cannot be exported.
    """

    def __init__(self, model: GeneralizedRCNN | RetinaNet):
        """
        Raises:
            ValueError: the model is another kind of detector.
        """
        super().__init__()
        self._detect = _detection_of(model)
        generator = (model if isinstance(model, RetinaNet) else model.proposal_generator).anchor_generator
        self.coarsest_stride: int = max(generator.strides)  # of the maps that have anchors
        self.model = copy.deepcopy(model).eval()
        forwards: dict[type, Callable] = {Conv2d: _conv_forward, LastLevelMaxPool: _last_level_forward}
        if max(self.model.backbone.size_divisibility, 1) % 4:  # else the stem's sizes are even anyway
            forwards[BasicStem] = _stem_forward
        for module in self.model.modules():
            if type(module) in forwards:
                module.forward = partial(forwards[type(module)], module)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            image (Tensor[3, H, W]): float32 pixels of 0 to 255, in the order of INPUT.FORMAT, resized as for the model.

        Returns:
            boxes (Tensor[R, 4]): x1, y1, x2, y2 in pixels of that image, best first.
            scores (Tensor[R])
            classes (Tensor[R])
            masks (Tensor[R, M, M]): only of a Mask R-CNN; probabilities on a grid over each box.
        """
        return self._detect(self.model, self.model.backbone(self._preprocess(image)), image.shape[1:])

    def _preprocess(self, image: Tensor) -> Tensor:
        image = (image - self.model.pixel_mean) / self.model.pixel_std
        d = max(self.model.backbone.size_divisibility, 1)
        # The exporter sees from this form, and not from -size % d, that the padded sizes are multiples of d.
        height, width = ((size + d - 1) // d * d for size in image.shape[1:])
        return F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]))[None]


def _detection_of(model: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
    """The function from features to detections for this kind of model."""
    if isinstance(model, RetinaNet):
        return _detect_densely
    heads = getattr(model, "roi_heads", None)
    proposals = getattr(model, "proposal_generator", None)
    if not isinstance(proposals, RPN) or not isinstance(heads, StandardROIHeads) or heads.keypoint_on:
        got = f"{type(model).__name__} with {type(proposals).__name__} and {type(heads).__name__}"
        raise ValueError(
            "Detector: model must be a RetinaNet, or a Faster or Mask R-CNN with an RPN and StandardROIHeads, got "
            f"{got}"
        )
    if isinstance(heads, CascadeROIHeads):
        raise ValueError("Detector: model must have StandardROIHeads, got CascadeROIHeads")
    return _detect_in_two_stages


def _detect_in_two_stages(model: GeneralizedRCNN, features: dict[str, Tensor], size: Sequence) -> tuple[Tensor, ...]:
    heads = model.roi_heads
    proposals = _propose(model.proposal_generator, features, size)
    maps = [features[name] for name in heads.box_in_features]
    box_features = heads.box_head(_pool(heads.box_pooler, maps, proposals))
    logits, deltas = heads.box_predictor(box_features)
    boxes, scores, classes = _detect(heads.box_predictor, proposals, logits, deltas, size)
    if not heads.mask_on:
        return boxes, scores, classes
    maps = [features[name] for name in heads.mask_in_features]
    masks = heads.mask_head.layers(_pool(heads.mask_pooler, maps, boxes)).sigmoid()
    masks = masks[torch.arange(classes.shape[0]), classes] if masks.shape[1] > 1 else masks[:, 0]
    return boxes, scores, classes, masks


def _propose(rpn: RPN, features: dict[str, Tensor], size: Sequence) -> Tensor:
    maps = [features[name] for name in rpn.in_features]
    logits, deltas = rpn.rpn_head(maps)
    boxes, scores, levels = [], [], []
    for level, (anchors, level_logits, level_deltas) in enumerate(
        zip(_anchors(rpn.anchor_generator, maps), logits, deltas, strict=True)
    ):
        level_logits, level_deltas = _by_anchor(level_logits, 1)[:, 0], _by_anchor(level_deltas, 4)
        best = _first(level_logits.argsort(descending=True), rpn.pre_nms_topk[False])
        boxes.append(rpn.box2box_transform.apply_deltas(level_deltas[best], anchors[best]))
        scores.append(level_logits[best])
        levels.append(torch.full_like(best, level))
    all_boxes, all_scores, all_levels = _clip(torch.cat(boxes), size), torch.cat(scores), torch.cat(levels)
    keep = ((all_boxes[:, 2:] - all_boxes[:, :2]) > rpn.min_box_size).all(1).nonzero()[:, 0]
    all_boxes, all_scores, all_levels = all_boxes[keep], all_scores[keep], all_levels[keep]
    keep = batched_nms(all_boxes, all_scores, all_levels, len(maps), rpn.nms_thresh)
    return all_boxes[_first(keep, rpn.post_nms_topk[False])]


def _detect(
    predictor: FastRCNNOutputLayers, proposals: Tensor, logits: Tensor, deltas: Tensor, size: Sequence
) -> tuple[Tensor, Tensor, Tensor]:
    boxes = _clip(predictor.box2box_transform.apply_deltas(deltas, proposals).view(-1, 4), size)
    boxes = boxes.view(proposals.shape[0], -1, 4)
    scores = logits.softmax(1)[:, :-1]
    rows, classes = (scores > predictor.test_score_thresh).nonzero().unbind(1)
    scores = scores[rows, classes]
    boxes = boxes[rows, classes] if boxes.shape[1] > 1 else boxes[rows, 0]
    keep = batched_nms(boxes, scores, classes, logits.shape[1] - 1, predictor.test_nms_thresh)
    if predictor.test_topk_per_image >= 0:
        keep = _first(keep, predictor.test_topk_per_image)
    return boxes[keep], scores[keep], classes[keep]


def _detect_densely(model: RetinaNet, features: dict[str, Tensor], size: Sequence) -> tuple[Tensor, ...]:
    maps = [features[name] for name in model.head_in_features]
    logits, deltas = model.head(maps)
    found = []
    for anchors, level_logits, level_deltas in zip(_anchors(model.anchor_generator, maps), logits, deltas, strict=True):
        table = _by_anchor(level_logits, model.num_classes).sigmoid()
        rows, classes = (table > model.test_score_thresh).nonzero().unbind(1)
        best = _first(table[rows, classes].argsort(descending=True), model.test_topk_candidates)
        rows, classes = rows[best], classes[best]
        boxes = model.box2box_transform.apply_deltas(_by_anchor(level_deltas, 4)[rows], anchors[rows])
        found.append((boxes, table[rows, classes], classes))
    boxes, scores, classes = (torch.cat(parts) for parts in zip(*found, strict=True))
    keep = batched_nms(boxes, scores, classes, model.num_classes, model.test_nms_thresh)
    keep = _first(keep, model.max_detections_per_image)
    return _clip(boxes[keep], size), scores[keep], classes[keep]


def _first(indices: Tensor, count: int) -> Tensor:
    """The first `count`, or all if there are fewer. Not a slice: the exporter would have to settle which."""
    return indices.narrow(0, 0, torch.sym_min(indices.shape[0], count))


def _by_anchor(predictions: Tensor, channels: int) -> Tensor:
    """Tensor[1, A * channels, H, W] -> Tensor[H * W * A, channels]"""
    return predictions[0].unflatten(0, (-1, channels)).permute(2, 3, 0, 1).reshape(-1, channels)


def _conv_forward(layer: Conv2d, x: Tensor) -> Tensor:
    """Without Detectron2's test for an empty batch, which the exporter cannot decide."""
    x = layer._conv_forward(x, layer.weight, layer.bias)
    if layer.norm is not None:
        x = layer.norm(x)
    return x if layer.activation is None else layer.activation(x)


# From a pooling with stride the exporter concludes whether a size is even, for all images. So these pool without, and
# then take every second pixel.


def _last_level_forward(layer: LastLevelMaxPool, x: Tensor) -> list[Tensor]:
    return [x[:, :, ::2, ::2]]


def _stem_forward(stem: BasicStem, x: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(stem.conv1(x)), kernel_size=3, stride=1, padding=1)[:, :, ::2, ::2]


def _anchors(generator: DefaultAnchorGenerator, maps: list[Tensor]) -> Iterator[Tensor]:
    """Tensor[H * W * A, 4] for each map, in the order of Detectron2's generators."""
    for x, stride, cell in zip(maps, generator.strides, generator.cell_anchors, strict=True):
        height, width = x.shape[2:]
        xs = (torch.arange(width, device=x.device) + generator.offset) * stride
        ys = (torch.arange(height, device=x.device) + generator.offset) * stride
        centres = torch.stack([xs.expand(height, width), ys[:, None].expand(height, width)] * 2, dim=-1)
        yield (centres[:, :, None] + cell).view(-1, 4)


def _clip(boxes: Tensor, size: Sequence) -> Tensor:
    height, width = size
    x, y = boxes[:, ::2].clamp(min=0, max=width), boxes[:, 1::2].clamp(min=0, max=height)
    return torch.stack([x, y], dim=2).flatten(1)


def _pool(pooler: ROIPooler, maps: list[Tensor], boxes: Tensor) -> Tensor:
    """ROIPooler.forward for one image."""
    rois = F.pad(boxes, (1, 0))  # batch index 0
    if len(maps) == 1:
        return pooler.level_poolers[0](maps[0], rois)
    sizes = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    levels = (pooler.canonical_level + torch.log2(sizes / pooler.canonical_box_size + 1e-8)).floor()
    levels = levels.clamp(min=pooler.min_level, max=pooler.max_level) - pooler.min_level
    pooled = maps[0].new_zeros((boxes.shape[0], maps[0].shape[1], *pooler.output_size))
    for level, (x, level_pooler) in enumerate(zip(maps, pooler.level_poolers, strict=True)):
        chosen = (levels == level).nonzero()[:, 0]
        pooled = pooled.index_put((chosen,), level_pooler(x, rois[chosen]))
    return pooled
