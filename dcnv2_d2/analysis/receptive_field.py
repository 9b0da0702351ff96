"""The effective receptive field of a node (Deformable ConvNets v2, section 2)."""

import torch
from torch import Tensor

from .nodes import Respond, magnitude


def effective_receptive_field(respond: Respond, image: Tensor) -> Tensor:
    """How much the node's response changes with the intensity of each pixel, its colours together.

    Args:
        respond: gives the node's response to images, such as functools.partial(node.respond, model).
        image (Tensor[3, H, W]): of intensity 0 to 255.

    Returns:
        Tensor[H, W]: the absolute value of the derivative of the response's norm.

    Raises:
        ValueError: the response is zero.
    """
    with torch.enable_grad():
        image = image.detach().float().requires_grad_()
        (gradient,) = torch.autograd.grad(magnitude(respond(image[None])), image)
    return gradient.sum(dim=0).abs()
