"""Each operator in ONNX Runtime, at sizes the export did not see."""

import pytest
import torch
from dcnv2_d2.export import export_onnx
from dcnv2_d2.export.nms import batched_nms
from dcnv2_d2.ops import deform_conv2d, deform_roi_pool
from torch import nn
from torch.export import Dim

from ..reference import assert_near

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime", "1.25")  # the first with DeformConv on the CPU; it needs Python 3.11


class Calls(nn.Module):
    """Several calls in one graph: exporting is what takes the time."""

    def __init__(self, *calls):
        super().__init__()
        self.calls = calls

    def forward(self, tensors):
        return [call(*tensors) for call in self.calls]


def run_both(calls, inputs, dynamic, path, opset=19):
    """Exports for the first inputs; yields ONNX Runtime's results and ours for all of them."""
    module = Calls(*calls)
    shapes = ([dynamic.get(i) for i in range(len(inputs[0]))],)
    program = torch.export.export(module, (inputs[0],), dynamic_shapes=shapes, strict=False)
    export_onnx(program, path, opset)
    session = onnxruntime.InferenceSession(path)
    for tensors in inputs:
        feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), tensors, strict=True)}
        results = [torch.from_numpy(r) for r in session.run(None, feed)]
        yield from zip(results, module(tensors), strict=True)


def conv_inputs(n, h, w):
    """Of a 3x2 kernel with stride (2, 1), padding (1, 2) and dilation (1, 2), groups 2, offset groups 4."""
    ho, wo = (h + 2 - 3) // 2 + 1, w + 4 - 3 + 1
    x, offset, mask = torch.randn(n, 8, h, w), 2 * torch.randn(n, 48, ho, wo), torch.rand(n, 24, ho, wo)
    return [x, offset, torch.randn(6, 4, 3, 2), torch.randn(6), mask]


CONVS = [
    lambda x, o, w, b, m: deform_conv2d(x, o, w, b, (2, 1), (1, 2), (1, 2), m),
    lambda x, o, w, b, m: deform_conv2d(x, o, w, None, (2, 1), (1, 2), (1, 2), m),
    lambda x, o, w, b, m: deform_conv2d(x, o, w, b, (2, 1), (1, 2), (1, 2)),
]


@pytest.mark.parametrize("opset", [19, 21])
def test_deform_conv2d(opset, tmp_path):
    path, n = tmp_path / "conv.onnx", {0: Dim("n", max=50)}
    inputs = [conv_inputs(n, 11, 8) for n in (3, 7)]
    for actual, expected in run_both(CONVS, inputs, {0: n, 1: n, 4: n}, path, opset):
        assert_near(actual, expected, 1e-5)
    model = onnx.load(path)
    assert [o.version for o in model.opset_import if o.domain == ""] == [opset]
    assert {o.domain for o in model.opset_import} == {""}  # operators of ONNX alone
    assert sum(node.op_type == "DeformConv" for node in model.graph.node) == len(CONVS)


def pool_inputs(k, h, w):
    boxes = (
        torch.rand(k, 4) * torch.tensor([80.0, 50, 60, 50]) - 10
    )  # partly outside the map of 96 x 64 pixels and less
    boxes[:, 2:] += boxes[:, :2] + 10
    if k > 1:  # a whole number of pixels in each bin of 3 x 5, and a box inside out
        boxes[0], boxes[1] = torch.tensor([4.0, 8, 44, 32]), torch.tensor([40.0, 30, 20, 10])
    boxes = torch.cat([torch.randint(0, 2, (k, 1)).float(), boxes], dim=1)
    return [torch.randn(2, 6, h, w), boxes, 2 * torch.randn(k, 2, 3, 5), torch.rand(k, 1, 3, 5)]


POOLS = [
    lambda x, b, o, m: deform_roi_pool(x, b, o, (3, 5), 0.25, 2, 0.1, m),
    lambda x, b, o, m: deform_roi_pool(x, b, o, (3, 5), 0.25, 1, 0.3, None),
    lambda x, b, o, m: deform_roi_pool(x, b, o, (3, 5), 0.25, 0, 0.1, m),
    lambda x, b, o, m: deform_roi_pool(x, b, None, (3, 5), 0.5, -1, 0.1, m),
    lambda x, b, o, m: deform_roi_pool(x, b, None, (4, 2), 0.25, 3),
]


def test_deform_roi_pool(tmp_path):
    path, k = tmp_path / "pool.onnx", {0: Dim("k", max=1000)}
    dynamic = {0: {2: Dim("h", min=4, max=100), 3: Dim("w", min=4, max=100)}, 1: k, 2: k, 3: k}
    inputs = [pool_inputs(20, 16, 24), pool_inputs(33, 9, 15), pool_inputs(0, 9, 15)]
    for actual, expected in run_both(POOLS, inputs, dynamic, path):
        assert actual.shape == expected.shape
        if len(expected):
            assert_near(actual, expected, 5e-5)
            assert expected.std() > 0.05
    assert {o.domain for o in onnx.load(path).opset_import} == {""}


def nms_inputs(r):
    corners = 40 * torch.rand(r, 2)
    boxes = torch.cat([corners, corners + 5 + 20 * torch.rand(r, 2)], dim=1)
    return [boxes, torch.randn(r), torch.randint(0, 3, (r,))]


def test_batched_nms(tmp_path):
    path, r = tmp_path / "nms.onnx", {0: Dim("r", max=5000)}
    calls = [lambda b, s, c: batched_nms(b, s, c, 3, 0.5), lambda b, s, c: batched_nms(b, s, c, 4, 0.2)]
    inputs = [nms_inputs(n) for n in (30, 200, 1, 0)]
    kept = list(run_both(calls, inputs, {0: r, 1: r, 2: r}, path))
    for actual, expected in kept:
        assert torch.equal(actual, expected)
    assert [len(expected) for _, expected in kept[4:]] == [1, 1, 0, 0]
    assert 1 < len(kept[3][1]) < len(kept[2][1]) < 200


def test_old_opsets_are_refused(tmp_path):
    program = torch.export.export(nn.ReLU(), (torch.zeros(2),))
    with pytest.raises(ValueError, match="export_onnx: opset must be 19 or later, .*, got 18"):
        export_onnx(program, tmp_path / "relu.onnx", opset=18)
    assert not list(tmp_path.iterdir())


def test_only_a_detector_s_results_are_named_so(tmp_path):
    program = torch.export.export(nn.ReLU(), (torch.zeros(2),))
    export_onnx(program, tmp_path / "relu.onnx")
    (output,) = onnx.load(tmp_path / "relu.onnx").graph.output
    assert output.name != "boxes"
