"""R-CNN feature mimicking (Deformable ConvNets v2, section 3.3): the R-CNN branch and its losses, for training only."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

REGIONS = ("fg", "bg", "both")
REDUCTIONS = ("sum", "mean")


class FeatureMimicking(nn.Module):
    """The R-CNN branch without what it shares: the choice of RoIs (Omega), their crops, a classifier and two losses.

    .. math:: L_{mimic} = \\sum_{b \\in \\Omega} [1 - \\cos(f_{RCNN}(b), f_{FRCNN}(b))]   (Eq. 3)
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        regions: str = "fg",
        num_rois: int = 32,
        crop_size: int = 224,
        loss_weight: float = 0.1,
        cls_loss_weight: float = 0.1,
        reduction: str = "sum",
        chunk: int = 0,
        checkpointing: bool = False,
    ):
        """
        Args:
            in_features: length of the box head's output, flattened.
            num_classes: foreground classes; the classifier has one more output, the background.
            regions: which of the proposals that the box head was trained on are in Omega: fg, bg or both.
            num_rois: the greatest number of RoIs of an image in Omega, drawn at random.
            crop_size: side of a crop, in pixels.
            loss_weight, cls_loss_weight: of the mimicking loss and of the classifier's cross-entropy.
            reduction: sum or mean of the mimicking loss over the RoIs of an image; the images are averaged.
            chunk: the greatest number of crops in one pass through the network; 0: all of them.
            checkpointing: whether the branch is computed again during backward, instead of kept.

        Raises:
            ValueError: an argument is none of these.
        """
        super().__init__()
        if regions not in REGIONS:
            raise ValueError(f"MODEL.MIMIC.REGIONS must be one of {', '.join(REGIONS)}, got {regions!r}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"MODEL.MIMIC.REDUCTION must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        for name, value, least in (("NUM_ROIS", num_rois, 1), ("CROP_SIZE", crop_size, 1), ("CHUNK", chunk, 0)):
            if value < least:
                raise ValueError(f"MODEL.MIMIC.{name} must be at least {least}, got {value}")
        self.num_classes = num_classes
        self.regions = regions
        self.num_rois = num_rois
        self.crop_size = crop_size
        self.loss_weight = loss_weight
        self.cls_loss_weight = cls_loss_weight
        self.reduction = reduction
        self.chunk = chunk
        self.checkpointing = checkpointing
        # One sample per pixel of the image where a crop shrinks it
        self.align = ROIAlign(crop_size, spatial_scale=1.0, sampling_ratio=0, aligned=True)
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.zeros_(self.cls_score.bias)

    def forward(
        self,
        images: ImageList,
        proposals: list[Instances],
        rcnn: Callable[[Tensor], Tensor],
        frcnn: Callable[[list[Boxes]], Tensor],
    ) -> dict[str, Tensor]:
        """The two losses of one step; both are 0, and have all their gradients, when Omega is empty.

        Args:
            images: the network's input.
            proposals: what the box head was trained on, with proposal_boxes and gt_classes.
            rcnn: gives the box head's features of crops, Tensor[K, 3, crop_size, crop_size] -> Tensor[K, D].
            frcnn: gives the box head's features of boxes in each image, list[Boxes] -> Tensor[K, D].

        Returns:
            `loss_mimic` and `loss_mimic_cls`, weighted.
        """
        omega = self.sample(proposals)
        count = sum(map(len, omega))
        if count == 0:  # Distributed training hangs unless every process runs the same layers.
            omega[0] = self._whole_image(omega[0].image_size, proposals[0])
        boxes = [instances.proposal_boxes for instances in omega]
        crops = self.crop(images, boxes)
        features = [
            checkpoint(rcnn, part, use_reentrant=False) if self.checkpointing else rcnn(part)
            for part in crops.split(self.chunk or len(crops))
        ]
        losses = self.losses(torch.cat(features), frcnn(boxes), omega)
        get_event_storage().put_scalar("mimic/num_rois", count / len(omega))
        return losses if count else {name: 0 * loss for name, loss in losses.items()}

    @torch.no_grad()
    def sample(self, proposals: list[Instances]) -> list[Instances]:
        """Omega: draws from the labelled proposals of each image (with gt_classes) at most num_rois of the regions."""
        chosen = []
        for instances in proposals:
            foreground = instances.gt_classes < self.num_classes
            if self.regions != "both":
                instances = instances[foreground if self.regions == "fg" else ~foreground]
            order = torch.randperm(len(instances), device=instances.gt_classes.device)
            chosen.append(instances[order[: self.num_rois]])
        return chosen

    @torch.no_grad()
    def crop(self, images: ImageList, boxes: list[Boxes]) -> Tensor:
        """The boxes cut out of the network's input, resized: Tensor[K, 3, crop_size, crop_size].

        Corners are not rounded, and each image is cut without its padding, which would bleed into boxes at the border.
        """
        crops = []
        for i, b in enumerate(boxes):
            crops.append(self.align(images[i][None], F.pad(b.tensor, (1, 0))))
        return torch.cat(crops)

    def losses(self, rcnn: Tensor, frcnn: Tensor, omega: list[Instances]) -> dict[str, Tensor]:
        """Eq. 3 and the cross-entropy of the R-CNN branch, weighted.

        Args:
            rcnn, frcnn (Tensor[K, D]): features of the same RoIs, from their crops and from the images.
            omega: the RoIs of each image, K in all, with gt_classes.
        """
        classes = torch.cat([instances.gt_classes for instances in omega])
        with torch.autocast(rcnn.device.type, enabled=False):
            cosine = F.cosine_similarity(rcnn.float(), frcnn.float(), dim=1)
        foreground = cosine.detach()[classes < self.num_classes]
        if len(foreground):
            get_event_storage().put_scalar("mimic/cosine_fg", foreground.mean().item())
        per_image = [part.sum() for part in (1 - cosine).clamp(0, 2).split([len(instances) for instances in omega])]
        if self.reduction == "mean":
            per_image = [total / max(len(instances), 1) for total, instances in zip(per_image, omega, strict=True)]
        return {
            "loss_mimic": self.loss_weight * torch.stack(per_image).mean(),
            "loss_mimic_cls": self.cls_loss_weight * F.cross_entropy(self.cls_score(rcnn), classes),
        }

    def _whole_image(self, image_size: tuple[int, int], like: Instances) -> Instances:
        height, width = image_size
        return Instances(
            image_size,
            proposal_boxes=Boxes(like.proposal_boxes.tensor.new_tensor([[0, 0, width, height]])),
            gt_classes=like.gt_classes.new_tensor([self.num_classes]),
        )


@contextlib.contextmanager
def still_statistics(module: nn.Module) -> Iterator[None]:
    """Lets batch norms in training mode update copies of their running statistics, which are then thrown away.

    What mimicking shows them, such as an object that fills its image, is not what they see at inference. A momentum of
    0 would still let infinities through, and count the batches.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [dict(norm.named_buffers()) for norm in norms]
    for norm, buffers in zip(norms, kept, strict=True):
        for name, buffer in buffers.items():
            setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)


class Mimicking(StandardROIHeads):
    """To be mixed into ROI heads: FeatureMimicking on top of their pooler and box head. Reads MODEL.MIMIC."""

    @configurable
    def __init__(self, *, mimicking: FeatureMimicking, **kwargs: Any):
        super().__init__(**kwargs)
        self.mimicking = mimicking
        # MimickingRCNN sets it: crops -> the backbone's features by name.
        self.crop_features: Callable[[Tensor], dict[str, Tensor]] | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        heads = super().from_config(cfg, input_shape)
        mimic = cfg.MODEL.MIMIC
        box_head = heads["box_head"] if "box_head" in heads else heads["box_heads"][0]
        shape = box_head.output_shape
        heads["mimicking"] = FeatureMimicking(
            shape.channels * (shape.height or 1) * (shape.width or 1),
            heads["num_classes"],
            regions=mimic.REGIONS,
            num_rois=mimic.NUM_ROIS,
            crop_size=mimic.CROP_SIZE,
            loss_weight=mimic.LOSS_WEIGHT,
            cls_loss_weight=mimic.CLS_LOSS_WEIGHT,
            reduction=mimic.REDUCTION,
            chunk=mimic.CHUNK,
            checkpointing=mimic.CHECKPOINTING,
        )
        return heads

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """As the heads' own, with two more losses in training."""
        if self.training and self.crop_features is None:
            raise ValueError(
                f"MODEL.META_ARCHITECTURE must be MimickingRCNN for MODEL.ROI_HEADS.NAME {type(self).__name__} to train"
            )
        proposals, result = super().forward(images, features, proposals, targets)
        if self.training:
            storage = get_event_storage()  # with checkpointing the branch runs again in backward, maybe outside of it
            result.update(
                self.mimicking(
                    images,
                    proposals,
                    lambda crops: self._features_of_crops(crops, storage),
                    lambda boxes: self._box_features(features, boxes, storage, "mimic/frcnn"),
                )
            )
        return proposals, result

    def _features_of_crops(self, crops: Tensor, storage: EventStorage) -> Tensor:
        boxes = crops.new_tensor([[0, 0, crops.shape[3], crops.shape[2]]])
        assert self.crop_features is not None  # forward has made sure
        with storage.name_scope("mimic"):
            features = self.crop_features(crops)
        return self._box_features(features, [Boxes(boxes) for _ in crops], storage, "mimic")

    def _box_features(
        self, features: dict[str, Tensor], boxes: list[Boxes], storage: EventStorage, scope: str
    ) -> Tensor:
        # Of a cascade the first stage, the one that is trained on these proposals
        box_head = self.box_head[0] if isinstance(self.box_head, nn.ModuleList) else self.box_head
        # Running statistics, and what the layers record under their own names, stay those of the detector's own pass.
        with still_statistics(self), storage.name_scope(scope):
            return box_head(self.box_pooler([features[name] for name in self.box_in_features], boxes)).flatten(1)
