#!/usr/bin/env bash
# Builds the CPU operators with AddressSanitizer and UndefinedBehaviorSanitizer in a folder of their own and runs their tests.
# Needs gcc; any finding fails. Further arguments go to pytest; without any, the fuzz and the definition tests run.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r setup.py pyproject.toml README.md csrc dcnv2_d2 tests "$copy"
rm -f "$copy"/dcnv2_d2/_C.*
cd "$copy"
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
CFLAGS="$flags -O1" CXXFLAGS="$flags -O1" LDFLAGS="$flags" FORCE_CUDA=0 "$python" setup.py -q build_ext --inplace > build.log 2>&1 ||
  { tail -20 build.log; exit 1; }
# Leaks are Python's own. The allocator must be the sanitizer's from the start.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:exitcode=99 UBSAN_OPTIONS=print_stacktrace=1
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
[ $# -gt 0 ] || set -- tests/ops/test_fuzz.py tests/ops/test_deform_conv2d.py tests/ops/test_deform_roi_pool.py tests/ops/test_deform_ps_roi_pool.py
PYTHONPATH=. "$python" -m pytest -q -p no:cacheprovider "$@" -k "not compile and not export"
