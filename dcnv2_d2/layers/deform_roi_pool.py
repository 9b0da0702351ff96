"""Deformable RoI pooling that predicts its own offsets (Deformable ConvNets v2, section 3.2)."""

import sys
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.utils import _pair

from ..ops import deform_roi_pool
from .statistics import NOT_SCRIPTABLE, is_watched, record_statistics

fx.wrap("deform_roi_pool")  # one call in a traced graph


class DeformRoIPool(nn.Module):
    """Deformable RoI pooling (v1): its branch predicts from the plainly pooled features where each bin samples.

    The branch ends at zero, so that a new layer is roi_align(aligned=True). A layer may use the branch of another one
    instead, as a 14x14 mask pooler does that of the 7x7 box pooler: what the branch predicts for a bin then holds for
    the bins that cover it, 2x2 of them, and the layer has no parameters.
    """

    channels_per_bin = 2  # of the branch: x of all bins, then y
    branch_from: "DeformRoIPool | None"

    def __init__(
        self,
        in_channels: int,
        output_size: int | tuple[int, int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = 2,
        *,
        gamma: float = 0.1,
        hidden_dims: Sequence[int] = (),
        branch_from: "DeformRoIPool | None" = None,
    ):
        """
        Args:
            in_channels: channels of the map.
            output_size, spatial_scale, sampling_ratio, gamma: see dcnv2_d2.ops.deform_roi_pool.
            hidden_dims: widths of the hidden fully connected layers of the branch, with a ReLU each; v1 has none.
            branch_from: the layer whose branch is used; the branch is registered there alone.

        Raises:
            ValueError: branch_from is of another type or has other in_channels.
        """
        super().__init__()
        self.in_channels = in_channels
        self.output_size = _pair(output_size)
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.gamma = gamma
        # Not as a submodule: every parameter has one name.
        object.__setattr__(self, "branch_from", branch_from)
        if branch_from is None:
            bins = self.output_size[0] * self.output_size[1]
            self.branch = _build_branch(in_channels * bins, hidden_dims, self.channels_per_bin * bins)
        elif type(branch_from) is not type(self) or branch_from.in_channels != in_channels:
            raise ValueError(
                f"branch_from must be a {type(self).__name__} of {in_channels} channels, "
                f"got a {type(branch_from).__name__} of {getattr(branch_from, 'in_channels', 'no')} channels"
            )
        # Prefix of the layer's statistics in the event storage.
        self.name = type(self).__name__

    def forward(self, x: Tensor, boxes: Tensor | Sequence[Tensor] | None) -> Tensor:
        """Tensor[N, C, H, W] and boxes as deform_roi_pool takes them -> Tensor[K, C, Ph, Pw] of the map's dtype

        Without boxes x is what a borrower pooled, Tensor[K, C, Ph, Pw], and the result is what the branch predicts.
        """
        if boxes is None:
            return self._run_branch(x)
        offset, mask = self.predict(x, boxes)
        if is_watched(self, x):
            # The mean offset moves a bin by the RoI's whole size.
            record_statistics(self.name, self.gamma * offset, mask, limit=1.0, unit="RoI sizes")
        # Autocast gives a half type, Detectron2's ROIPooler wants the map's.
        return self._pool(x, boxes, offset, self.output_size, mask).to(x.dtype)

    def predict(self, x: Tensor, boxes: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The offset and the mask of deform_roi_pool for a map and boxes; a v1 layer has no mask."""
        return self._predict(x, boxes), None

    @property
    def branch_owner(self) -> "DeformRoIPool":
        """The layer whose branch predicts: this one or, through branch_from, another."""
        return self if self.branch_from is None else self.branch_from.branch_owner

    def _predict(self, x, boxes):
        """Tensor[K, channels_per_bin, Ph, Pw]"""
        if isinstance(x, Tensor) and (x.dim() != 4 or x.shape[1] != self.in_channels):
            raise ValueError(f"x must be a map [N, {self.in_channels}, H, W], got {list(x.shape)}")
        owner = self.branch_owner
        pooled = self._pool(x, boxes, None, owner.output_size)
        # FSDP2 gathers the parameters of a module in its call.
        prediction = owner(pooled, None) if _is_sharded(owner) else owner._run_branch(pooled)
        if owner.output_size != self.output_size:
            prediction = F.interpolate(prediction, self.output_size)  # the nearest bin
        return prediction

    def _run_branch(self, pooled):
        return self.branch(pooled.flatten(1)).unflatten(1, (self.channels_per_bin, *self.output_size))

    def _pool(self, x, boxes, offset, output_size, mask=None):
        return deform_roi_pool(x, boxes, offset, output_size, self.spatial_scale, self.sampling_ratio, self.gamma, mask)

    def __prepare_scriptable__(self):
        raise NotImplementedError(NOT_SCRIPTABLE)

    def extra_repr(self) -> str:
        shared = "" if self.branch_from is None else ", branch of another layer"
        return (
            f"{self.in_channels}, output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, gamma={self.gamma}{shared}"
        )


class ModulatedDeformRoIPool(DeformRoIPool):
    """Modulated deformable RoI pooling (v2, Eq. 2): the branch also predicts an amplitude for each bin.

    The mask is mask_scale * sigmoid(logit). It starts at half of mask_scale: 0.5 with the paper's 1.0; with 2.0 a new
    layer is roi_align(aligned=True). For 7x7 bins of 256 channels the branch has 14,046,355 parameters.
    """

    channels_per_bin = 3  # x of all bins, then y, then the mask logits

    def __init__(self, *args: Any, hidden_dims: Sequence[int] = (1024, 1024), mask_scale: float = 1.0, **kwargs: Any):
        """Takes the arguments of DeformRoIPool, with the paper's two hidden layers of 1024, and:

        Args:
            mask_scale: the largest modulation.

        Raises:
            ValueError: mask_scale is not above 0.
        """
        if not mask_scale > 0:
            raise ValueError(f"mask_scale must be above 0, got {mask_scale}")
        super().__init__(*args, hidden_dims=hidden_dims, **kwargs)
        self.mask_scale = mask_scale

    def predict(self, x: Tensor, boxes: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        prediction = self._predict(x, boxes)
        return prediction[:, :2], self.mask_scale * prediction[:, 2:].sigmoid()

    def extra_repr(self) -> str:
        return super().extra_repr() + f", mask_scale={self.mask_scale}"


def _is_sharded(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nothing is sharded where it was not imported
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _build_branch(inputs: int, hidden_dims: Sequence[int], outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for dim in hidden_dims:
        hidden = nn.Linear(inputs, dim)
        nn.init.normal_(hidden.weight, std=0.01)
        nn.init.zeros_(hidden.bias)
        layers += [hidden, nn.ReLU()]
        inputs = dim
    last = nn.Linear(inputs, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)
