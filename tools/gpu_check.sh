#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds for it, runs the GPU tests, the sanitizers, the benchmark and a short training, and
# ends with a summary that fits a screen. At most 8 minutes; needs torch, torchvision, pytest, hypothesis, matplotlib, nvcc and
# ninja, no network; pytest-xdist is used where it is.
#
# tools/gpu_check.sh [folder for the logs, the tables and their picture; default output/gpu_check]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-output/gpu_check}
python=${PYTHON:-python3}
mkdir -p "$out"
# ninja may lie beside python only, compute-sanitizer beside nvcc only.
export PATH="$(dirname "$(command -v "$python")"):$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
summary="$out/summary.txt"
: > "$summary"

step() {  # step <name> <seconds at most> <command...>: runs it, and notes how it went
  local name=$1 limit=$2 start=$SECONDS left=$((475 - SECONDS)) result
  shift 2
  [ $limit -lt $left ] || limit=$((left > 1 ? left : 1))
  echo "== $name"
  timeout -s INT -k 10 "$limit" "$@" > "$out/$name.log" 2>&1  # INT: pytest then tells what has failed so far
  result=$?
  [ $result -eq 0 ] && result=ok || result="FAILED ($result)"
  printf '%-12s %-12s %4d s  %s\n' "$name" "$result" $((SECONDS - start)) "$(tail -1 "$out/$name.log" | cut -c1-90)" | tee -a "$summary"
}

"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU"' || exit 1
step build 200 env FORCE_CUDA=1 "$python" setup.py -q build_ext --inplace --force
! grep -q FAILED "$summary" && "$python" -c '
import torch
from dcnv2_d2.ops import _extension
_extension.check()
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
assert has_kernel("dcnv2_d2::deform_conv2d", "CUDA"), "built without CUDA"' || { tail -20 "$out/build.log"; exit 1; }

# The tests that name a device run on both; here the halves on the GPU, and what else is about it.
workers=$("$python" -c 'import xdist' 2> /dev/null && echo "-n 8 --dist loadfile")  # by file: the largest tests take turns
step tests 200 "$python" -m pytest -q -p no:cacheprovider --tb=short $workers tests/ops -k "cuda and not compiles and not cpu"
step roofline 120 "$python" tools/roofline.py --output "$out" --repeats 9
if command -v compute-sanitizer > /dev/null; then
  some='test_cuda.py and cuda and (float32 and channels_last or awkward or fused) and not cpu'
  for tool in memcheck racecheck; do
    # Without the caching allocator, in whose blocks tensors lie side by side; our kernels only, not the libraries'.
    step $tool 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 \
      --report-api-errors no --kernel-name kns=dcnv2 \
      "$python" -m pytest -q -x -p no:cacheprovider tests/ops/test_cuda.py -k "$some"
  done
else
  echo "sanitizer    NOT RUN: no compute-sanitizer here" | tee -a "$summary"
fi
if "$python" -c 'import detectron2' 2> /dev/null; then
  step training 75 "$python" train_net.py --config-file configs/quick_start/mask_rcnn_small_mdconv_c3-c5_mdpool.yaml SOLVER.AMP.ENABLED True \
    DATASETS.TRAIN "('bent_shapes_tiny_train',)" DATASETS.TEST "('bent_shapes_tiny_val',)" \
    SOLVER.MAX_ITER 60 OUTPUT_DIR "$out/training"
else
  echo "training     NOT RUN: no Detectron2 here" | tee -a "$summary"
fi

echo
"$python" -m dcnv2_d2.collect_env 2> /dev/null | grep -E '^(PyTorch|GPU|dcnv2_d2._C loads)'
echo
# Of each table geometric means of: best peer / ours, F.conv2d / ours, floor / ours, and ours / fused, which decides whether the
# fused kernel becomes what a forward pass of half types takes.
"$python" - "$out/roofline.json" <<'END' | tee -a "$summary"
import json, math, sys
from pathlib import Path

path = Path(sys.argv[1])
if path.is_file():
    heads = ("peer / ours", "conv2d / ours", "floor / ours", "ours / fused")
    print(f"{'geometric means':<58} " + " ".join(f"{head:>13}" for head in heads))
    for title, records in json.loads(path.read_text())["tables"]:
        sums = [0.0] * 4
        for record in records:
            times = record["milliseconds"]
            best = {"ours": math.nan, "fused": math.nan, "F.conv2d": math.nan, "peer": math.nan}
            for name, ms in times.items():
                name = next((prefix for prefix in best if name.startswith(prefix)), "peer")
                best[name] = min(ms, best[name])  # ms, if there is none yet
            ours = best["ours"]
            for i, ratio in enumerate((best["peer"] / ours, best["F.conv2d"] / ours, record["floor"] / ours, ours / best["fused"])):
                sums[i] += math.log(ratio) / len(records)
        print(f"{title:<58} " + " ".join("-".rjust(13) if math.isnan(s) else f"{math.exp(s):13.2f}" for s in sums))
END
! grep -q FAILED "$summary"
