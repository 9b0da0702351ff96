"""Deformable convolutions that predict their own offsets (Deformable ConvNets v2, section 3.2)."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..ops import deform_conv2d
from .statistics import record_statistics

_Layer = TypeVar("_Layer", bound="DeformConv2d")


def _rename(state_dict: dict[str, Tensor], other: str, own: str) -> None:
    for name in ("weight", "bias"):
        if other + name in state_dict:
            state_dict[own + name] = state_dict.pop(other + name)


def _plain_forwards() -> tuple[Callable, ...]:
    """Of nn.Conv2d and, where it is installed, of Detectron2's, which only adds norm and activation."""
    try:
        from detectron2.layers import Conv2d
    except ImportError:
        return (nn.Conv2d.forward,)
    return nn.Conv2d.forward, Conv2d.forward


def accept_sibling_names(parent: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Load hook of a module with deformable layers: `<layer>_offset.*`, Detectron2's sibling, becomes the layer's."""
    for child, layer in parent.named_children():
        if isinstance(layer, DeformConv2d):
            _rename(state_dict, f"{prefix}{child}_offset.", f"{prefix}{child}.conv_offset.")


class DeformConv2d(nn.Conv2d):
    """Deformable convolution (v1): a convolution of its own, `conv_offset`, predicts where each tap samples.

    `conv_offset` has the kernel, stride, padding and dilation of the convolution it serves and starts at zero, so that
    a new layer samples the regular grid. Checkpoints that call it `conv_offset_mask` load as they are; in a model
    converted by replace_convs so do those where it is a sibling, `<layer>_offset` (Detectron2, older mmdetection).
    """

    channels_per_tap = 2  # of conv_offset: dy, dx
    # What nn.Conv2d leaves open: these are pairs of numbers.
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        offset_groups: int = 1,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ):
        """Takes the arguments of nn.Conv2d, and:

        Args:
            offset_groups: the input channels are divided into so many groups with offsets of their own.
            norm: applied to the output, as in detectron2.layers.Conv2d.
            activation: applied after norm.

        Raises:
            ValueError: in_channels is not a multiple of offset_groups, or padding is not given in numbers.
        """
        if isinstance(padding, str):
            raise ValueError(f"padding must be a number or a pair of numbers, got {padding!r}")
        if offset_groups < 1 or in_channels % offset_groups:
            raise ValueError(f"offset_groups must divide in_channels ({in_channels}), got {offset_groups}")
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.offset_groups = offset_groups
        self.norm = norm
        self.activation = activation
        taps = self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset = nn.Conv2d(
            in_channels, self.channels_per_tap * offset_groups * taps, kernel_size, stride, padding, dilation
        )
        for p in self.conv_offset.parameters():
            nn.init.zeros_(p)
        # Prefix of the layer's statistics in the event storage; replace_convs sets it to the layer's place.
        self.name = type(self).__name__

    @classmethod
    def from_conv(cls: type["_Layer"], conv: nn.Conv2d, **kwargs: Any) -> "_Layer":
        """Makes a deformable layer that takes over an existing convolution.

        Args:
            conv: its weight, bias, geometry, groups and, as in detectron2.layers.Conv2d, norm and activation are
                taken over; they are the same objects afterwards, not copies.
            kwargs: the layer's own arguments: offset_groups, mask_scale.

        Raises:
            ValueError: conv is transposed, already deformable, pads with something else than a number of zeros, or
                computes something of its own.
        """
        if not isinstance(conv, nn.Conv2d) or isinstance(conv, DeformConv2d):
            raise ValueError(f"conv must be an nn.Conv2d that is not deformable yet, got {type(conv).__name__}")
        if conv.padding_mode != "zeros":
            raise ValueError(f"conv must pad with zeros, got padding_mode={conv.padding_mode!r}")
        # Others pad by the input's size, or standardise the weight.
        if type(conv).forward not in _plain_forwards():
            raise ValueError(
                f"conv must be a plain convolution, got a {type(conv).__name__}, whose own forward would be lost"
            )
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        layer = cls(
            **{name: getattr(conv, name) for name in names},
            bias=conv.bias is not None,
            norm=getattr(conv, "norm", None),
            activation=getattr(conv, "activation", None),
            **kwargs,
        )
        layer.weight, layer.bias = conv.weight, conv.bias
        layer.conv_offset.to(conv.weight)
        # Not layer.train(): a norm that is frozen in evaluation mode stays so.
        layer.training = layer.conv_offset.training = conv.training
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[N, C, H, W] -> Tensor[N, O, Ho, Wo]"""
        offset, mask = self.predict(x)
        if self.training and not torch.compiler.is_compiling():
            record_statistics(self.name, offset, mask, limit=min(x.shape[-2:]) / 4, unit="pixels of its input map")
        x = deform_conv2d(x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The offset and the mask of deform_conv2d for an input Tensor[N, C, H, W]; a v1 layer has no mask."""
        return self.conv_offset(x), None

    def extra_repr(self) -> str:
        return super().extra_repr() + f", offset_groups={self.offset_groups}"

    def _load_from_state_dict(self, state_dict, prefix, *args):
        _rename(state_dict, prefix + "conv_offset_mask.", prefix + "conv_offset.")
        super()._load_from_state_dict(state_dict, prefix, *args)


class ModulatedDeformConv2d(DeformConv2d):
    """Modulated deformable convolution (v2, Eq. 1): `conv_offset` also predicts an amplitude for each tap.

    The mask is mask_scale * sigmoid(logit). It starts at half of mask_scale: 0.5 with the paper's 1.0, as in every
    published checkpoint; with 2.0 a freshly converted layer computes exactly the convolution it took over.
    """

    channels_per_tap = 3  # dy, dx of all taps first, then the mask logits

    def __init__(self, *args: Any, mask_scale: float = 1.0, **kwargs: Any):
        """Takes the arguments of DeformConv2d, and:

        Args:
            mask_scale: the largest modulation.

        Raises:
            ValueError: mask_scale is not above 0.
        """
        if not mask_scale > 0:
            raise ValueError(f"mask_scale must be above 0, got {mask_scale}")
        super().__init__(*args, **kwargs)
        self.mask_scale = mask_scale

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        prediction = self.conv_offset(x)
        offset, logits = prediction.tensor_split([prediction.shape[1] // 3 * 2], dim=1)
        return offset, self.mask_scale * logits.sigmoid()

    def extra_repr(self) -> str:
        return super().extra_repr() + f", mask_scale={self.mask_scale}"
