#!/usr/bin/env python
"""Times the operators on a GPU against their peers and against what the GPU can do at all, as a table and a picture.

python tools/roofline.py --output output/roofline

The floor of a row is the larger of two times: its multiplications and additions in matrix products at the rate of a
large matrix product, and its bytes (each input read once, each result written once; of a pooling the whole map) at the
rate of a large copy. Both rates are measured first. Rows come from tools/benchmark.py; --device cpu runs the same code.
"""

import argparse
import importlib
import itertools
import json
import math
import os
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from benchmark import POOL_ROWS, ROWS, make_inputs, make_pool_inputs, ours, plain, pool_ours, pool_theirs, theirs
from dcnv2_d2 import compat


def milliseconds(call, device):
    if device == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # about 1 ms, in which the call is queued: the GPU does not wait for Python
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def median_time(call, device, repeats):
    for _ in range(3):
        call()
    return statistics.median(milliseconds(call, device) for _ in range(repeats))


def copy_rate(device):
    """Bytes a second, read and written, of a copy far larger than any cache."""
    source = torch.randn(2**28 if device == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / (1e-3 * median_time(lambda: target.copy_(source), device, 20))


def matmul_rate(dtype, device):
    """Operations a second of a large product, as torch is set up: float32 without TF32 unless that is switched on."""
    n = 8192 if device == "cuda" else 512
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / (1e-3 * median_time(lambda: a @ b, device, 10))


def peers_of_deform_conv2d():
    """mmcv's and Detectron2's are for CUDA, and there only where their compiled parts are."""
    found = {"torchvision": theirs, "F.conv2d": plain}
    if not torch.cuda.is_available():
        return found
    try:
        mmcv = importlib.import_module("mmcv.ops").modulated_deform_conv2d
        found["mmcv"] = lambda row, input, offset, weight, bias, mask: mmcv(
            input, offset.to(input), mask.to(input), weight, bias, row.stride, row.dilation, row.dilation, 1, 1
        )
    except ImportError:
        pass
    if compat.has_compiled_part():
        detectron2 = importlib.import_module("detectron2.layers.deform_conv").modulated_deform_conv
        found["Detectron2"] = lambda row, input, offset, weight, bias, mask: detectron2(
            input, offset.to(input), mask.to(input), weight, bias, row.stride, row.dilation, row.dilation, 1, 1
        )
    return found


def fused(row, **inputs):
    """Forward by the fused kernel, for the half types (docs/gpu.md)."""
    os.environ["DCNV2_FUSED"] = "1"
    try:
        return ours(row, **inputs)
    finally:
        del os.environ["DCNV2_FUSED"]


def last(operator):
    """The operator on a channels_last input, which is made so before the clock starts."""
    operator.__dict__["layout"] = torch.channels_last
    return operator


OPERATORS = {
    "deform_conv2d": (
        ROWS,
        make_inputs,
        {
            "ours": ours,
            "ours, channels_last": last(partial(ours)),
            "fused": fused,
            "fused, channels_last": last(partial(fused)),
            **peers_of_deform_conv2d(),
            "F.conv2d, channels_last": last(partial(plain)),
        },
    ),
    "deform_roi_pool": (
        POOL_ROWS,
        make_pool_inputs,
        {
            "ours": pool_ours,
            "ours, channels_last": last(partial(pool_ours)),
            "roi_align": pool_theirs,
            "roi_align, channels_last": last(partial(pool_theirs)),
        },
    ),
}


def work(row, inputs, backward):
    """(operations in matrix products, bytes) that no implementation of the row can do without."""
    input_bytes = sum(t.nbytes for t in inputs.values())
    x = inputs["input"]
    if "weight" in inputs:
        pixels = len(x) * math.prod(row.out_size)
        operations, output_bytes = 2 * pixels * inputs["weight"].numel(), pixels * row.channels * x.itemsize
    else:
        operations, output_bytes = 0, len(inputs["boxes"]) * row.bins**2 * x.shape[1] * x.itemsize
    if not backward:
        return operations, input_bytes + output_bytes
    # Backward has two matrix products, reads what forward read and the gradient of the output, and writes the others.
    return 3 * operations, 3 * input_bytes + 2 * output_bytes


def prepare(operator, inputs, backward):
    """A function of no arguments that runs the operator once."""
    row, call = operator
    layout = getattr(call, "layout", torch.contiguous_format)
    leaves = {k: v.detach().requires_grad_(backward and k != "boxes") for k, v in inputs.items()}
    leaves["input"] = inputs["input"].contiguous(memory_format=layout).detach().requires_grad_(backward)
    if not backward:
        return lambda: call(row, **leaves)
    with torch.no_grad():
        grad = torch.randn_like(call(row, **leaves))
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    return lambda: torch.autograd.grad(call(row, **leaves), wanted, grad, allow_unused=True)


def measure(calls, row, make, batch, dtype, backward, args):
    """{name: (median milliseconds, peak bytes beyond the inputs)}; interleaved, over three sets of random inputs."""
    sets = [make(row, batch, dtype, args.device) for _ in range(3)]
    runs = {name: [prepare((row, call), inputs, backward) for inputs in sets] for name, call in calls.items()}
    times, peaks = {name: [] for name in calls}, {}
    for name, (run, *_) in runs.items():
        run()
        if args.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            peaks[name] = torch.cuda.max_memory_allocated() - before
    for repeat in range(args.repeats):
        for name in calls:
            times[name].append(milliseconds(runs[name][repeat % 3], args.device))
    return {name: (statistics.median(times[name]), peaks.get(name, 0)) for name in calls}


def table(operator, dtype, backward, batch, rates, args):
    rows, make, calls = OPERATORS[operator]
    if backward or dtype == "float32" or args.device == "cpu" or torch.cuda.get_device_capability() < (8, 0):
        calls = {name: call for name, call in calls.items() if not name.startswith("fused")}
    title = f"{operator}, {'forward + backward' if backward else 'forward'}, {dtype}, batch {batch}"
    print(f"\n### {title}\n\n| row | {' | '.join(f'{name}, ms (MB)' for name in calls)} | best peer / ours | ", end="")
    print("TFLOP/s | GB/s | floor, ms | floor / ours |\n" + "|---" * (len(calls) + 6) + "|")
    records = []
    for row in rows:
        dtype_ = getattr(torch, dtype)
        measured = measure(calls, row, make, batch, dtype_, backward, args)
        operations, moved = work(row, make(row, batch, dtype_, args.device), backward)
        best = min(ms for name, (ms, _) in measured.items() if name.startswith("ours"))
        peer = min(ms for name, (ms, _) in measured.items() if not name.startswith(("ours", "fused", "F.conv2d")))
        floor = 1e3 * max(operations / rates[dtype], moved / rates["copy"])
        cells = [f"{ms:.3f} ({peak / 1e6:.0f})" for ms, peak in measured.values()]
        cells += [f"{peer / best:.2f}", f"{operations / best / 1e9:.1f}", f"{moved / best / 1e6:.0f}"]
        cells += [f"{floor:.3f}", f"{floor / best:.2f}"]
        print("|", " | ".join([row.name, *cells]), "|", flush=True)
        records.append({"row": row.name, "milliseconds": {k: ms for k, (ms, _) in measured.items()}, "floor": floor})
    return title, records


def draw(tables, path):
    from matplotlib.figure import Figure

    columns = min(4, len(tables))
    figure = Figure(figsize=(5 * columns, 3.2 * math.ceil(len(tables) / columns)), layout="constrained")
    axes = figure.subplots(math.ceil(len(tables) / columns), columns, squeeze=False)
    for axis, (title, records) in zip(axes.flat, tables, strict=False):
        names = list(records[0]["milliseconds"])
        for i, name in enumerate(names):
            x = [j + (i - len(names) / 2 + 0.5) * 0.8 / len(names) for j in range(len(records))]
            axis.bar(x, [r["milliseconds"][name] for r in records], 0.8 / len(names), label=name)
        for j, record in enumerate(records):
            axis.plot([j - 0.45, j + 0.45], [record["floor"]] * 2, "k", label="floor" if j == 0 else None)
        axis.set(yscale="log", ylabel="ms")
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(records)), [r["row"] for r in records], fontsize=6)
        axis.legend(fontsize=6)
    for axis in axes.flat[len(tables) :]:
        axis.axis("off")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16", "bfloat16"])
    parser.add_argument("--only", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, help="folder for roofline.json and roofline.png")
    args = parser.parse_args()
    os.environ.pop("DCNV2_FUSED", None)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    rates = {dtype: matmul_rate(getattr(torch, dtype), args.device) for dtype in args.dtypes}
    rates["copy"] = copy_rate(args.device)
    products = ", ".join(f"{rates[dtype] / 1e12:.1f} TFLOP/s {dtype}" for dtype in args.dtypes)
    print(f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}: ", end="")
    print(f"copy {rates['copy'] / 1e9:.0f} GB/s, {products}")
    cases = itertools.product(args.only, args.dtypes, (False, True), args.batches)
    tables = []
    for operator, dtype, backward, batch in cases:
        tables.append(table(operator, dtype, backward, batch, rates, args))
        if args.output:  # after each table: a run that is cut off has told something
            args.output.mkdir(parents=True, exist_ok=True)
            (args.output / "roofline.json").write_text(
                json.dumps({"device": name, "rates": rates, "tables": tables}, indent=1)
            )
    if args.output:
        draw(tables, args.output / "roofline.png")


if __name__ == "__main__":
    main()
