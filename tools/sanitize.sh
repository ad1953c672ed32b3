#!/bin/sh
# Runs tests against kernels built with AddressSanitizer and UndefinedBehaviorSanitizer: tools/sanitize.sh [pytest arguments].
# SANITIZER=thread: with ThreadSanitizer instead.
# The instrumented extension is built from a copy of the tree, so the working tree keeps its own; name tests by absolute paths.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r "$root/native" "$root/pyggml" "$root/pyproject.toml" "$root/README.md" "$root/LICENSE" "$copy"
rm -f "$copy"/pyggml/_native*
cd "$copy"
case ${SANITIZER:-address} in
    address) flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined" libraries="libasan.so libubsan.so" ;;
    thread) flags="-fsanitize=thread" libraries="libtsan.so" ;;
esac
preload=
for library in $libraries; do preload="$preload $(cc -print-file-name=$library)"; done
PYGGML_CFLAGS="$flags -fno-omit-frame-pointer -O1" PYGGML_REQUIRE_NATIVE=1 \
    PYGGML_ISAS="${PYGGML_ISAS:-scalar}" "$python" -c "from setuptools import setup; setup()" -q build_ext --inplace
[ $# -gt 0 ] || set -- "$root/tests/table"
# Python itself leaks by design and numpy maps large sparse files: neither is this code's doing
LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 TSAN_OPTIONS="halt_on_error=1 report_bugs=1" \
    PYTHONPATH="$copy" exec "$python" -m pytest -q -p no:cacheprovider "$@"
