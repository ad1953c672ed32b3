#!/bin/sh
# Rebuild the native extension in place after a change under native/ (a compiler error stops it).
cd "$(dirname "$0")/.." && PYGGML_REQUIRE_NATIVE=1 exec "${PYTHON:-python3}" -c "from setuptools import setup; setup()" -q build_ext --inplace
