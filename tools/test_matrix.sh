#!/usr/bin/env bash
# Runs the tests beside several versions of Python, PyTorch and Detectron2, each in an environment of its own.
#
#   tools/test_matrix.sh FOLDER [pytest arguments]
#
# FOLDER receives the environments and copies of the project, and is kept. DETECTRON2_MAIN, a checkout of Detectron2, adds its row.
# MATRIX chooses rows: lines of "Python torch torchvision Detectron2".
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1" && folder=$(cd "$1" && pwd) && shift
MATRIX=${MATRIX:-"3.10 2.6.0 0.21.0 0.6
3.11 2.11.0 0.26.0 0.6
3.12 2.11.0 0.26.0 0.6
3.13 2.15.0 0.29.2 0.6
${DETECTRON2_MAIN:+3.11 2.11.0 0.26.0 main}"}

summary="| Python | torch | Detectron2 | tests |
|---|---|---|---|"
while read -r python torch torchvision detectron2; do
  [ -n "$python" ] || continue
  name=$python-torch$torch-detectron2-$detectron2
  project=$folder/$name
  rm -rf "$project"
  git clone -q "$source" "$project"
  cd "$project"
  export UV_PYTHON=$python VIRTUAL_ENV=$project/.venv
  if uv sync -q --no-install-project > "$name.log" 2>&1 &&
    uv pip install -q "torch==$torch" "torchvision==$torchvision" setuptools ninja >> "$name.log" 2>&1 &&
    if [ "$detectron2" = main ]; then
      uv pip uninstall -q pb1-detectron2 && uv pip install -q --no-deps --no-build-isolation "$DETECTRON2_MAIN"
    fi >> "$name.log" 2>&1 &&
    .venv/bin/python setup.py -q build_ext --inplace >> "$name.log" 2>&1; then
    .venv/bin/python -m pytest -q "$@" >> "$name.log" 2>&1 || true
    result=$(tail -1 "$name.log")
  else
    result="not installed, see $name.log"
  fi
  summary+=$'\n'"| $python | $torch | $detectron2 | $result |"
done <<< "$MATRIX"
echo "$summary"
