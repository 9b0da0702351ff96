"""Turns parts of an existing model deformable."""

import re
from collections.abc import Callable

from torch import nn

from .deform_conv import DeformConv2d, ModulatedDeformConv2d, accept_sibling_names


def replace_convs(
    module: nn.Module,
    where: str | Callable[[str, nn.Conv2d], bool],
    *,
    modulated: bool = True,
    offset_groups: int = 1,
    mask_scale: float = 1.0,
) -> list[str]:
    """Makes the chosen convolutions of a model deformable, in place; all their weights stay.

    Convolutions with a 1x1 kernel, and those that are deformable already, are passed over: calling it twice is the same
    as calling it once.

    Args:
        module: any model made of nn.Conv2d: a Detectron2 backbone, a head, torchvision's ResNet.
        where: a regular expression to be found in the convolution's name, or a function of (name, convolution).
        modulated: v2; False makes v1 layers, without a mask.
        offset_groups, mask_scale: see ModulatedDeformConv2d.

    Returns:
        The names of the replaced convolutions.

    Raises:
        ValueError: `where` chooses no convolution larger than 1x1, or one that cannot be converted (see from_conv).
    """
    if isinstance(where, str):
        pattern = re.compile(where)
        chooses = lambda name, conv: pattern.search(name)  # noqa: E731
    else:
        chooses = where
    # A convolution that is used in two places has two names; it becomes one layer in both.
    modules = dict(module.named_modules(remove_duplicate=False))
    own = {id(m.conv_offset) for m in modules.values() if isinstance(m, DeformConv2d)}
    chosen = {
        name: conv
        for name, conv in modules.items()
        if isinstance(conv, nn.Conv2d) and id(conv) not in own and conv.kernel_size != (1, 1) and chooses(name, conv)
    }
    if "" in chosen:
        raise ValueError("module must be a model that holds convolutions, got a convolution: use from_conv")
    if not chosen:
        raise ValueError(f"where must choose at least one convolution larger than 1x1 of the module, got {where!r}")

    layers = {}
    for name, conv in chosen.items():
        if isinstance(conv, DeformConv2d):
            continue
        if id(conv) not in layers:
            if modulated:
                layer = ModulatedDeformConv2d.from_conv(conv, offset_groups=offset_groups, mask_scale=mask_scale)
            else:
                layer = DeformConv2d.from_conv(conv, offset_groups=offset_groups)
            layer.name = name
            layers[id(conv)] = layer
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, layers[id(conv)])
        modules[parent].register_load_state_dict_pre_hook(accept_sibling_names)
    _replace_in_lists(modules.values(), layers)
    return [name for name, conv in chosen.items() if id(conv) in layers]


def _replace_in_lists(modules, layers: dict[int, nn.Module]) -> None:
    """Some modules run their children from plain lists of their own, as Detectron2's FPN does."""
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, list):
                value[:] = [layers.get(id(item), item) for item in value]
