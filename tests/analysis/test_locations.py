"""Effective sampling and bin locations: hand-set ones come back, and their gradients are those by differences."""

from functools import partial

import pytest
import torch
from dcnv2_d2.analysis import BackboneNode, RoINode, effective_locations
from dcnv2_d2.layers import DeformConv2d, ModulatedDeformConv2d
from torch import nn

from .detectors import REGULAR, Detector, real

H, W = 32, 48
MDCONV, MDPOOL = "mask_rcnn_small_mdconv_c3-c5", "mask_rcnn_small_mdconv_c3-c5_mdpool"


def shifts(taps=9):
    """(dy, dx) of each tap: all different, none whole, none with its own mirror image."""
    return torch.stack([torch.linspace(-2.35, 2.1, taps), torch.linspace(1.7, -0.6, taps)], dim=1)


def hand_set(cls=ModulatedDeformConv2d, channels=3, stride=1, dilation=1):
    layer = cls(channels, 4, 3, stride, dilation, dilation, bias=False)
    bias = layer.conv_offset.bias.data
    bias[:18] = shifts().flatten()
    if cls is ModulatedDeformConv2d:
        bias[18:] = torch.linspace(-2, 2, 9)
    return layer


def smooth_image(height=H, width=W):
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.sin(ys / 3 + c) + torch.cos(xs / (4 + c)) for c in range(3)]) * 50 + 120


def locate(model, node, image=None, layers=""):
    image = smooth_image() if image is None else image
    return effective_locations(partial(node.respond, model), image, model, layers)


def taps(reach=1):
    return torch.tensor([[y, x] for y in (-reach, 0, reach) for x in (-reach, 0, reach)]).float()


@pytest.mark.parametrize("cls", [DeformConv2d, ModulatedDeformConv2d])
@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 2)])
def test_hand_set_offsets(cls, stride, dilation):
    (found,) = locate(Detector(hand_set(cls, stride=stride, dilation=dilation)), BackboneNode(20, 12))
    expected = torch.tensor([12.0, 20.0]) + taps(dilation) + shifts()
    torch.testing.assert_close(found.position, expected, rtol=0, atol=1e-5)
    expected = torch.ones(9) if cls is DeformConv2d else torch.linspace(-2, 2, 9).sigmoid()
    torch.testing.assert_close(found.modulation, expected)
    assert found.name == "backbone.0" and not found.of_bins
    torch.testing.assert_close(found.strength, found.gradient.square().sum(dim=1).sqrt())


@pytest.mark.parametrize("before", [0, 2])
def test_the_gradient_is_that_by_differences(before):
    layer = hand_set(channels=3)
    stem = [nn.Conv2d(3, 3, 1, 2, bias=False) for _ in range(before)]
    for conv in stem:
        conv.weight.data = torch.eye(3)[..., None, None]
    model, node = Detector(*stem, layer), BackboneNode(20, 12)
    (found,) = locate(model, node)
    stride, bias, eps = 2**before, layer.conv_offset.bias.data, 1e-2
    for tap in range(9):
        for axis in range(2):
            values = []
            for sign in (1, -1):
                bias[2 * tap + axis] += sign * eps
                with torch.no_grad():
                    values.append(node.respond(model, smooth_image()[None]).double().norm().item())
                bias[2 * tap + axis] -= sign * eps
            expected = (values[0] - values[1]) / (2 * eps) / stride  # per image pixel
            assert found.gradient[tap, axis].item() == pytest.approx(expected, rel=2e-2, abs=2e-2)
    torch.testing.assert_close(
        found.position, torch.tensor([12.0, 20.0]) + stride * (taps() + shifts()), rtol=0, atol=1e-4
    )


def test_a_regular_layer_is_a_deformable_one_without_offsets():
    conv = nn.Conv2d(3, 4, 3, 1, 1)
    image, node = torch.rand(3, H, W) * 255, BackboneNode(20, 12)
    (regular,) = locate(Detector(conv), node, image)
    (deformable,) = locate(Detector(DeformConv2d.from_conv(conv)), node, image)
    assert torch.equal(regular.position, torch.tensor([12.0, 20.0]) + taps())
    for name in ("position", "gradient", "modulation"):
        assert torch.equal(getattr(regular, name), getattr(deformable, name))
    assert (regular.modulation == 1).all() and (regular.strength > 0).all()


def test_stacked_layers_and_what_feeds_the_node():
    model = Detector(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 3, 1, 1))
    found = locate(model, BackboneNode(20, 12), torch.rand(3, H, W) * 255)
    assert [layer.name for layer in found] == ["backbone.0", "backbone.1", "backbone.3"]
    sets = [{tuple(p) for p in layer.position.tolist()} for layer in found]
    # The last one samples every second image pixel, the one below reaches a step farther, the first every pixel.
    assert sets[2] == {(12.0 + y, 20.0 + x) for y in (-2, 0, 2) for x in (-2, 0, 2)}
    assert sets[1] == {(12.0 + y, 20.0 + x) for y in range(-4, 5, 2) for x in range(-4, 5, 2)}
    assert sets[0] == {(12.0 + y, 20.0 + x) for y in range(-5, 6) for x in range(-5, 6)}
    assert [len(layer.position) for layer in found] == [25 * 9, 9 * 9, 9]


@pytest.mark.parametrize("x, y, inside", [(0, 0, {4, 5, 7, 8}), (W - 1, 12, {0, 1, 3, 4, 6, 7}), (20, H - 1, range(6))])
def test_a_node_at_the_border(x, y, inside):
    (found,) = locate(Detector(nn.Conv2d(3, 4, 3, 1, 1)), BackboneNode(x, y), torch.rand(3, H, W) * 255)
    assert torch.equal(found.position, (torch.tensor([float(y), x]) + taps())[sorted(inside)])


def test_layers_that_do_not_feed_the_node_are_left_out():
    model, image = real(MDCONV), torch.rand(3, 64, 64) * 255
    node = BackboneNode(20, 40, "res4")
    names = [layer.name for layer in locate(model, node, image, r"res[345]\.")]
    assert names and all("res3" in name or "res4" in name for name in names)
    assert names == sorted(names)
    names = [layer.name for layer in locate(model, BackboneNode(20, 40), image, "stem|res5.1")]
    assert names == [f"backbone.bottom_up.{name}" for name in ("stem.conv1", "res5.1.conv1", "res5.1.conv2")]


# --- RoI pooling


@pytest.mark.parametrize("args, bins", [((MDCONV,), 5), ((MDCONV, *REGULAR), 5), ((MDPOOL, *REGULAR), 7)])
def test_bins_of_a_real_detector(args, bins):
    model, image, box = real(*args), torch.rand(3, 64, 72) * 255, (8.0, 12.0, 43.0, 33.0)
    found = locate(model, RoINode(*box), image, r"res5\.")
    assert [layer.of_bins for layer in found] == [False] * 4 + [True]
    assert found[-1].name == "roi_heads.box_pooler.level_poolers.0"
    (x1, y1, x2, y2), steps = box, (torch.arange(bins) + 0.5) / bins
    ys, xs = torch.meshgrid(y1 + (y2 - y1) * steps, x1 + (x2 - x1) * steps, indexing="ij")
    regular = torch.stack([ys, xs], dim=-1).flatten(0, 1) - 0.5
    offset = torch.zeros(bins * bins, 2)
    if args[0] == MDPOOL:
        layer = model.roi_heads.box_pooler.level_poolers[0]
        features = model.backbone(model.preprocess_image([{"image": image}]).tensor)["res5"]
        predicted, mask = layer.predict(features, torch.tensor([[0, *box]]))
        size = torch.tensor([x2 - x1, y2 - y1])
        offset = (0.1 * size[:, None, None] * predicted[0]).flatten(1).T.flip(1).detach()
        assert offset.abs().max() > 0.5
        torch.testing.assert_close(found[-1].modulation, mask[0, 0].flatten().detach())
    else:
        assert (found[-1].modulation == 1).all()
    torch.testing.assert_close(found[-1].position, regular + offset, rtol=0, atol=1e-3)


def test_the_gradient_of_bins_is_that_by_differences():
    model, image, node = real(MDPOOL), smooth_image(64, 64), RoINode(10, 14, 52, 42)
    found = locate(model, node, image, r"res5\.")[-1]
    bias, eps = model.roi_heads.box_pooler.level_poolers[0].branch[-1].bias.data, 1e-2
    strongest = found.strength.argsort(descending=True)[:4].tolist()
    assert len(found.position) == 49
    for i in strongest:
        for axis, block, side in ((0, 1, 28), (1, 0, 42)):  # (y, x) of positions; blocks x, y of the offset
            values = []
            for sign in (1, -1):
                bias[49 * block + i] += sign * eps
                with torch.no_grad():
                    values.append(node.respond(model, image[None]).double().norm().item())
                bias[49 * block + i] -= sign * eps
            expected = (values[0] - values[1]) / (2 * eps) / (0.1 * side)
            assert found.gradient[i, axis].item() == pytest.approx(
                expected, rel=0.1, abs=0.1 * found.strength[i].item()
            )


@pytest.mark.parametrize("kind", ["ROIAlign", "ROIPool"])
def test_poolers_that_have_no_locations(kind):
    model, image = real(MDCONV, "MODEL.ROI_BOX_HEAD.POOLER_TYPE", kind), torch.rand(3, 64, 64) * 255
    with pytest.raises(ValueError, match="the pooler must be ROIAlignV2 or a deformable one"):
        locate(model, RoINode(8, 8, 40, 40), image)
    assert locate(model, BackboneNode(8, 8), image)


# --- what is left behind


@pytest.mark.parametrize("args", [(MDPOOL,), (MDCONV, *REGULAR)])
@pytest.mark.parametrize("node", [BackboneNode(20, 40), RoINode(8, 12, 40, 33)])
def test_the_model_is_left_as_it_was(args, node):
    model, image = real(*args), torch.rand(3, 64, 64) * 255
    expected = node.respond(model, image[None])
    with torch.no_grad():
        found = locate(model, node, image, r"res[345]\.")
    assert torch.equal(node.respond(model, image[None]), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "predict" in vars(m) for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(not t.requires_grad for layer in found for t in (layer.position, layer.gradient, layer.modulation))
    with pytest.raises(ValueError):
        locate(model, BackboneNode(-20, 40), image)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "predict" in vars(m) for m in model.modules())


def test_frozen_parameters_do_not_matter():
    model, image, node = real(MDPOOL), torch.rand(3, 64, 64) * 255, RoINode(8, 12, 40, 33)
    expected = locate(model, node, image)
    for found, layer in zip(locate(model.requires_grad_(False), node, image), expected, strict=True):
        torch.testing.assert_close(found.gradient, layer.gradient)


def test_no_such_layers():
    with pytest.raises(ValueError, match=r"layers must choose at least one convolution .* got 'res9'"):
        locate(Detector(nn.Conv2d(3, 4, 3)), BackboneNode(4, 4), layers="res9")
