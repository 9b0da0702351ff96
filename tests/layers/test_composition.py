"""Deformable layers beside what else works on modules: torch.fx, nn.Conv2d's arguments, sharding, checkpointing."""

import copy
import importlib
import os
import subprocess
import sys

import pytest
import torch
import torchvision
from dcnv2_d2.layers import (
    DeformConv2d,
    DeformRoIPool,
    ModulatedDeformConv2d,
    ModulatedDeformRoIPool,
    dcn_state_dict,
    replace_convs,
)
from detectron2.utils.events import EventStorage
from torch import fx, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

from ..processes import run_two
from ..reference import assert_near

CLASSES = pytest.mark.parametrize("cls", [DeformConv2d, ModulatedDeformConv2d])


def bend(module):
    for name, m in module.named_modules():
        if name.endswith("conv_offset") or name.endswith("branch.0"):
            nn.init.normal_(m.weight, std=0.05)
            nn.init.normal_(m.bias, std=0.5)
    return module


def resnet50():
    model = torchvision.models.resnet50()
    replace_convs(model, r"layer[234]\.\d\.conv2")
    return bend(model)


# torch.fx


@pytest.mark.parametrize("training", [True, False])
def test_create_feature_extractor_of_a_resnet50(training):
    model = resnet50().train(training)
    extractor = create_feature_extractor(model, ["layer3.5.conv2", "layer4"]).train(training)
    x = torch.randn(2, 3, 64, 64)
    expected, seen = {}, copy.deepcopy(model)
    seen.get_submodule("layer3.5.conv2").register_forward_hook(lambda m, i, o: expected.update({"layer3.5.conv2": o}))
    seen.layer4.register_forward_hook(lambda m, i, o: expected.update(layer4=o))
    with EventStorage():
        seen(x)
        actual = extractor(x)
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_near(actual[name], expected[name], 1e-5, name)
    sum(out.sum() for out in actual.values()).backward()
    assert extractor.get_submodule("layer3.5.conv2.conv_offset").weight.grad.any()


def test_prepare_qat_fx():
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qat_qconfig_mapping

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), bend(ModulatedDeformConv2d(4, 5, 3, padding=1))).train()
    x = torch.randn(2, 3, 9, 8)
    prepared = quantize_fx.prepare_qat_fx(copy.deepcopy(model), get_default_qat_qconfig_mapping("x86"), (x,))
    out = prepared(x)
    assert_near(out, model(x), 0.1)
    out.sum().backward()
    assert all(p.grad is not None for p in prepared.parameters())


@pytest.mark.parametrize("cls", [DeformRoIPool, ModulatedDeformRoIPool])
def test_fx_of_a_pooling(cls):
    layer, x = bend(cls(4, 3)).train(), torch.randn(1, 4, 9, 8)
    boxes = torch.tensor([[0, 1.0, 0.5, 6.5, 7.0]])
    traced = fx.symbolic_trace(layer, concrete_args={})
    assert torch.equal(traced(x, boxes), layer(x, boxes))
    assert torch.equal(traced(x, [boxes[:, 1:]]), layer(x, [boxes[:, 1:]]))


def test_a_traced_module_computes_the_same():
    layer, x = bend(ModulatedDeformConv2d(4, 5, 3, offset_groups=2)), torch.randn(2, 4, 9, 8)
    traced = torch.jit.trace(layer, x)
    assert_near(traced(torch.cat([x, x])), layer(torch.cat([x, x])), 1e-6)


@pytest.mark.parametrize("layer", [ModulatedDeformConv2d(3, 3, 3), DeformRoIPool(3, 2)], ids=lambda m: type(m).__name__)
def test_scripting_says_what_to_do_instead(layer):
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace or torch\.export"):
        torch.jit.script(nn.Sequential(layer))


# nn.Conv2d's arguments


@CLASSES
def test_device_dtype_and_skip_init(cls):
    layer = cls(4, 6, 3, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}
    skipped = nn.utils.skip_init(cls, 4, 6, 3, dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in skipped.parameters()} == {("cpu", torch.float64)}


@CLASSES
@pytest.mark.parametrize("padding, kernel, dilation", [("same", (3, 5), (2, 1)), ("same", (2, 4), 2), ("valid", 2, 1)])
def test_padding_in_words(padding, kernel, dilation, cls):
    conv = nn.Conv2d(4, 6, kernel, padding=padding, dilation=dilation)
    kwargs = {"mask_scale": 2.0} if cls is ModulatedDeformConv2d else {}
    x = torch.randn(2, 4, 11, 12)
    assert_near(cls.from_conv(conv, **kwargs)(x), conv(x), 1e-5)
    built = cls(4, 6, kernel, padding=padding, dilation=dilation, **kwargs)
    built.load_state_dict(conv.state_dict(), strict=False)
    assert_near(built(x), conv(x), 1e-5)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"padding": "full"}, "padding.*full"),
        ({"padding": "same", "stride": 2}, "stride.*2"),
        ({"padding": "same", "kernel_size": (3, 2)}, "same.*3, 2"),
    ],
)
def test_padding_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        DeformConv2d(4, 4, **{"kernel_size": 3, **arguments})


@CLASSES
def test_one_image_without_a_batch(cls):
    layer, x = bend(cls(4, 6, 3, norm=nn.BatchNorm2d(6), activation=nn.ReLU())).eval(), torch.randn(4, 9, 8)
    assert torch.equal(layer(x), layer(x[None])[0])


# Names


def test_dcn_names_make_the_round_trip():
    model = bend(nn.Sequential(ModulatedDeformConv2d(3, 4, 3), nn.ModuleDict({"up": ModulatedDeformConv2d(4, 4, 3)})))
    model.append(DeformConv2d(4, 4, 3))
    saved = dcn_state_dict(model)
    names = [name for name in saved if "offset" in name]
    assert names == [
        *(f"{at}.conv_offset_mask.{kind}" for at in ("0", "1.up") for kind in ("weight", "bias")),
        *(f"2.conv_offset.{kind}" for kind in ("weight", "bias")),
    ]
    other = bend(copy.deepcopy(model))
    other.load_state_dict(saved)
    own = model.state_dict()
    assert list(own) == list(other.state_dict()) and all(torch.equal(t, own[k]) for k, t in other.state_dict().items())
    alone = dcn_state_dict(model[0])
    assert sorted(alone) == ["bias", "conv_offset_mask.bias", "conv_offset_mask.weight", "weight"]


# Never another function


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


def with_own_forward(conv):
    conv.forward = lambda x: x
    return conv


def with_hook(kind):
    def make(conv):
        getattr(conv, f"register_{kind}")(lambda *args: None)
        return conv

    return make


CHANGED = {
    "_conv_forward": lambda conv: Standardised(4, 4, 3),
    "forward": with_own_forward,
    "weight": nn.utils.parametrizations.weight_norm,
    "weight ": nn.utils.parametrizations.spectral_norm,
    "weight  ": lambda conv: nn.utils.prune.l1_unstructured(conv, "weight", 0.5),
    "bias": lambda conv: nn.utils.prune.l1_unstructured(conv, "bias", 0.5),
    "weight   ": nn.utils.weight_norm,
    "hooks": with_hook("forward_hook"),
    "hooks ": with_hook("forward_pre_hook"),
    "hooks  ": with_hook("full_backward_hook"),
    "lazy": lambda conv: nn.LazyConv2d(4, 3),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("what", CHANGED)
def test_a_convolution_that_computes_something_else_is_refused(what):
    importlib.import_module("torch.nn.utils.prune")
    conv = CHANGED[what](nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=what.strip()):
        ModulatedDeformConv2d.from_conv(conv)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ModuleDict({"second": conv}))
    with pytest.raises(ValueError, match=r"^1\.second cannot become deformable: conv must"):
        replace_convs(model, "")
    assert model[1]["second"] is conv and type(model[0]) is nn.Conv2d


# Statistics


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_records_once(use_reentrant):
    layer, x = ModulatedDeformConv2d(4, 4, 3), torch.randn(1, 4, 8, 8, requires_grad=True)
    with EventStorage() as storage:
        checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    history = storage.history(f"{type(layer).__name__}/offset_mean")
    assert len(history.values()) == 1


# Sharding


class Poolers(nn.Module):
    def __init__(self):
        super().__init__()
        self.box = bend(ModulatedDeformRoIPool(4, 2, hidden_dims=(8,)))
        nn.init.normal_(self.box.branch[-1].weight, std=0.3)
        self.mask = ModulatedDeformRoIPool(4, 4, branch_from=self.box)

    def forward(self, order, *args):
        return sum(getattr(self, name)(*args).square().sum() for name in order)


def sharded_step(rank, path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        model = Poolers()
        alone = copy.deepcopy(model)
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.box, mesh=mesh)
        fully_shard(model, mesh=mesh)
        x, boxes = torch.randn(1, 4, 9, 8), torch.tensor([[0, 1.0, 0.5, 6.5, 7.0], [0, 2.0, 3.0, 5.0, 8.0]])
        for order in (("box", "mask"), ("mask", "box"), ("mask",)):
            for m in (model, alone):
                m.zero_grad()
                m(order, x, boxes).backward()
            for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
                assert_near(p.grad.full_tensor(), q.grad, 1e-5, name)
    finally:
        dist.destroy_process_group()
    os._exit(0)  # all is checked; now and then PyTorch aborts when Python ends after FSDP2 on a CPU


def test_fsdp2_of_a_shared_branch(tmp_path):
    run_two(sharded_step, (str(tmp_path / "store"),), timeout=120, start_method="spawn")


# Without Detectron2


def test_importing_without_detectron2_says_nothing():
    code = """
import sys, warnings
warnings.simplefilter("error", UserWarning)
sys.modules["detectron2"] = None
import dcnv2_d2.ops, dcnv2_d2.layers
assert dcnv2_d2.ops.deform_conv2d and not hasattr(dcnv2_d2, "nothing")
try:
    from dcnv2_d2 import add_dcnv2_config
except ImportError as e:
    assert "add_dcnv2_config needs Detectron2" in str(e), e
else:
    raise SystemExit("no error")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
