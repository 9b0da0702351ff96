#!/usr/bin/env python
"""What the machine code of the CUDA kernels shows without a GPU, as a Markdown table. Needs nvcc and nvdisasm (CUDA 12
or later; pip install nvidia-cuda-nvdisasm has the latter).

python tools/machine_code.py --arch sm_90
python tools/machine_code.py --source <another checkout>

Instructions of a bin are counted as often as their source lines run for the first row of the pooling benchmark, without
the lines that it never runs; those of a vector of 8 channels or of a step of 32 channels of a warp, once an iteration
of the innermost loop with the work in it. Both sides of any other branch count, so a figure is an upper bound. Loads in
flight: vectors asked for before the first one is used.
"""

import argparse
import collections
import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from benchmark import POOL_ROWS, ROWS, make_pool_inputs
from torch.utils import cpp_extension

KERNELS = {  # of bfloat16, as in the benchmark: (symbol, unit, what marks the loop with the work in it)
    "deform_roi_pool forward": (r"(?<!backward_)pool_kernelILi8EN3c108BFloat16", "bin", r"LDG\.E.*128"),
    "deform_roi_pool backward": (r"pool_backward_kernelILi8EN3c108BFloat16", "-", r"RED|ATOMG"),
    "deform_conv2d columns": (r"sample_columns_kernelILi8EN3c108BFloat16", "vector", r"LDG\.E.*128"),
    "deform_conv2d backward": (r"backward_columns_kernelILi[48]EN3c108BFloat16", "vector", r"RED|ATOMG"),
    "fused, 128 outputs": (r"fused_kernelILi128EN3c108BFloat16E(?!f)", "step", r"HMMA"),
    "fused, 256 outputs": (r"fused_kernelILi256EN3c108BFloat16E(?!f)", "step", r"HMMA"),
    "transpose": (r"transpose_kernelIN3c108BFloat16ES", "-", r"STG"),
}
BINS, WARPS = 49, 8


def find_nvdisasm():
    spec = importlib.util.find_spec("nvidia")
    wheels = [
        p for root in (spec.submodule_search_locations if spec else []) for p in Path(root).glob("*/bin/nvdisasm")
    ]
    found = shutil.which("nvdisasm") or next(map(str, wheels), None)
    return found or exit("no nvdisasm found")


def compile_kernels(source, arch):
    """Yields (name, [(instruction, chain of source lines)], what ptxas says of it)."""
    includes = [str(source / "csrc"), *cpp_extension.include_paths("cuda")]
    flags = ["-cubin", f"-arch={arch}", "-O3", "-std=c++17", "-lineinfo", "-Xptxas", "-v"]
    flags += cpp_extension.COMMON_NVCC_FLAGS
    lines = collections.defaultdict(list)
    for unit in sorted((source / "csrc" / "cuda").glob("*.cu")):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            command = ["nvcc", *flags, *(f"-I{path}" for path in includes), "-o", cubin.name, str(unit)]
            report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
            text = subprocess.run(
                [find_nvdisasm(), "-c", "-gi", cubin.name], check=True, capture_output=True, text=True
            ).stdout
        for section in re.split(r"\n\.text\.", text)[1:]:
            name, code, chain, fresh = section.split(":", 1)[0], [], [], True
            for line in section.splitlines():
                if place := re.match(r'\s*//## File "(.*?)", line (\d+)', line):
                    chain, fresh = ([] if fresh else chain), False
                    path = place[1]
                    if path not in lines:
                        lines[path] = Path(path).read_text().splitlines() if Path(path).is_file() else []
                    number = int(place[2])
                    chain.append(lines[path][number - 1] if number <= len(lines[path]) else "")
                elif label := re.match(r"(\.L_x_\d+):", line):
                    code.append((label[1], None))
                elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
                    code.append((instruction[1], tuple(chain)))
                    fresh = True
            said = re.search(rf"'{re.escape(name)}' for.*?Used (\d+) registers", report, re.S)
            spilled = re.search(r"(\d+) bytes spill stores", said[0]) if said else None
            yield name, code, (said[1], spilled[1]) if said else ("?", "?")


def hot_part(code):
    """Without what lies behind the last exit: divisions of awkward numbers, warps that lost each other."""
    cold = next((i for i, (text, _) in enumerate(code) if re.search("COLLECTIVE|RET", text)), len(code))
    end = max(i for i, (text, _) in enumerate(code[:cold]) if "EXIT" in text)
    return code[: end + 1]


def loops(code):
    """(first, last) of each loop, by its jump back."""
    labels = {text: i for i, (text, chain) in enumerate(code) if chain is None}
    found = {}
    for i, (text, _) in enumerate(code):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", text)
        if target and labels.get(target[1], i) < i:
            found[labels[target[1]]] = i
    return sorted(found.items(), key=lambda loop: loop[1] - loop[0])


def working_loop(code, mark):
    """The innermost loop that has most of what `mark` describes."""

    def marks(loop):
        return sum(bool(re.search(mark, text)) for text, _ in code[loop[0] : loop[1] + 1])

    innermost = [a for a in loops(code) if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops(code))]
    first, last = max(innermost, key=marks, default=(0, len(code) - 1))
    return [(text, chain) for text, chain in code[first : last + 1] if chain is not None]


def loads_in_flight(loop):
    most, waiting = 0, {}
    for text, _ in loop:
        operands = re.sub(r"^@!?U?P\d+ ", "", text).split(" ", 1)
        registers = {int(r) for r in re.findall(r"\bR(\d+)", operands[1] if len(operands) > 1 else "")}
        if re.match(r"LDG\.|LD\.E", operands[0]):
            first = int(re.search(r"\bR(\d+)", operands[1])[1])
            words = int(size[1]) // 32 if (size := re.search(r"\.(64|128)", operands[0])) else 1
            waiting.update(dict.fromkeys(range(first, first + words), first))
            most = max(most, len(set(waiting.values())))
        elif used := registers & waiting.keys():
            done = {waiting[r] for r in used}
            waiting = {r: load for r, load in waiting.items() if load not in done}
    return most


def visits_of_a_bin(row):
    """Means of how often a warp takes 4, 2 and 1 pixels at once, over the bins of a row of the benchmark."""
    torch.manual_seed(0)
    inputs = make_pool_inputs(row, 2, torch.bfloat16, "cpu")
    boxes, bins = inputs["boxes"][:, 1:] / row.stride - 0.5, torch.arange(row.bins, dtype=torch.float)
    counts = 1
    for low, high, extent, offset, index in (
        (boxes[:, 0], boxes[:, 2], row.width, inputs["offset"][:, 0], bins[None, :]),
        (boxes[:, 1], boxes[:, 3], row.height, inputs["offset"][:, 1], bins[:, None]),
    ):
        size = (high - low)[:, None, None, None]
        first = low[:, None, None, None] + 0.1 * size * offset[..., None] + index[..., None] * size / row.bins
        at = first + (torch.arange(2) + 0.5) * size / row.bins / 2
        near = at.clamp(0, extent - 1).floor()
        far = torch.where((at > 0) & (near < extent - 1), near + 1, near)
        inside = ((at >= -1) & (at <= extent)).repeat(1, 1, 1, 2)
        pixels = torch.where(inside, torch.cat([near, far], -1), -1).sort(-1).values
        counts = counts * ((pixels[..., :1] >= 0).sum(-1) + (pixels.diff(dim=-1) > 0).sum(-1))
    return [x.float().mean().item() for x in (counts // 4, counts // 2 % 2, counts % 2)]


def instructions_of_a_bin(code):
    """Of the forward pooling, for an NCHW input; None where the source has no lines that the rules know."""
    fours, twos, ones = visits_of_a_bin(POOL_ROWS[0])
    locating = -(-2 * BINS // 32) / BINS  # warps whose threads each find one stencil
    rules = [
        # What this row never does: bins of many samples, adaptive sampling, results that are channels last
        (r"true_type|locate_next_chunk|store\(place|std::ceil|i < last; \+\+i", 0),
        (r"scalar_t a = |low = axis.step|first = low - 2|high >= low|first < last", 0),
        (r"static_cast<int64_t>\((first|last)\)", 0),
        (r"row < rows; row \+=|to\[row \*", 0),
        (r"take<kAtOnce>", fours),
        (r"take<2>", twos),
        (r"take<1>", ones),
        (r"false_type", 1),
        (r"locate_pixels\(|i < 2 \* count", locating),
        (r"load_raw<vec>\(from\)|from < end", 256 / 8 / 32),  # a vector of each lane, for 256 channels
    ]
    total, known = 0.0, set()
    for text, chain in code:
        if chain is None or text == "NOP":
            continue
        times = [(pattern, n) for line in chain for pattern, n in rules if re.search(pattern, line)]
        known.update(pattern for pattern, _ in times)
        total += 0 if any(n == 0 for _, n in times) else times[0][1] if times else WARPS / BINS
    return total if len(known) == len(rules) else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path(__file__).resolve().parents[1], help="a checkout")
    parser.add_argument("--arch", default="sm_90")
    args = parser.parse_args()
    heads = "instructions", "loads in flight", "matrix instructions", "stores, bits", "atomics, bits"
    print("|", " | ".join([f"{args.arch}, bfloat16", *heads, "registers", "spilled bytes"]), "|")
    print("|---" * 8 + "|")
    found = list(compile_kernels(args.source.resolve(), args.arch))
    for title, (symbol, unit, mark) in KERNELS.items():
        for name, code, (registers, spilled) in found:
            if not re.search(symbol, name) or ("pool" in title and "RoIPoolShape" in name and "PSRoI" in name):
                continue
            code = hot_part(code)
            loop = working_loop(code, mark)
            count = instructions_of_a_bin(code) if unit == "bin" else len(loop)
            cell = "-" if count is None or unit == "-" else f"{count:.0f} a {unit}"

            def widths(pattern, where):
                sizes = collections.Counter()
                for text, _ in where:
                    if operation := re.search(pattern, text):
                        size = re.search(r"\.(8|16|64|128)\b|\.U(8|16)\b|x(2|4)\b", operation[0])
                        bits = (size[1] or size[2] or {"2": 64, "4": 128}[size[3]]) if size else 32
                        sizes[int(bits)] += 1
                return ", ".join(f"{n} x {bits}" for bits, n in sorted(sizes.items())) or "-"

            matrix = sum("HMMA" in text for text, _ in loop) or "-"
            stores = widths(r"STG\.\S+|STG\b", code)
            atomics = widths(r"(RED|ATOMG)\S*", loop)
            cells = [title, cell, loads_in_flight(loop), matrix, stores, atomics, registers, spilled]
            print("|", " | ".join(map(str, cells)), "|")
    row = next(row for row in ROWS if row.name == "c5")
    height, width = row.out_size
    print(f"\nblocks of the fused kernel at {row.name}, batch 2, 132 multiprocessors: ", end="")
    patches = 2 * -(-height // 8) * -(-width // 16) * -(-row.channels // 128)
    print(f"{-(-2 * height * width // 64) * -(-row.channels // 256)} (tiles of 64 pixels, 256 outputs), ", end="")
    print(f"{patches * max(132 // patches, 1)} (patches of 8 x 16, 128 outputs, in parts)")


if __name__ == "__main__":
    main()
