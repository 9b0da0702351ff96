#!/usr/bin/env python
"""Times the operators against their peers: interleaved in one run, on fresh random inputs, medians, as Markdown tables.

python tools/benchmark.py --threads 2 --repeats 15
"""

import argparse
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from dcnv2_d2.ops import deform_conv2d


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
    """torchvision's operator; it has no half types on the CPU, so there its user computes in float32."""
    if input.device.type == "cpu":
        result = torchvision.ops.deform_conv2d(
            *(t.float() for t in (input, offset, weight, bias)), row.stride, row.dilation, row.dilation, mask.float()
        )
        return result.to(input.dtype)
    return torchvision.ops.deform_conv2d(input, offset, weight, bias, row.stride, row.dilation, row.dilation, mask)


def plain(row, input, offset, weight, bias, mask):
    """The convolution without offsets and mask, which nothing deformable can beat."""
    return F.conv2d(input, weight, bias, row.stride, row.dilation, row.dilation)


CONTESTANTS = {"ours": ours, "torchvision": theirs, "F.conv2d": plain}


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def run_once(contestant, row, inputs, backward, device):
    """Milliseconds of one call."""
    inputs = {k: v.clone().requires_grad_(backward) for k, v in inputs.items()}
    synchronize(device)
    start = time.perf_counter()
    output = CONTESTANTS[contestant](row, **inputs)
    if backward:
        output.backward(torch.ones_like(output))
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def compare(row, args, dtype, backward, threads):
    """Median milliseconds per (contestant, number of threads), all interleaved."""
    times = {}
    for repeat in range(-1, args.repeats):
        inputs = make_inputs(row, args.batch, dtype, args.device)
        for n in threads:
            torch.set_num_threads(n)
            for contestant in CONTESTANTS:
                if n != threads[-1] and contestant != "ours":
                    continue
                elapsed = run_once(contestant, row, inputs, backward, args.device)
                if repeat >= 0:  # the first round warms up
                    times.setdefault((contestant, n), []).append(elapsed)
    return {key: statistics.median(values) for key, values in times.items()}


def geometric_mean(values):
    return math.exp(statistics.fmean(map(math.log, values)))


def time_table(args, dtype, backward):
    threads = [1, args.threads] if args.device == "cpu" and args.threads > 1 else [args.threads]
    what = "forward + backward" if backward else "forward"
    print(f"\n### deform_conv2d, {what}, {str(dtype).removeprefix('torch.')}, batch {args.batch}\n")
    print(
        "| row | ours, ms | torchvision, ms | F.conv2d, ms | torchvision / ours | ours / F.conv2d | 1 thread / ours |"
    )
    print("|---|---|---|---|---|---|---|")
    ratios = []
    for row in ROWS:
        medians = compare(row, args, dtype, backward, threads)
        own, other, conv = (medians[name, threads[-1]] for name in CONTESTANTS)
        ratios.append((other / own, own / conv, medians["ours", threads[0]] / own))
        cells = [row.name, *(f"{ms:.1f}" for ms in (own, other, conv)), *(f"{r:.2f}" for r in ratios[-1])]
        print(f"| {' | '.join(cells)} |", flush=True)
    means = [f"{geometric_mean(column):.2f}" for column in zip(*ratios, strict=True)]
    print(f"| geometric mean | | | | {' | '.join(means)} |", flush=True)


def peak_memory():
    """Bytes of resident memory that this process ever had; getrusage would count the parent's in."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def extra_memory(contestant, index, backward, threads):
    """Bytes by which one call, run in a process of its own, raises the peak of resident memory, less its results."""
    torch.set_num_threads(threads)
    row = ROWS[index]
    small = Row("warm-up", 32, 24, 24)
    run_once(contestant, small, make_inputs(small, 1, torch.float32, "cpu"), backward, "cpu")
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
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        contestant, index, backward = args.memory_of
        print(extra_memory(contestant, int(index), backward == "1", args.threads))
        return
    processor = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} threads"
    print(f"{platform.processor() or platform.machine()}, {processor}, torch {torch.__version__}, ", end="")
    print(f"torchvision {torchvision.__version__}, medians of {args.repeats}, {time.strftime('%Y-%m-%d')}")
    for dtype in args.dtypes:
        for backward in (False, True):
            time_table(args, getattr(torch, dtype), backward)
    if args.device == "cpu":
        memory_table(args)


if __name__ == "__main__":
    main()
