"""Position-sensitive RoI pooling, plain (R-FCN) and deformable (Deformable ConvNets v1, section 2.2)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import deform_ps_roi_pool
from .statistics import record_statistics


class PSRoIPool(nn.Module):
    """Position-sensitive RoI pooling: a 1x1 convolution, `conv`, makes a map of its own for each bin of each channel.

    Bin (i, j) of a channel is pooled from the (i * bins + j)-th map of that channel.
    """

    gamma = 0.1  # of no effect without offsets

    def __init__(
        self, in_channels: int, out_channels: int, bins: int = 7, spatial_scale: float = 1.0, sampling_ratio: int = 4
    ) -> None:
        """
        Args:
            in_channels: channels of the features.
            out_channels: pooled channels; `conv` has bins**2 times as many.
            bins: of an RoI, in both directions (7 in R-FCN).
            spatial_scale, sampling_ratio: see dcnv2_d2.ops.deform_ps_roi_pool.

        Raises:
            ValueError: bins or sampling_ratio is not above 0.
        """
        for name, value in (("bins", bins), ("sampling_ratio", sampling_ratio)):
            if value < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be above 0, got {value}")
        super().__init__()
        self.out_channels = out_channels
        self.bins = bins
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.conv = nn.Conv2d(in_channels, out_channels * bins**2, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.get_parameter("bias"))

    def forward(self, x: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        """Tensor[N, C, H, W] and boxes as deform_ps_roi_pool takes them -> Tensor[K, out_channels, bins, bins]"""
        return self._pool(self.conv(x), boxes, self.predict(x, boxes))

    def predict(self, x: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor | None:
        """The offset of deform_ps_roi_pool for features and boxes; plain pooling has none."""
        return None

    def _pool(self, maps, boxes, offset):
        return deform_ps_roi_pool(
            maps, boxes, offset, self.bins, self.spatial_scale, self.sampling_ratio, self.gamma, self.bins
        )

    def extra_repr(self) -> str:
        return f"bins={self.bins}, spatial_scale={self.spatial_scale}, sampling_ratio={self.sampling_ratio}"


class DeformPSRoIPool(PSRoIPool):
    """Deformable position-sensitive RoI pooling: bins move by offsets that are position-sensitively pooled themselves.

    The maps of offsets come from a second 1x1 convolution, `conv_offset`, which starts at zero: a new layer is
    PSRoIPool.
    """

    def __init__(self, *args: Any, gamma: float = 0.1, classes: int = 1, **kwargs: Any) -> None:
        """Takes the arguments of PSRoIPool, and:

        Args:
            gamma: unit of an offset, in RoI sizes.
            classes: the pooled channels are divided into so many classes with offsets of their own; R-FCN's scores
                have as many as channels, its boxes one.

        Raises:
            ValueError: out_channels is not a multiple of classes.
        """
        super().__init__(*args, **kwargs)
        if classes < 1 or self.out_channels % classes:
            raise ValueError(f"DeformPSRoIPool: classes must divide out_channels ({self.out_channels}), got {classes}")
        self.gamma = gamma
        self.conv_offset = nn.Conv2d(self.conv.in_channels, 2 * classes * self.bins**2, 1)
        for p in self.conv_offset.parameters():
            nn.init.zeros_(p)
        # Prefix of the layer's statistics in the event storage.
        self.name = type(self).__name__

    def predict(self, x: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        """Tensor[K, 2 * classes, bins, bins], x before y"""
        offset = self._pool(self.conv_offset(x), boxes, None)
        if self.training and not torch.compiler.is_compiling():
            record_statistics(self.name, self.gamma * offset, None, limit=1.0, unit="RoI sizes")
        return offset

    def extra_repr(self) -> str:
        return super().extra_repr() + f", gamma={self.gamma}"
