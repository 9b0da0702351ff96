#!/usr/bin/env python
"""Times the operators against their peers: interleaved in one run, on fresh random inputs, medians, as Markdown tables.

python tools/benchmark.py --threads 2 --repeats 15
python tools/benchmark.py --only deform_roi_pool --dtypes float32
"""

import argparse
import itertools
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from dcnv2_d2 import model_zoo
from dcnv2_d2.ops import definitions, deform_conv2d, deform_roi_pool
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage


@dataclass(frozen=True)
class Row:
    """A 3x3 convolution of ResNet-50 on an image of 800x1333 (padded to 800x1344), with as many outputs as inputs."""

    name: str
    channels: int
    height: int
    width: int
    stride: int = 1
    dilation: int = 1

    @property
    def out_size(self):
        return tuple((size - 1) // self.stride + 1 for size in (self.height, self.width))

    @property
    def column_bytes(self):
        """Of the column buffer that torchvision fills for one float32 image."""
        return 4 * 9 * self.channels * math.prod(self.out_size)


ROWS = [
    Row("c3", 128, 100, 168),
    Row("c4", 256, 50, 84),
    Row("c5", 512, 25, 42),
    Row("c3, stride 2", 128, 200, 336, stride=2),
    Row("c5, dilation 2", 512, 50, 84, dilation=2),
]


def make_inputs(row, batch, dtype, device):
    c, (ho, wo) = row.channels, row.out_size
    return {
        "input": torch.randn(batch, c, row.height, row.width, dtype=dtype, device=device),
        "offset": torch.randn(batch, 18, ho, wo, dtype=dtype, device=device),
        "weight": torch.randn(c, c, 3, 3, dtype=dtype, device=device) / (9 * c) ** 0.5,
        "bias": torch.randn(c, dtype=dtype, device=device),
        "mask": torch.rand(batch, 9, ho, wo, dtype=dtype, device=device),
    }


def ours(row, input, offset, weight, bias, mask):
    return deform_conv2d(input, offset, weight, bias, row.stride, row.dilation, row.dilation, mask)


def theirs(row, input, offset, weight, bias, mask):
    """torchvision's operator; what it has no kernel for, its user computes in float32, as its autocast rule does."""
    if input.device.type == "cpu" or input.dtype == torch.bfloat16:
        result = torchvision.ops.deform_conv2d(
            *(t.float() for t in (input, offset, weight, bias)), row.stride, row.dilation, row.dilation, mask.float()
        )
        return result.to(input.dtype)
    return torchvision.ops.deform_conv2d(input, offset, weight, bias, row.stride, row.dilation, row.dilation, mask)


def plain(row, input, offset, weight, bias, mask):
    """The convolution without offsets and mask, which nothing deformable can beat."""
    return F.conv2d(input, weight, bias, row.stride, row.dilation, row.dilation)


def onnx_runtime(row, input, offset, weight, bias, mask):
    """ONNX Runtime's DeformConv, forward and on a CPU only."""
    arrays = {"X": input, "W": weight, "offset": offset, "B": bias, "mask": mask}
    session = onnx_session(row, torch.get_num_threads())
    return torch.from_numpy(session.run(None, {name: t.detach().numpy() for name, t in arrays.items()})[0])


@cache
def onnx_session(row, threads):
    import onnxruntime
    from onnx import TensorProto, helper

    names = ["X", "W", "offset", "B", "mask"]
    node = helper.make_node(
        "DeformConv", names, ["Y"], kernel_shape=[3, 3], strides=[row.stride] * 2, dilations=[row.dilation] * 2,
        pads=[row.dilation] * 4, group=1, offset_group=1,
    )  # fmt: skip
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] if n == "B" else [None] * 4) for n in names]
    result = helper.make_tensor_value_info("Y", TensorProto.FLOAT, [None] * 4)
    graph = helper.make_graph([node], "deform_conv", values, [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that wait busily would take the processor from the other contestants.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


CONTESTANTS = {"ours": ours, "torchvision": theirs, "F.conv2d": plain, "ONNX Runtime": onnx_runtime}


@dataclass(frozen=True)
class PoolRow:
    """Pooling of 512 boxes an image of 800x1344 from 256 channels, two samples a bin in each direction."""

    height: int
    width: int
    stride: int  # of the map, in pixels of the image
    bins: int

    @property
    def name(self):
        return f"{self.height}x{self.width} map, {self.bins}x{self.bins}"


POOL_ROWS = [PoolRow(*size, bins) for size in ((50, 84, 16), (200, 336, 4)) for bins in (7, 14)]


def make_pool_inputs(row, batch, dtype, device):
    """Boxes anywhere in the image; each side, on a logarithmic scale, anywhere from 4 to 28 pixels of the map."""
    k = 512 * batch
    size = row.stride * 4 * 7 ** torch.rand(k, 2)
    corner = torch.rand(k, 2) * (torch.tensor([row.width, row.height]) * row.stride - size)
    return {
        "input": torch.randn(batch, 256, row.height, row.width, dtype=dtype, device=device),
        "boxes": torch.cat([torch.arange(k)[:, None] % batch, corner, corner + size], 1).to(device),
        "offset": torch.randn(k, 2, row.bins, row.bins, device=device),
        "mask": torch.rand(k, 1, row.bins, row.bins, device=device),
    }


def pool_ours(row, input, boxes, offset, mask):
    return deform_roi_pool(input, boxes, offset, row.bins, 1 / row.stride, 2, mask=mask)


def pool_theirs(row, input, boxes, offset, mask):
    """torchvision's plain pooling, with no offset and no mask; in float32 where it has no kernel for the type."""
    dtype = torch.float32 if input.device.type == "cpu" or input.dtype == torch.bfloat16 else input.dtype
    result = torchvision.ops.roi_align(input.to(dtype), boxes.to(dtype), row.bins, 1 / row.stride, 2, aligned=True)
    return result.to(input.dtype)


POOL_CONTESTANTS = {"ours": pool_ours, "roi_align": pool_theirs}


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def run_once(operator, row, backward, threads, memory_format, inputs, clock=time.perf_counter):
    """Milliseconds of one call."""
    torch.set_num_threads(threads)
    inputs = {k: v.clone().requires_grad_(backward and k != "boxes") for k, v in inputs.items()}
    inputs["input"] = inputs["input"].detach().contiguous(memory_format=memory_format).requires_grad_(backward)
    device = inputs["input"].device.type
    synchronize(device)
    start = clock()
    output = operator(row, **inputs)
    if backward:
        output.backward(torch.ones_like(output))
    synchronize(device)
    return 1e3 * (clock() - start)


def compare(calls, make_inputs, repeats):
    """Median of what each of calls {key: function of the inputs} returns; interleaved, on fresh inputs every round."""
    results = {key: [] for key in calls}
    for repeat in range(-1, repeats):
        inputs = make_inputs()
        for key, call in calls.items():
            result = call(inputs)
            if repeat >= 0:  # the first round warms up
                results[key].append(result)
    return {key: statistics.median(values) for key, values in results.items()}


def geometric_mean(values):
    return math.exp(statistics.fmean(map(math.log, values)))


def print_table(title, names, ratio_names, lines):
    """lines: (name of the row, its milliseconds, its ratios); the last line printed is the ratios' geometric mean."""
    print(f"\n### {title}\n")
    print(f"| row | {' | '.join(f'{name}, ms' for name in names)} | {' | '.join(ratio_names)} |")
    print("|---" * (1 + len(names) + len(ratio_names)) + "|")
    collected = []
    for row, times, ratios in lines:
        print("|", " | ".join([row, *(f"{ms:.1f}" for ms in times), *(f"{r:.2f}" for r in ratios)]), "|", flush=True)
        collected.append(ratios)
    means = " | ".join(f"{geometric_mean(column):.2f}" for column in zip(*collected, strict=True))
    print("| geometric mean" + " |" * len(names), "|", means, "|", flush=True)


def conv_table(title, args, dtype, backward):
    last, first = torch.channels_last, torch.contiguous_format
    keys = [(name, args.threads, first) for name in CONTESTANTS] + [("ours", args.threads, last)]
    if args.device != "cpu" or backward or dtype != torch.float32:
        keys.remove(("ONNX Runtime", args.threads, first))
    if args.device == "cpu" and args.threads > 1:
        keys.append(("ours", 1, first))

    def lines():
        for row in ROWS:
            inputs = partial(make_inputs, row, args.batch, dtype, args.device)
            if ("ONNX Runtime", args.threads, first) in keys:
                sample = inputs()
                torch.testing.assert_close(onnx_runtime(row, **sample), ours(row, **sample), rtol=1e-4, atol=1e-4)
            calls = {
                (name, n, layout): partial(run_once, CONTESTANTS[name], row, backward, n, layout, clock=args.clock)
                for name, n, layout in keys
            }
            medians = compare(calls, inputs, args.repeats)
            own = medians[keys[0]]
            # Each of the others beside ours; our other layout and one thread, too, as multiples of ours
            times = [medians[key] for key in keys]
            yield row.name, times, [own / medians[k] if k[0] == "F.conv2d" else medians[k] / own for k in keys[1:]]

    def name(key):
        return key[0] + ", channels_last" * (key[2] == last) + ", 1 thread" * (key[1] != args.threads)

    ratios = ["ours / F.conv2d" if k[0] == "F.conv2d" else f"{name(k)} / ours" for k in keys[1:]]
    print_table(title, [name(key) for key in keys], ratios, lines())


def pool_table(title, args, dtype, backward):
    calls = {
        f"{name}{', channels_last' * (layout == torch.channels_last)}": (call, layout)
        for layout in (torch.contiguous_format, torch.channels_last)
        for name, call in POOL_CONTESTANTS.items()
    }

    def lines():
        for row in POOL_ROWS:
            timed = {
                name: partial(run_once, call, row, backward, args.threads, layout, clock=args.clock)
                for name, (call, layout) in calls.items()
            }
            medians = compare(timed, partial(make_pool_inputs, row, args.batch, dtype, args.device), args.repeats)
            own, plain, own_last, plain_last = times = list(medians.values())
            yield row.name, times, (plain / own, plain / own_last, plain_last / own_last)

    ratios = ["roi_align / ours", "roi_align / ours, channels_last", "both channels_last"]
    print_table(title, calls, ratios, lines())


TABLES = {"deform_conv2d": conv_table, "deform_roi_pool": pool_table}


class Definition(torch.autograd.Function):
    """An operator's definition in plain PyTorch, as it runs where there is no kernel."""

    @staticmethod
    def forward(ctx, name, tensors, geometry, *inputs):
        ctx.call, ctx.geometry = getattr(definitions, f"{name}_backward"), geometry
        ctx.save_for_backward(*tensors)
        return getattr(definitions, name)(*tensors, *geometry)

    @staticmethod
    def backward(ctx, grad):
        tensors, geometry = ctx.saved_tensors, ctx.geometry
        if ctx.call is definitions.deform_conv2d_backward:
            input, offset, weight, _, mask = tensors
            by_input, by_offset, by_weight, by_mask = ctx.call(grad, input, offset, weight, mask, *geometry, [True] * 4)
            return None, None, None, by_input, by_offset, by_weight, grad.sum((0, 2, 3)), by_mask
        by_input, by_offset, by_mask = ctx.call(grad, *tensors, *geometry, [True] * 3)
        return None, None, None, by_input, None, by_offset, by_mask


def conv_definition(row, input, offset, weight, bias, mask):
    inputs = input, offset, weight, bias, mask
    geometry = [row.stride] * 2, [row.dilation] * 2, [row.dilation] * 2
    return Definition.apply("deform_conv2d", inputs, geometry, *inputs)


def pool_definition(row, input, boxes, offset, mask):
    inputs = input, boxes, offset, mask
    return Definition.apply("deform_roi_pool", inputs, ([row.bins] * 2, 1 / row.stride, 2, 0.1), *inputs)


def definition_table(args):
    def lines():
        for row, own, other, inputs in [
            *((row, conv_definition, theirs, make_inputs) for row in ROWS),
            *((row, pool_definition, pool_theirs, make_pool_inputs) for row in POOL_ROWS),
        ]:
            calls = {
                (call, backward): partial(
                    run_once, call, row, backward, args.threads, torch.contiguous_format, clock=args.clock
                )
                for backward in (False, True)
                for call in (own, other)
            }
            times = list(compare(calls, partial(inputs, row, 1, torch.float32, "cpu"), args.repeats).values())
            yield row.name, times, (times[1] / times[0], times[3] / times[2])

    names = ["definition", "torchvision", "definition, with backward", "torchvision, with backward"]
    title = "Definitions in plain PyTorch, float32, batch 1"
    print_table(title, names, ["torchvision / definition", "with backward"], lines())


DETECTORS = ["regular", "mdconv_c3-c5", "mdconv_c3-c5_mdpool"]


def make_detector(row):
    """A Faster R-CNN with ResNet-50 FPN and random weights, and its optimizer, which leaves them as they are."""
    cfg = model_zoo.get_config(f"COCO/faster_rcnn/faster_rcnn_R_50_FPN_1x_{row}.yaml")
    torch.manual_seed(0)
    model = build_model(cfg)
    return model, torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)


def detector_seconds(model, optimizer, training, clock, image):
    """Of the inference or of one step of training on an image of 800x1333 with eight objects."""
    model.train(training)
    start = clock()
    if training:
        with EventStorage():
            sum(model([image]).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    else:
        with torch.no_grad():
            model([image])
    return clock() - start


def make_image():
    size = 32 + 400 * torch.rand(8, 2)
    corner = torch.rand(8, 2) * (torch.tensor([1333, 800]) - size)
    objects = Instances((800, 1333), gt_boxes=Boxes(torch.cat([corner, corner + size], 1)), gt_classes=torch.arange(8))
    image = torch.randint(256, (3, 800, 1333), dtype=torch.uint8)
    return {"image": image, "instances": objects, "height": 800, "width": 1333}


def detector_table(args):
    print("\n### Whole detectors, Faster R-CNN R50-FPN, one image of 800x1333, float32\n")
    print("| model | inference, s | / regular | training step, s | / regular |\n|---|---|---|---|---|")
    torch.set_num_threads(args.threads)
    detectors = {row: make_detector(row) for row in DETECTORS}
    calls = {
        (row, training): partial(detector_seconds, *detectors[row], training, args.clock)
        for row in DETECTORS
        for training in (False, True)
    }
    medians = compare(
        {key: lambda x, call=call: call(image=x) for key, call in calls.items()}, make_image, args.repeats
    )
    for row in DETECTORS:
        cells = [f"{medians[row, t]:.2f} | {medians[row, t] / medians['regular', t]:.2f}" for t in (False, True)]
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


def describe_processor():
    """Its name and the vector extensions that matter here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = found.get("flags", "").split()
    extensions = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if f in flags] or [
        "no vector extensions known"
    ]
    family = f" (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else ""
    return f"{found.get('model name', platform.processor() or platform.machine())}{family}, {', '.join(extensions)}"


def peak_memory():
    """Bytes of resident memory that this process ever had; getrusage would count the parent's in."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def extra_memory(contestant, index, backward, threads):
    """Bytes by which one call, run in a process of its own, raises the peak of resident memory, less its results."""
    row = ROWS[index]
    small = Row("warm-up", 32, 24, 24)
    warm_up = partial(run_once, CONTESTANTS[contestant], small, backward, threads, torch.contiguous_format)
    warm_up(make_inputs(small, 1, torch.float32, "cpu"))
    inputs = {k: v.requires_grad_(backward) for k, v in make_inputs(row, 1, torch.float32, "cpu").items()}
    results = math.prod(row.out_size) * row.channels * (2 if backward else 1)  # with the gradient of the output
    if backward:
        results += sum(v.numel() for v in inputs.values())
    before = peak_memory()
    output = CONTESTANTS[contestant](row, **inputs)
    if backward:
        output.backward(torch.ones_like(output))
    return peak_memory() - before - 4 * results


def memory_table(args):
    print("\n### Memory beyond inputs and results, float32, batch 1, MB\n")
    print("| row | torchvision's columns | ours, forward | torchvision, forward | ours, with backward | torchvision |")
    print("|---|---|---|---|---|---|")
    for index, row in enumerate(ROWS):
        cells = []
        for backward in (False, True):
            for contestant in ("ours", "torchvision"):
                command = [sys.executable, __file__, "--memory-of", contestant, str(index), str(int(backward))]
                output = subprocess.run([*command, "--threads", str(args.threads)], capture_output=True, check=True)
                cells.append(f"{int(output.stdout) / 1e6:.1f}")
        print(f"| {row.name} | {row.column_bytes / 1e6:.1f} | {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    choices = [*TABLES, "definitions", "detectors"]
    parser.add_argument("--only", nargs="+", choices=choices, default=choices, help="what to time")
    parser.add_argument(
        "--processor-time", dest="clock", action="store_const", const=time.process_time, default=time.perf_counter,
        help="of all threads together, instead of the time that passes: with --threads 1, fair on a busy machine",
    )  # fmt: skip
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        contestant, index, backward = args.memory_of
        print(extra_memory(contestant, int(index), backward == "1", args.threads))
        return
    processor = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"{describe_processor()}, {args.threads} threads"
    )
    measured = "processor time" if args.clock is time.process_time else "time"
    print(f"{processor}, torch {torch.__version__}, torchvision {torchvision.__version__}, ", end="")
    print(f"medians of {args.repeats}, {measured}, {time.strftime('%Y-%m-%d')}")
    operators = [name for name in args.only if name in TABLES]
    for operator, dtype, backward in itertools.product(operators, args.dtypes, (False, True)):
        what = "forward + backward" if backward else "forward"
        TABLES[operator](f"{operator}, {what}, {dtype}, batch {args.batch}", args, getattr(torch, dtype), backward)
    if args.device == "cpu" and "deform_conv2d" in args.only:
        memory_table(args)
    if args.device == "cpu" and "definitions" in args.only:
        definition_table(args)
    if args.device == "cpu" and "detectors" in args.only:
        detector_table(args)


if __name__ == "__main__":
    main()
