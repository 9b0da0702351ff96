"""Other predictions of offset and mask become the joint ones of this package, with the same function."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..layers import ModulatedDeformConv2d


def add_mask_logits(state_dict: dict[str, Tensor], model: nn.Module, prefix: str = "") -> None:
    """Makes v1 weights fit a v2 model, in place: the prediction convolutions get mask logits of 0, as in a new layer.

    Args:
        state_dict: with any of the names that the layers accept; what has the model's shapes already stays.
        model: the v2 model.
        prefix: of all names in state_dict.
    """
    for layer_name, layer in model.named_modules():
        if not isinstance(layer, ModulatedDeformConv2d):
            continue
        path = prefix + layer_name
        for convolution in (f"{path}.conv_offset", f"{path}.conv_offset_mask", f"{path}_offset"):
            for kind, own in layer.conv_offset.named_parameters():
                given = state_dict.get(f"{convolution}.{kind}")
                if given is not None and len(given) * 3 == len(own) * 2:
                    logits = own.new_zeros((len(own) - len(given), *own.shape[1:]))
                    state_dict[f"{convolution}.{kind}"] = torch.cat([torch.as_tensor(given).to(logits), logits])


def join_prediction_convs(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts blocks with a `p_conv` for offsets and an `m_conv` for the mask, as in pytorch-deform-conv-v2.

    `<block>.conv.*` becomes `<block>.*`, the two others `<block>.conv_offset.*`. There the offsets are the rows of all
    taps, then the columns; here they alternate. All other tensors stay. Without m_conv the result is a v1 layer.

    Raises:
        ValueError: there is no such block, or one whose convolution is not 3x3: its predictions are, always.
    """
    blocks = [name.removesuffix("p_conv.weight") for name in state_dict if name.endswith("p_conv.weight")]
    if not blocks:
        raise ValueError("state_dict must have blocks with p_conv, got none")
    joined = dict(state_dict)
    for block in blocks:
        weight = joined.pop(f"{block}conv.weight", None)
        if weight is None or tuple(weight.shape[2:]) != (3, 3):
            got = "none" if weight is None else "x".join(map(str, weight.shape[2:]))
            raise ValueError(f"{block}conv.weight must be that of a 3x3 convolution, got {got}")
        joined[f"{block}weight"] = weight
        if f"{block}conv.bias" in joined:
            joined[f"{block}bias"] = joined.pop(f"{block}conv.bias")
        for kind in ("weight", "bias"):
            rows, columns = joined.pop(f"{block}p_conv.{kind}").chunk(2)
            parts = [torch.stack([rows, columns], dim=1).flatten(0, 1)]
            if f"{block}m_conv.{kind}" in joined:
                parts.append(joined.pop(f"{block}m_conv.{kind}"))
            joined[f"{block}conv_offset.{kind}"] = torch.cat(parts)
    return joined


def join_pool_branch(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts the separate branches of mmcv's modulated pooling: offset_fc.0, 2, 4 and mask_fc.0, 2 -> branch.0, 2, 4.

    The hidden layers stand side by side. That of the mask passes the second one through an identity: its values are
    0 or more after the first ReLU, so the second leaves them alone. Without mask_fc (v1) it is a mere change of names.

    Args:
        state_dict: of one level, with names from `offset_fc` or `mask_fc` on.
    """
    offset = {name.removeprefix("offset_fc."): t for name, t in state_dict.items() if name.startswith("offset_fc.")}
    mask = {name.removeprefix("mask_fc."): t for name, t in state_dict.items() if name.startswith("mask_fc.")}
    if not mask:
        return {f"branch.{name}": tensor for name, tensor in offset.items()}
    hidden = mask["0.bias"]
    return {
        "branch.0.weight": torch.cat([offset["0.weight"], mask["0.weight"]]),
        "branch.0.bias": torch.cat([offset["0.bias"], mask["0.bias"]]),
        "branch.2.weight": torch.block_diag(offset["2.weight"], torch.eye(len(hidden)).to(hidden)),
        "branch.2.bias": torch.cat([offset["2.bias"], torch.zeros_like(hidden)]),
        "branch.4.weight": torch.block_diag(offset["4.weight"], mask["2.weight"]),
        "branch.4.bias": torch.cat([offset["4.bias"], mask["2.bias"]]),
    }
