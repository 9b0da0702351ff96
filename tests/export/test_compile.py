"""torch.compile of a whole training step: the graph breaks where Detectron2 looks at values, never in our code."""

from pathlib import Path

import dcnv2_d2
import torch
from dcnv2_d2.config import CONFIGS
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from ..models import make_config, randomise
from ..reference import assert_near

CONFIG = CONFIGS / "quick_start/mask_rcnn_small_mdconv_c3-c5_mdpool.yaml"
OURS = str(Path(dcnv2_d2.__file__).parent)


def make_input():
    masks = torch.zeros(1, 96, 96, dtype=torch.bool)
    masks[:, 10:70, 20:90] = True
    target = Instances((96, 96), gt_boxes=Boxes(torch.tensor([[20.0, 10, 90, 70]])), gt_classes=torch.tensor([2]))
    target.gt_masks = BitMasks(masks)
    return [{"image": torch.randint(0, 255, (3, 96, 96), dtype=torch.uint8), "instances": target}]


def step(model, run, inputs):
    """Losses and gradients."""
    torch.manual_seed(1)  # proposals are sampled
    model.zero_grad()
    with EventStorage():
        losses = run(inputs)
    sum(losses.values()).backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_training_step():
    model, inputs = randomise(build_model(make_config(CONFIG))), make_input()
    model.train()
    expected_losses, expected = step(model, model, inputs)

    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    losses, grads = step(model, torch.compile(model, backend=backend), inputs)
    reasons = [graph.compile_subgraph_reason for graph in graphs]
    ends = [reason.user_stack[-1].filename for reason in reasons if reason.graph_break]
    assert ends and not [name for name in ends if name.startswith(OURS)]
    calls = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("deform_conv2d" in call for call in calls) == 12
    assert sum("deform_roi_pool" in call for call in calls) == 4  # box and mask: for the branch, and at its offsets

    for name, loss in expected_losses.items():
        assert_near(losses[name], loss, 1e-5, name)
    assert grads.keys() == expected.keys() and len(expected) > 50
    for name, grad in expected.items():
        assert_near(grads[name], grad, 1e-4, name)
