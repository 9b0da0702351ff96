"""The RoI pooling layers: what their branch predicts, and what a layer that borrows a branch does."""

import copy
import logging
import math
import pickle

import pytest
import torch
from dcnv2_d2.layers import DeformRoIPool, ModulatedDeformRoIPool
from dcnv2_d2.ops import deform_roi_pool
from detectron2.layers import ROIAlign
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from ..reference import TOLERANCE, assert_near
from ..reference_pool import shifted_roi_align

CLASSES = [DeformRoIPool, ModulatedDeformRoIPool]
SCALE, GAMMA = 0.5, 0.3
# Two images of 22 x 28 pixels. One box reaches over the border, one is a point.
BOXES = [[1, 2.3, 3.1, 17.4, 13.7], [0, -3.2, 1.7, 9.9, 20.3], [1, 12.2, 5.5, 31.1, 19.9], [0, 7.3, 8.1, 7.3, 8.1]]


def make(cls, output_size=(3, 5), dtype=torch.float64, device="cpu", reach=0.0, sampling_ratio=2, **kwargs):
    """A layer for 6 channels; with `reach`, random parameters that predict offsets of about that size."""
    if cls is ModulatedDeformRoIPool:
        kwargs = {"hidden_dims": (8, 7), **kwargs}
    layer = cls(6, output_size, SCALE, sampling_ratio, gamma=kwargs.pop("gamma", GAMMA), **kwargs).to(device, dtype)
    if reach:
        for p in layer.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=reach / math.sqrt(p.shape[1]))
            else:
                nn.init.uniform_(p, 0, reach)  # positive: no ReLU is dead
    return layer


def set_prediction(layer, dx=0.0, dy=0.0, logit=0.0):
    """The last layer predicts these, whatever the features: numbers, or one for each bin in row-major order."""
    values = (dx, dy, logit)[: layer.channels_per_bin]
    bins = math.prod(layer.output_size)
    with torch.no_grad():
        layer.branch[-1].weight.zero_()
        layer.branch[-1].bias[:] = torch.cat([torch.as_tensor(v).double().expand(bins) for v in values])
    return layer


def image(n=2, dtype=torch.float64, device="cpu"):
    return torch.randn(n, 6, 11, 14, dtype=dtype, device=device)


def boxes(dtype=torch.float64, device="cpu"):
    return torch.tensor(BOXES, dtype=dtype, device=device)


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


def parameters(*args, **kwargs):
    with torch.device("meta"):
        return sum(p.numel() for p in args[0](*args[1:], **kwargs).parameters())


def test_parameter_counts_of_the_paper():
    assert parameters(ModulatedDeformRoIPool, 256, 7) == 14_046_355
    assert parameters(DeformRoIPool, 256, 7) == 1_229_410


@pytest.mark.parametrize("hidden_dims", [None, (), (9,), (6, 5, 4)])
@pytest.mark.parametrize("output_size", [1, 7, (3, 5)])
@pytest.mark.parametrize("cls, per_bin, default", [(DeformRoIPool, 2, ()), (ModulatedDeformRoIPool, 3, (1024, 1024))])
def test_parameter_counts(cls, per_bin, default, output_size, hidden_dims):
    bins = math.prod((output_size, output_size) if isinstance(output_size, int) else output_size)
    widths = [5 * bins, *(default if hidden_dims is None else hidden_dims), per_bin * bins]
    expected = sum((i + 1) * o for i, o in zip(widths[:-1], widths[1:], strict=True))
    kwargs = {} if hidden_dims is None else {"hidden_dims": hidden_dims}
    assert parameters(cls, 5, output_size, **kwargs) == expected


def test_defaults_of_the_paper():
    layer = ModulatedDeformRoIPool(2, 3)
    assert (layer.mask_scale, layer.gamma, layer.sampling_ratio, layer.spatial_scale) == (1.0, 0.1, 2, 1.0)
    assert [type(m) for m in layer.branch] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert [type(m) for m in DeformRoIPool(2, 3).branch] == [nn.Linear]


@pytest.mark.parametrize("cls", CLASSES)
def test_initialisation(cls):
    *hidden, last = (m for m in cls(32, 5, hidden_dims=(300, 250)).branch if isinstance(m, nn.Linear))
    assert len(hidden) == 2 and not last.weight.any() and not last.bias.any()
    for linear in hidden:
        assert not linear.bias.any()
        # 75,000 values and more: their mean and deviation are known to 1 %, and a uniform distribution ends at 0.0173.
        assert abs(linear.weight.mean()) < 2e-4 and abs(linear.weight.std() - 0.01) < 2e-4
        assert 0.035 < linear.weight.abs().max() < 0.07


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mask_scale", [None, 0.5, 1.0, 2.0], ids="mask_scale={}".format)
@pytest.mark.parametrize("output_size, sampling_ratio", [((3, 5), 2), (7, 1), ((4, 1), -1)])
def test_fresh_layer_is_roi_align_times_half_of_mask_scale(output_size, sampling_ratio, mask_scale, dtype, device):
    cls, kwargs = (DeformRoIPool, {}) if mask_scale is None else (ModulatedDeformRoIPool, {"mask_scale": mask_scale})
    layer = make(cls, output_size, dtype, device, sampling_ratio=sampling_ratio, **kwargs)
    x, b = image(dtype=dtype, device=device), boxes(dtype, device)
    expected = roi_align(x.double(), b.double(), output_size, SCALE, sampling_ratio, aligned=True)
    assert_near(layer(x, b), expected * (1 if mask_scale is None else mask_scale / 2), TOLERANCE[dtype])


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("axis", ["dx", "dy"])
def test_an_offset_of_one_moves_every_bin_by_gamma_times_the_box(axis, cls):
    layer, x, b = set_prediction(make(cls), **{axis: 1.0}), image(), boxes()
    column = {"dx": 1, "dy": 2}[axis]
    moved = b.clone()
    moved[:, [column, column + 2]] += GAMMA * (b[:, column + 2] - b[:, column])[:, None]
    expected = roi_align(x, moved, (3, 5), SCALE, 2, aligned=True)
    assert_near(layer(x, b), expected * (0.5 if cls is ModulatedDeformRoIPool else 1), 1e-12)


@pytest.mark.parametrize("cls", CLASSES)
def test_order_of_the_branch_s_outputs(cls):
    dx, dy, logit = torch.randn(3, 15, dtype=torch.float64)
    layer, x, b = set_prediction(make(cls), dx, dy, logit), image(), boxes()
    offset = torch.stack([dx, dy]).view(1, 2, 3, 5).expand(4, -1, -1, -1)
    mask = logit.sigmoid().view(1, 1, 3, 5).expand(4, -1, -1, -1) if cls is ModulatedDeformRoIPool else None
    predicted = layer.predict(x, b)
    assert torch.equal(predicted[0], offset) and (predicted[1] is None) == (mask is None)
    if mask is not None:
        assert_near(predicted[1], mask, 1e-15)
    assert_near(layer(x, b), shifted_roi_align(x, b, offset, (3, 5), SCALE, 2, GAMMA, mask), 1e-12)


def by_hand(layer, x, b):
    """The layer's definition, from torchvision's roi_align and matrix products."""
    size = layer.output_size
    hidden = roi_align(x, b, size, SCALE, 2, aligned=True).flatten(1)
    *linears, last = (m for m in layer.branch if isinstance(m, nn.Linear))
    for linear in linears:
        hidden = (hidden @ linear.weight.T + linear.bias).clamp(min=0)
    x_block, y_block, *logits = (hidden @ last.weight.T + last.bias).split(math.prod(size), dim=1)
    offset = torch.stack([x_block, y_block], 1).view(-1, 2, *size)
    return offset, layer.mask_scale * logits[0].view(-1, 1, *size).sigmoid() if logits else None


@pytest.mark.parametrize("cls, kwargs", [
    (DeformRoIPool, {}), (DeformRoIPool, {"hidden_dims": (9,)}), (ModulatedDeformRoIPool, {"mask_scale": 1.5}),
    (ModulatedDeformRoIPool, {"output_size": 7, "hidden_dims": ()}),
])  # fmt: skip
def test_forward_and_gradients_by_hand(cls, kwargs):
    layer, b = make(cls, reach=2, **kwargs), boxes()
    twin, x = copy.deepcopy(layer), image().requires_grad_()
    x_twin = x.detach().clone().requires_grad_()
    offset, mask = by_hand(twin, x_twin, b)
    assert offset.abs().max() > 1 and offset.std(0).max() > 0.1  # far, and of each box's own
    actual = layer(x, b)
    assert_near(actual, shifted_roi_align(x_twin, b, offset, layer.output_size, SCALE, 2, GAMMA, mask), 1e-12)
    actual.square().sum().backward()
    deform_roi_pool(x_twin, b, offset, layer.output_size, SCALE, 2, GAMMA, mask).square().sum().backward()
    assert_near(x.grad, x_twin.grad, 1e-11)
    for name, grad in gradients(twin).items():
        assert grad.any(), name
        assert_near(gradients(layer)[name], grad, 1e-11, name)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_fresh_layer_learns_to_bend(cls, device):
    layer = make(cls, device=device)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(2):  # the hidden layers have a gradient once the last one is not zero
        optimizer.zero_grad()
        layer(image(device=device), boxes(device=device)).square().sum().backward()
        optimizer.step()
    assert all(grad.any() for grad in gradients(layer).values())


@pytest.mark.parametrize("counts", [[2, 2], [0, 3], [3, 0], [0, 0]], ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_boxes_as_a_list(cls, counts):
    layer, x = make(cls, reach=1), image()
    per_image = [boxes()[:n, 1:] for n in counts]
    index = torch.arange(2).repeat_interleave(torch.tensor(counts))[:, None]
    actual = layer(x, per_image)
    assert actual.shape == (sum(counts), 6, 3, 5)
    assert torch.equal(actual, layer(x, torch.cat([index, torch.cat(per_image)], 1)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("empty", [lambda: torch.zeros(0, 5), lambda: [torch.zeros(0, 4)] * 2], ids=["5", "list"])
@pytest.mark.parametrize("borrows", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_no_boxes(cls, borrows, empty, training):
    owner = make(cls, reach=1)
    layer = (make(cls, (6, 10), branch_from=owner) if borrows else owner).train(training)
    x = image().requires_grad_()
    with EventStorage() as storage:
        out = layer(x, empty())
    assert out.shape == (0, 6, *layer.output_size) and not storage.latest()
    out.sum().backward()
    assert x.grad.shape == x.shape and not x.grad.any()
    # Distributed training waits for every parameter's gradient.
    assert all(grad is not None and not grad.any() for grad in gradients(owner).values())


@pytest.mark.parametrize("size", [(6, 10), (7, 5), (4, 6), (2, 3), (3, 5)], ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_borrower_uses_the_nearest_predicted_bin(cls, size):
    owner, x, b = make(cls, reach=2), image(), boxes()
    layer = make(cls, size, branch_from=owner)
    assert not list(layer.parameters()) and not list(layer.modules())[1:] and not layer.state_dict()
    assert layer.branch_owner is owner and "branch of another" in repr(layer) and "branch of another" not in repr(owner)
    rows = torch.tensor([i * 3 // size[0] for i in range(size[0])])
    columns = torch.tensor([j * 5 // size[1] for j in range(size[1])])
    lent = owner.predict(x, b)
    offset, mask = (None if t is None else t[:, :, rows[:, None], columns] for t in lent)
    if size == (6, 10):  # each predicted bin serves the 2 x 2 that cover it
        assert torch.equal(offset, lent[0].repeat_interleave(2, 2).repeat_interleave(2, 3))
    predicted = layer.predict(x, b)
    assert torch.equal(predicted[0], offset) and (predicted[1] is None) == (mask is None)
    if mask is not None:
        assert_near(predicted[1], mask, 1e-15)  # the sigmoid's last bit depends on the place in memory
    assert_near(layer(x, b), shifted_roi_align(x, b, offset, size, SCALE, 2, GAMMA, mask), 1e-12)


def test_a_mask_pooler_of_14x14_adds_nothing_to_the_count():
    with torch.device("meta"):
        box = ModulatedDeformRoIPool(256, 7)
        both = nn.ModuleList([box, ModulatedDeformRoIPool(256, 14, branch_from=box)])
    assert sum(p.numel() for p in both.parameters()) == 14_046_355


@pytest.mark.parametrize("cls", CLASSES)
def test_a_borrower_keeps_its_own_gamma_and_mask_scale(cls):
    owner, x, b = make(cls, reach=1), image(), boxes()
    kwargs = {"mask_scale": 0.7} if cls is ModulatedDeformRoIPool else {}
    between = make(cls, (4, 4), branch_from=owner)
    layer = make(cls, (6, 10), branch_from=between, gamma=0.05, **kwargs)
    assert layer.branch_owner is owner
    offset, mask = (None if t is None else F.interpolate(t, (6, 10)) for t in owner.predict(x, b))
    mask = None if mask is None else 0.7 * mask
    assert_near(layer(x, b), shifted_roi_align(x, b, offset, (6, 10), SCALE, 2, 0.05, mask), 1e-12)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_owner_s_branch_learns_from_both(cls):
    owner, x, b = make(cls, reach=1), image(), boxes()
    layer = make(cls, (6, 10), branch_from=owner)
    losses = {"owner": lambda: owner(x, b).square().sum(), "borrower": lambda: layer(x, b).square().sum()}
    grads = {}
    for name, loss in losses.items():
        owner.zero_grad()
        loss().backward()
        grads[name] = gradients(owner)
        assert all(grad.any() for grad in grads[name].values()), name
    owner.zero_grad()
    sum(loss() for loss in losses.values()).backward()
    for name, grad in gradients(owner).items():
        assert_near(grad, grads["owner"][name] + grads["borrower"][name], 1e-11, name)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_copied_borrower_belongs_to_the_copied_owner(cls, duplicate):
    box = make(cls, reach=1)
    model, x, b = nn.ModuleDict({"mask": make(cls, (6, 10), branch_from=box), "box": box}), image(), boxes()
    twin = duplicate(model)
    expected = model["mask"](x, b)
    assert twin["mask"].branch_owner is twin["box"] and torch.equal(twin["mask"](x, b), expected)
    with torch.no_grad():
        twin["box"].branch[-1].bias += 1
    assert torch.equal(model["mask"](x, b), expected) and not torch.equal(twin["mask"](x, b), expected)
    state = model.state_dict()
    assert {name.split(".branch.")[0] for name in state} == {"box"}
    assert len(list(twin.parameters())) == len(state) == len(list(box.parameters()))
    twin.load_state_dict(state)
    assert torch.equal(twin["mask"](x, b), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("borrows", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_autocast(cls, borrows, dtype, training, device):
    owner = make(cls, dtype=torch.float32, device=device, reach=0.3)
    layer = (make(cls, (6, 10), branch_from=owner) if borrows else owner).train(training)
    # Far from the border, where a sample that rounding moves out of the map jumps to 0.
    x, b = image(dtype=dtype, device=device), torch.tensor([[1, 7.3, 6.1, 17.4, 13.7], [0, 6.2, 7.7, 15.9, 12.3]])
    expected = layer(x.float(), b.to(device))
    with torch.autocast(device, torch.bfloat16):
        actual = layer(x, b.to(device))
    assert actual.dtype == dtype  # the map's
    assert_near(actual, expected, 0.03)
    actual.float().square().sum().backward()
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in gradients(owner).values())


@pytest.mark.parametrize("cls, borrows", [(DeformRoIPool, False), (ModulatedDeformRoIPool, True)])
def test_compiles_in_one_graph(cls, borrows):
    owner, x, b = make(cls, reach=1), image(), boxes()
    layer = make(cls, (6, 10), branch_from=owner) if borrows else owner
    torch.compiler.reset()
    with EventStorage():  # in a training loop the statistics must not break the graph
        actual = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, b)
    assert_near(actual, layer(x, b), 1e-12)


@pytest.mark.parametrize("cls", CLASSES)
def test_statistics(cls):
    owner = set_prediction(make(cls), dx=1.0, dy=-3.0, logit=math.log(3))
    layer = make(cls, (6, 10), branch_from=owner, gamma=0.1)
    layer.name = "mask_pooler.2"
    with EventStorage() as storage:
        owner(image(), boxes())
        layer(image(), boxes())
    expected = {}
    for name, gamma in ((cls.__name__, GAMMA), ("mask_pooler.2", 0.1)):  # in sizes of the RoI
        expected |= {f"{name}/offset_mean": 2 * gamma, f"{name}/offset_max": 3 * gamma}
        if cls is ModulatedDeformRoIPool:
            expected[f"{name}/mask_mean"] = 0.75
    assert storage.latest() == {name: (pytest.approx(value), 0) for name, value in expected.items()}
    with EventStorage() as storage:
        owner.eval()(image(), boxes())
    assert not storage.latest()


@pytest.mark.parametrize("offset, warns", [(3.4, True), (-3.4, True), (3.3, False), (math.nan, True)])
def test_runaway_offsets(offset, warns, caplog):
    layer = set_prediction(make(DeformRoIPool), offset, offset)
    layer.name = "box_pooler.1"
    with EventStorage(), caplog.at_level(logging.WARNING, "dcnv2_d2"):
        layer(image(), boxes())  # gamma 0.3: 3.34 moves a bin by the RoI's size
    assert len(caplog.records) == warns
    for record in caplog.records:
        assert "box_pooler.1" in record.getMessage() and "RoI sizes, above 1.0" in record.getMessage()


@pytest.mark.parametrize("mask_scale", [0, -1.0, math.nan])
def test_mask_scale_error(mask_scale):
    with pytest.raises(ValueError, match=f"mask_scale must be above 0, got {mask_scale}"):
        ModulatedDeformRoIPool(4, 7, mask_scale=mask_scale)


@pytest.mark.parametrize(
    "cls, other, words",
    [
        (DeformRoIPool, lambda: make(ModulatedDeformRoIPool), "a DeformRoIPool of 6 .*a ModulatedDeformRoIPool of 6 "),
        (ModulatedDeformRoIPool, lambda: make(DeformRoIPool), "a ModulatedDeformRoIPool of 6 .*a DeformRoIPool of 6 "),
        (
            DeformRoIPool,
            lambda: DeformRoIPool(8, 7),
            "a DeformRoIPool of 6 channels, got a DeformRoIPool of 8 channels",
        ),
        (ModulatedDeformRoIPool, lambda: ROIAlign(7, 1.0, 2), "a ModulatedDeformRoIPool of 6 .*got a ROIAlign of no "),
    ],
)
def test_branch_from_error(cls, other, words):
    with pytest.raises(ValueError, match=f"^branch_from must be {words}"):
        make(cls, 14, branch_from=other())


@pytest.mark.parametrize("borrows", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("size", [[2, 5, 11, 14], [6, 11, 14]], ids=str)
def test_map_error(size, cls, borrows):
    layer = make(cls, (6, 10), branch_from=make(cls)) if borrows else make(cls)
    with pytest.raises(ValueError) as error:
        layer(torch.zeros(size, dtype=torch.float64), boxes())
    assert str(error.value) == f"x must be a map [N, 6, H, W], got {size}"


@pytest.mark.parametrize("cls", CLASSES)
def test_boxes_errors(cls):
    with pytest.raises(ValueError, match=r"boxes must have one tensor per image \(2\), got 1"):
        make(cls)(image(), [boxes()[:, 1:]])
    with pytest.raises(ValueError, match="boxes"):
        make(cls)(image(), boxes()[:, 1:])
