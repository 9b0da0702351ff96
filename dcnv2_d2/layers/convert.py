"""Turns parts of an existing model deformable."""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from torch import nn

from .deform_conv import DeformConv2d, ModulatedDeformConv2d, accept_sibling_names


def replace_convs(
    module: nn.Module,
    where: str | Callable[[str, nn.Conv2d], bool],
    *,
    modulated: bool = True,
    offset_groups: int = 1,
    mask_scale: float = 1.0,
    dry_run: bool = False,
) -> list[str]:
    """Makes the chosen convolutions of a model deformable, in place; all their weights stay.

    Convolutions with a 1x1 kernel, and those that are deformable already, are passed over: calling it twice is the same
    as calling it once.

    Args:
        module: any model made of nn.Conv2d: a Detectron2 backbone, a head, torchvision's ResNet.
        where: a regular expression to be found in the convolution's name, or a function of (name, convolution).
        modulated: v2; False makes v1 layers, without a mask.
        offset_groups, mask_scale: see ModulatedDeformConv2d.
        dry_run: print what would become of each, and change nothing.

    Returns:
        The names of the replaced convolutions.

    Raises:
        ValueError: `where` chooses no convolution larger than 1x1, or one that cannot be converted (see from_conv).
            Nothing is replaced then.
    """
    chooses = where if callable(where) else partial(_has, re.compile(where))
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
        points = [n for n, m in modules.items() if _is_point(m) and id(m) not in own and chooses(n, m)]
        found = f", which finds 1x1 ones only: {', '.join(points[:3])}" if points else ""
        raise ValueError(
            f"where must choose at least one convolution larger than 1x1 of the module, got {where!r}{found}"
        )

    layers = {}
    for name, conv in chosen.items():
        if not isinstance(conv, DeformConv2d) and id(conv) not in layers:
            layer: DeformConv2d
            try:
                if modulated:
                    layer = ModulatedDeformConv2d.from_conv(conv, offset_groups=offset_groups, mask_scale=mask_scale)
                else:
                    layer = DeformConv2d.from_conv(conv, offset_groups=offset_groups)
            except ValueError as e:
                raise ValueError(f"{name} cannot become deformable: {e}") from None
            layer.name = name
            layers[id(conv)] = layer
    replaced = {name: layers[id(conv)] for name, conv in chosen.items() if id(conv) in layers}
    if dry_run:
        _print_plan(replaced)
        return list(replaced)
    for name, layer in replaced.items():
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, layer)
        modules[parent].register_load_state_dict_pre_hook(accept_sibling_names)
    _replace_in_lists(modules.values(), layers)
    return list(replaced)


def _has(pattern: re.Pattern, name: str, conv: nn.Conv2d) -> bool:
    return pattern.search(name) is not None


def _is_point(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)


def _print_plan(replaced: dict[str, DeformConv2d]) -> None:
    total = 0
    for name, layer in replaced.items():
        added = sum(p.numel() for p in layer.conv_offset.parameters())
        total += added
        size = "x".join(map(str, layer.kernel_size))
        print(
            f"{name}: {size} {layer.in_channels} -> {layer.out_channels}, {type(layer).__name__}, +{added:,} parameters"
        )
    print(f"{len(replaced)} convolutions would become deformable, +{total:,} parameters")


def _replace_in_lists(modules: Iterable[nn.Module], layers: Mapping[int, nn.Module]) -> None:
    """Some modules run their children from plain lists of their own, as Detectron2's FPN does."""
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, list):
                value[:] = [layers.get(id(item), item) for item in value]
