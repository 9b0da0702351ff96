#!/usr/bin/env bash
# Builds the CPU operators with AddressSanitizer and UndefinedBehaviorSanitizer in a folder of their own and runs their tests.
# Needs gcc; any finding fails. Arguments go to pytest; without any, all tests of the operators on the CPU run.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r setup.py pyproject.toml README.md csrc dcnv2_d2 tests "$copy"
rm -f "$copy"/dcnv2_d2/_C.*
cd "$copy"
# As the compiler and not as its flags, because setup.py's own flags, which come after those, leave out the line numbers.
printf '#!/bin/sh\nexec %s "$@" %s\n' "${CXX:-c++}" \
  "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g1" > compiler
chmod +x compiler
CXX="$copy/compiler" FORCE_CUDA=0 "$python" setup.py -q build_ext --inplace > build.log 2>&1 || { tail -20 build.log; exit 1; }
# Leaks are Python's own. The allocator must be the sanitizer's from the start.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:exitcode=99 UBSAN_OPTIONS=print_stacktrace=1
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
[ $# -gt 0 ] || set -- tests/ops
PYTHONPATH=. "$python" -m pytest -q -p no:cacheprovider -k "not compile and not export and not cuda" "$@"
