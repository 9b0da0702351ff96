"""The tensor part of a detector, in a form that torch.export can follow."""

import copy

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicStem
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from torch import Tensor, nn

from .nms import batched_nms


class Detector(nn.Module):
    """A Faster or Mask R-CNN of Detectron2 at inference, from the pixels of one image to its detections.

    The parts are the model's own; only what lies between them is written anew, without Python decisions on values:
    Detectron2's own way from proposals to detections cannot be exported.
    """

    def __init__(self, model: GeneralizedRCNN):
        """
        Raises:
            ValueError: the model is another kind of detector.
        """
        super().__init__()
        heads = getattr(model, "roi_heads", None)
        proposals = getattr(model, "proposal_generator", None)
        if not isinstance(proposals, RPN) or not isinstance(heads, StandardROIHeads) or heads.keypoint_on:
            got = f"{type(model).__name__} with {type(proposals).__name__} and {type(heads).__name__}"
            raise ValueError(
                f"Detector: model must be a Faster or Mask R-CNN with an RPN and StandardROIHeads, got {got}"
            )
        if isinstance(heads, CascadeROIHeads):
            raise ValueError("Detector: model must have StandardROIHeads, got CascadeROIHeads")
        self.model = copy.deepcopy(model).eval()
        replacements = {Conv2d: _Conv2d, LastLevelMaxPool: _LastLevelMaxPool}
        if max(self.model.backbone.size_divisibility, 1) % 4:  # else the stem's sizes are even anyway
            replacements[BasicStem] = _BasicStem
        for module in self.model.modules():
            module.__class__ = replacements.get(type(module), type(module))

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
        model, heads = self.model, self.model.roi_heads
        size = image.shape[1:]
        features = model.backbone(self._preprocess(image))
        proposals = self._propose(features, size)
        maps = [features[name] for name in heads.box_in_features]
        box_features = heads.box_head(_pool(heads.box_pooler, maps, proposals))
        logits, deltas = heads.box_predictor(box_features)
        boxes, scores, classes = self._detect(proposals, logits, deltas, size)
        if not heads.mask_on:
            return boxes, scores, classes
        maps = [features[name] for name in heads.mask_in_features]
        masks = heads.mask_head.layers(_pool(heads.mask_pooler, maps, boxes)).sigmoid()
        masks = masks[torch.arange(classes.shape[0]), classes] if masks.shape[1] > 1 else masks[:, 0]
        return boxes, scores, classes, masks

    def _preprocess(self, image):
        image = (image - self.model.pixel_mean) / self.model.pixel_std
        d = max(self.model.backbone.size_divisibility, 1)
        # The exporter sees from this form, and not from -size % d, that the padded sizes are multiples of d.
        height, width = ((size + d - 1) // d * d for size in image.shape[1:])
        return F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]))[None]

    def _propose(self, features, size):
        rpn = self.model.proposal_generator
        maps = [features[name] for name in rpn.in_features]
        logits, deltas = rpn.rpn_head(maps)
        boxes, scores, levels = [], [], []
        for level, (x, anchors, level_logits, level_deltas) in enumerate(
            zip(maps, _anchors(rpn.anchor_generator, maps), logits, deltas, strict=True)
        ):
            level_logits = level_logits[0].permute(1, 2, 0).flatten()
            level_deltas = level_deltas[0].view(-1, 4, *x.shape[2:]).permute(2, 3, 0, 1).reshape(-1, 4)
            best = _first(level_logits.argsort(descending=True), rpn.pre_nms_topk[False])
            boxes.append(rpn.box2box_transform.apply_deltas(level_deltas[best], anchors[best]))
            scores.append(level_logits[best])
            levels.append(torch.full_like(best, level))
        boxes, scores, levels = _clip(torch.cat(boxes), size), torch.cat(scores), torch.cat(levels)
        keep = ((boxes[:, 2:] - boxes[:, :2]) > rpn.min_box_size).all(1).nonzero()[:, 0]
        boxes, scores, levels = boxes[keep], scores[keep], levels[keep]
        keep = batched_nms(boxes, scores, levels, len(maps), rpn.nms_thresh)
        return boxes[_first(keep, rpn.post_nms_topk[False])]

    def _detect(self, proposals, logits, deltas, size):
        predictor = self.model.roi_heads.box_predictor
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


def _first(indices, count):
    """The first `count`, or all if there are fewer. Not a slice: the exporter would have to settle which."""
    return indices.narrow(0, 0, torch.sym_min(indices.shape[0], count))


class _Conv2d(Conv2d):
    """Without Detectron2's question of whether the batch is empty, which the exporter cannot answer."""

    def forward(self, x):
        x = self._conv_forward(x, self.weight, self.bias)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


# The exporter takes it from a pooling with stride whether a size is even, for all images. So these pool without, and
# then take every second pixel.


class _LastLevelMaxPool(LastLevelMaxPool):
    def forward(self, x):
        return [x[:, :, ::2, ::2]]


class _BasicStem(BasicStem):
    def forward(self, x):
        return F.max_pool2d(F.relu(self.conv1(x)), kernel_size=3, stride=1, padding=1)[:, :, ::2, ::2]


def _anchors(generator, maps):
    """Tensor[H * W * A, 4] for each map, in the order of Detectron2's generators."""
    for x, stride, cell in zip(maps, generator.strides, generator.cell_anchors, strict=True):
        height, width = x.shape[2:]
        xs = (torch.arange(width, device=x.device) + generator.offset) * stride
        ys = (torch.arange(height, device=x.device) + generator.offset) * stride
        centres = torch.stack([xs.expand(height, width), ys[:, None].expand(height, width)] * 2, dim=-1)
        yield (centres[:, :, None] + cell).view(-1, 4)


def _clip(boxes, size):
    height, width = size
    x, y = boxes[:, ::2].clamp(min=0, max=width), boxes[:, 1::2].clamp(min=0, max=height)
    return torch.stack([x, y], dim=2).flatten(1)


def _pool(pooler: ROIPooler, maps, boxes):
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
