#!/usr/bin/env bash
# Runs the tests beside several versions of Python, PyTorch and Detectron2, each in an environment of its own, and prints a table.
# Needs git, g++ and uv, which fetches the Pythons that are not here. Fails if any row does.
#
#   tools/test_matrix.sh FOLDER [pytest arguments]
#
# FOLDER receives for each row a copy of the last commit with its environment and log, and table.md; all are kept.
# MATRIX chooses rows: lines of "Python torch Detectron2". DETECTRON2_MAIN is where Detectron2's main is: a git+ address or a folder.
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1" && folder=$(cd "$1" && pwd) && shift
DETECTRON2_MAIN=${DETECTRON2_MAIN:-git+https://github.com/facebookresearch/detectron2.git}
MATRIX=${MATRIX:-"3.10 2.11.0 0.6
3.11 2.6.0 0.6
3.11 2.11.0 0.6
3.11 2.11.0 main
3.11 newest 0.6
3.12 2.11.0 0.6
3.13 2.11.0 0.6"}

install() {
  local constraint=torch
  [ "$torch" = newest ] || constraint+="==$torch"
  # What is resolved for this Python alone may differ from what is resolved for all of them, and today from yesterday.
  sed -i -e "s/^requires-python = .*/requires-python = \"==$python.*\"/" -e '/^exclude-newer/d' \
    -e "s/^constraint-dependencies = .*/constraint-dependencies = [\"$constraint\"]/" pyproject.toml
  uv sync --python "$python" || return
  if [ "$detectron2" = main ]; then
    uv pip uninstall pb1-detectron2 && uv pip install "setuptools<82" &&
      uv pip install --no-build-isolation "detectron2 @ $DETECTRON2_MAIN"
  fi
}

versions() {  # of Python, torch and torchvision, as table cells
  .venv/bin/python -c "import platform, torch, torchvision as tv; print(platform.python_version(), torch.__version__, tv.__version__, sep=' | ')"
}

unset VIRTUAL_ENV PYTHONPATH
status=0
printf '%s\n' '| date | Python | torch | torchvision | Detectron2 | tests |' '|---|---|---|---|---|---|' | tee "$folder/table.md"
while read -r python torch detectron2; do
  [ -n "$python" ] || continue
  name=python$python-torch$torch-detectron2-$detectron2
  log=$folder/$name.log
  rm -rf "${folder:?}/$name"
  git clone -q "$source" "$folder/$name"
  cd "$folder/$name"
  cells="$python | $torch | "
  if install < /dev/null > "$log" 2>&1 && cells=$(versions 2>> "$log"); then
    .venv/bin/python -m pytest -q "$@" < /dev/null >> "$log" 2>&1 || status=1
    result=$(tail -1 "$log" | grep -E ' in [0-9.]+s') || result="ended early, see $name.log"
  else
    status=1 result="not installed, see $name.log"
  fi
  echo "| $(date +%F) | $cells | $detectron2 | $result |" | tee -a "$folder/table.md"
done <<< "$MATRIX"
exit $status
