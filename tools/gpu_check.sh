#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds for it, runs the GPU tests, the sanitizers, the benchmark and a short training, and
# ends with a summary that fits a screen. At most 8 minutes; needs torch, torchvision, pytest, nvcc and ninja, no network.
#
# tools/gpu_check.sh [folder for the logs, the tables and their picture; default output/gpu_check]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-output/gpu_check}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
summary="$out/summary.txt"
: > "$summary"

step() {  # step <name> <seconds at most> <command...>: runs it, and notes how it went
  local name=$1 limit=$2 start=$SECONDS left=$((475 - SECONDS)) result
  shift 2
  [ $limit -lt $left ] || limit=$((left > 1 ? left : 1))
  echo "== $name"
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  result=$?
  [ $result -eq 0 ] && result=ok || result="FAILED ($result)"
  printf '%-12s %-12s %4d s  %s\n' "$name" "$result" $((SECONDS - start)) "$(tail -1 "$out/$name.log" | cut -c1-90)" | tee -a "$summary"
}

$python -c 'import torch; assert torch.cuda.is_available(), "no GPU"' || exit 1
step build 120 env FORCE_CUDA=1 "$python" setup.py -q build_ext --inplace
$python -c 'from dcnv2_d2 import ops' || { tail -20 "$out/build.log"; exit 1; }

# The tests that name a device run on both; here the halves on the GPU, and what else is about it.
step tests 150 "$python" -m pytest -q -p no:cacheprovider tests/ops -k "cuda and not emulated and not compiles and not cpu"
if command -v compute-sanitizer > /dev/null; then
  some='test_cuda.py and cuda and (float32 and channels_last or awkward) and not cpu'
  for tool in memcheck racecheck; do
    step $tool 60 compute-sanitizer --tool $tool --error-exitcode 9 --target-processes all \
      "$python" -m pytest -q -x -p no:cacheprovider tests/ops/test_cuda.py -k "$some"
  done
else
  echo "sanitizer    no compute-sanitizer here" | tee -a "$summary"
fi
step roofline 120 "$python" tools/roofline.py --output "$out" --repeats 9
if $python -c 'import detectron2' 2> /dev/null; then
  step training 75 "$python" train_net.py --config-file configs/quick_start/mask_rcnn_small_mdconv_c3-c5_mdpool.yaml SOLVER.AMP.ENABLED True \
    SOLVER.MAX_ITER 60 OUTPUT_DIR "$out/training"
else
  echo "training     no Detectron2 here" | tee -a "$summary"
fi

echo
"$python" -m dcnv2_d2.collect_env 2> /dev/null | grep -E '^(PyTorch|GPU|dcnv2_d2._C loads)'
echo
# Of each table its row of fractions: best peer / ours and floor / ours, geometric means.
"$python" - "$out/roofline.json" <<'END' | tee -a "$summary"
import json, math, sys
from pathlib import Path

path = Path(sys.argv[1])
if path.is_file():
    print(f"{'geometric means':<58} peer / ours  conv2d / ours  floor / ours")
    for title, records in json.loads(path.read_text())["tables"]:
        sums = [0.0, 0.0, 0.0]
        for record in records:
            times = record["milliseconds"]
            ours = min(ms for name, ms in times.items() if name.startswith("ours"))
            peer = min(ms for name, ms in times.items() if not name.startswith(("ours", "F.conv2d")))
            for i, ms in enumerate((peer, times.get("F.conv2d", math.nan), record["floor"])):
                sums[i] += math.log(ms / ours) / len(records)
        print(f"{title:<58} " + "  ".join(" " * 10 + "-" if math.isnan(s) else f"{math.exp(s):11.2f}" for s in sums))
END
! grep -q FAILED "$summary"
