"""Mimicking in two processes under DistributedDataParallel: no hang and equal gradients, whoever has ground truth."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..processes import run_two
from .small_rcnn import DC5, FPN, gradients_of, losses_of, make_image, make_model, two_images

TIMEOUT = 300  # seconds, so many because importing is slow on a busy machine
STEPS = 5
VARIANTS = {
    "mdpool": {},
    "chunks": {"MIMIC.CHUNK": 2, "MIMIC.CHECKPOINTING": True},
    "dc5-naiveSyncBN": {**DC5, "RESNETS.NORM": "naiveSyncBN", "MASK_ON": False},
    "fpn": FPN,
}


def inputs_of(rank, step):
    """The second process never has ground truth; in the fourth step neither has."""
    if rank == 1 or step == 3:
        return [make_image([], seed=100 * rank + step), make_image([], size=(64, 72), seed=7)]
    return two_images()


def train(rank, folder, variants):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", timedelta(seconds=TIMEOUT / 2), rank=rank, world_size=2)
    for name in variants:
        model = make_model(VARIANTS[name])
        alone = gradients_of(model, sum(losses_of(model, inputs_of(rank, 0), seed=10 * rank).values()))
        parallel = DistributedDataParallel(model, broadcast_buffers=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        steps = []
        for step in range(STEPS):
            losses = losses_of(parallel, inputs_of(rank, step), seed=10 * rank + step)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
            optimizer.step()
            steps.append(({name: loss.item() for name, loss in losses.items()}, grads))
        torch.save((steps, dict(model.named_parameters()), alone), f"{folder}/{name}_{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Name of a variant -> for both processes: losses and gradients of each step, the weights after the last, and the
    gradients of the first step before they are averaged."""
    folder = tmp_path_factory.mktemp("distributed")
    run_two(train, (str(folder), list(VARIANTS)), TIMEOUT, "spawn")
    return {name: [torch.load(folder / f"{name}_{rank}.pth") for rank in range(2)] for name in VARIANTS}


@pytest.mark.parametrize("name", VARIANTS)
def test_five_steps_with_equal_gradients(name, trained):
    (first, weights, _), (second, weights_of_second, _) = trained[name]
    assert len(first) == len(second) == STEPS
    for step, ((losses, grads), (losses_of_second, grads_of_second)) in enumerate(zip(first, second, strict=True)):
        assert all(
            torch.tensor(list(all_losses.values())).isfinite().all() for all_losses in (losses, losses_of_second)
        )
        assert grads.keys() == grads_of_second.keys()
        for parameter, grad in grads.items():
            assert torch.equal(grad, grads_of_second[parameter]), (step, parameter)
        for loss in ("loss_mimic", "loss_mimic_cls"):
            assert (losses[loss] > 0) == (step != 3) and losses_of_second[loss] == 0
    classifier = "roi_heads.mimicking.cls_score.weight"
    assert [bool(grads[classifier].any()) for _, grads in first] == [step != 3 for step in range(STEPS)]
    assert weights.keys() == weights_of_second.keys()
    for parameter, weight in weights.items():
        assert torch.equal(weight, weights_of_second[parameter]), parameter
    start = dict(make_model(VARIANTS[name]).named_parameters())
    assert not any(torch.equal(weights[n], start[n]) for n in (classifier, "roi_heads.box_head.fc1.weight"))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_gradient_is_the_mean_of_both_processes(name, trained):
    (steps, _, alone), (_, _, alone_of_second) = trained[name]
    for parameter, grad in steps[0][1].items():
        mean = (alone[parameter].double() + alone_of_second[parameter].double()) / 2
        assert (grad - mean).abs().max() <= 1e-4 * mean.abs().max() + 1e-9, parameter
