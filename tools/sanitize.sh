#!/bin/sh
# Runs tests against kernels built with AddressSanitizer and UndefinedBehaviorSanitizer: tools/sanitize.sh [pytest arguments].
# The instrumented extension is built from a copy of the tree, so the working tree keeps its own; name tests by absolute paths.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r "$root/native" "$root/pyggml" "$root/pyproject.toml" "$root/README.md" "$root/LICENSE" "$copy"
rm -f "$copy"/pyggml/_native*
cd "$copy"
PYGGML_CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1" PYGGML_REQUIRE_NATIVE=1 \
    PYGGML_ISAS="${PYGGML_ISAS:-scalar}" "$python" -c "from setuptools import setup; setup()" -q build_ext --inplace
[ $# -gt 0 ] || set -- "$root/tests/table"
# Python itself leaks by design and numpy maps large sparse files: neither is this code's doing
LD_PRELOAD="$(cc -print-file-name=libasan.so) $(cc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
    PYTHONPATH="$copy" exec "$python" -m pytest -q -p no:cacheprovider "$@"
