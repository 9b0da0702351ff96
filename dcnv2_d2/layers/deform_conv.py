"""Deformable convolutions that predict their own offsets (Deformable ConvNets v2, section 3.2)."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.utils import _pair

from ..ops import deform_conv2d
from .statistics import NOT_SCRIPTABLE, is_watched, record_statistics

fx.wrap("deform_conv2d")  # one call in a traced graph


def _padding_in_pixels(
    padding: str, kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> int | tuple[int, int]:
    """What nn.Conv2d means by a word"""
    if padding == "valid":
        return 0
    if padding != "same":
        raise ValueError(f'padding must be "valid", "same", a number or a pair of numbers, got {padding!r}')
    if stride != (1, 1):
        raise ValueError(f'stride must be 1 for padding "same", got {stride}')
    sums = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    if any(s % 2 for s in sums):
        raise ValueError(f'padding "same" must be as much on either side, got a kernel {kernel_size} of even size')
    return sums[0] // 2, sums[1] // 2


def dcn_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model under the names of DCNv2's `DCN` layers: `conv_offset_mask` for `conv_offset`.

    What other packages load; dcnv2_d2's layers load either. A v1 layer, which those packages have none of, keeps its.
    """
    names = {
        f"{name}.".lstrip(".") + "conv_offset."
        for name, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, ModulatedDeformConv2d)
    }
    return {
        key.replace("conv_offset.", "conv_offset_mask.") if key.rpartition(".")[0] + "." in names else key: value
        for key, value in module.state_dict().items()
    }


_Layer = TypeVar("_Layer", bound="DeformConv2d")


def _rename(state_dict: dict[str, Tensor], other: str, own: str) -> None:
    for name in ("weight", "bias"):
        if other + name in state_dict:
            state_dict[own + name] = state_dict.pop(other + name)


def _own_methods(conv: nn.Conv2d) -> list[str]:
    """Those that compute, and are neither nn.Conv2d's nor Detectron2's, which only adds norm and activation."""
    plain = [nn.Conv2d]
    try:
        from detectron2.layers import Conv2d
    except ImportError:
        pass
    else:
        plain.append(Conv2d)
    return [
        name
        for name in ("forward", "_conv_forward")
        if name in vars(conv) or getattr(type(conv), name) not in [getattr(cls, name) for cls in plain]
    ]


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
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        offset_groups: int = 1,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Takes the arguments of nn.Conv2d, and:

        Args:
            offset_groups: the input channels are divided into so many groups with offsets of their own.
            norm: applied to the output, as in detectron2.layers.Conv2d.
            activation: applied after norm.

        Raises:
            ValueError: in_channels is not a multiple of offset_groups, or padding is a word other than "valid" and
                "same", or "same" with a stride, or with a kernel that has no middle.
        """
        if isinstance(padding, str):
            padding = _padding_in_pixels(padding, _pair(kernel_size), _pair(stride), _pair(dilation))
        if offset_groups < 1 or in_channels % offset_groups:
            raise ValueError(f"offset_groups must divide in_channels ({in_channels}), got {offset_groups}")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self.offset_groups = offset_groups
        self.norm = norm
        self.activation = activation
        taps = self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset = nn.Conv2d(
            in_channels,
            self.channels_per_tap * offset_groups * taps,
            kernel_size,
            stride,
            padding,
            dilation,
            device=device,
            dtype=dtype,
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
            ValueError: conv is transposed, already deformable, pads with something else than zeros as much on either
                side, computes something of its own (a subclass's or the instance's forward, a weight that is
                parametrized, normed or pruned), has hooks, or has no weight yet (lazy).
        """
        if not isinstance(conv, nn.Conv2d) or isinstance(conv, DeformConv2d):
            raise ValueError(f"conv must be an nn.Conv2d that is not deformable yet, got {type(conv).__name__}")
        if conv.padding_mode != "zeros":
            raise ValueError(f"conv must pad with zeros, got padding_mode={conv.padding_mode!r}")
        # Others pad by the input's size, or standardise the weight.
        own = _own_methods(conv)
        if own:
            raise ValueError(
                f"conv must be a plain convolution, got a {type(conv).__name__}, whose own {own[0]} would be lost"
            )
        computed = [n for n in ("weight", "bias") if n not in conv._parameters]
        if computed:
            raise ValueError(
                f"conv must have its {computed[0]} as a parameter, got one that is computed (parametrized, normed or "
                "pruned): remove that first, and apply it again to the new layer"
            )
        if nn.parameter.is_lazy(conv.weight):
            raise ValueError("conv must have its weights, got a lazy one that has seen no input")
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if any(getattr(conv, kind) for kind in hooks):
            raise ValueError("conv must have no hooks, which would be lost: remove them, and register them anew")
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
        """Tensor[N, C, H, W] -> Tensor[N, O, Ho, Wo]; one image Tensor[C, H, W] -> Tensor[O, Ho, Wo]"""
        if isinstance(x, Tensor) and x.dim() == 3:  # torch.fx traces with stand-ins
            return self(x[None])[0]
        offset, mask = self.predict(x)
        if is_watched(self, x):
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

    def __prepare_scriptable__(self):
        raise NotImplementedError(NOT_SCRIPTABLE)

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

    def __init__(
        self,
        *args: Any,
        mask_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ):
        """Takes the arguments of DeformConv2d, and:

        Args:
            mask_scale: the largest modulation.

        Raises:
            ValueError: mask_scale is not above 0.
        """
        if not mask_scale > 0:
            raise ValueError(f"mask_scale must be above 0, got {mask_scale}")
        super().__init__(*args, device=device, dtype=dtype, **kwargs)  # by name: torch.nn.utils.skip_init asks
        self.mask_scale = mask_scale

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        prediction = self.conv_offset(x)
        offsets = 2 * self.offset_groups * self.kernel_size[0] * self.kernel_size[1]
        return prediction[:, :offsets], self.mask_scale * prediction[:, offsets:].sigmoid()

    def extra_repr(self) -> str:
        return super().extra_repr() + f", mask_scale={self.mask_scale}"
