#!/bin/sh
# Compiles the extension for aarch64 with Debian's cross compiler, a warning being an error: tools/cross.sh [FILE to keep it as].
# It is built from a copy of the tree, so the working tree keeps its own.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r "$root/native" "$root/pyggml" "$root/pyproject.toml" "$root/README.md" "$root/LICENSE" "$copy"
rm -f "$copy"/pyggml/_native*
cd "$copy"
CC=aarch64-linux-gnu-gcc LDSHARED="aarch64-linux-gnu-gcc -shared" PYGGML_MACHINE=aarch64 PYGGML_ISAS= PYGGML_CFLAGS=-Werror \
    PYGGML_REQUIRE_NATIVE=1 "$python" -c "from setuptools import setup; setup()" -q build_ext --inplace
[ $# -eq 0 ] || cp pyggml/_native*.so "$1"
