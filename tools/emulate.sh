#!/bin/sh
# Runs tests on the NEON kernels under emulation: tools/emulate.sh FOLDER [command of Python, "-m pytest tests/table -k neon" without one].
# FOLDER keeps an aarch64 Python with its packages, made once (as root: debootstrap, qemu-user-static, gcc-aarch64-linux-gnu, unzip).
# An emulated processor is 10 to 30 times slower: all of tests/table takes most of an hour.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
python=${PYTHON:-python3}
version=3.11                            # of the Python in that Debian
if [ ! -d "$folder/site" ]; then
    debootstrap --foreign --arch=arm64 --variant=minbase --include=python3 bookworm "$folder/debian"
    for package in "$folder"/debian/var/cache/apt/archives/*.deb; do dpkg-deb -x "$package" "$folder/debian"; done
    "$python" -m pip download -q -d "$folder/wheels" --only-binary :all: --python-version $version --platform manylinux2014_aarch64 \
        --platform manylinux_2_28_aarch64 numpy cffi jinja2 regex tqdm pytest hypothesis greenlet sentencepiece
    for wheel in "$folder"/wheels/*.whl; do unzip -qo "$wheel" -d "$folder/site"; done
fi
tree=$folder/tree
rm -rf "$tree" && mkdir "$tree"
cp -r "$root/native" "$root/pyggml" "$root/tests" "$root/tools" "$root/models" "$root/pyproject.toml" "$tree"
rm -f "$tree"/pyggml/_native*.so
PYTHON=$python "$root/tools/cross.sh" "$tree/pyggml/_native.cpython-$(echo $version | tr -d .)-aarch64-linux-gnu.so"
cd "$tree"
[ $# -gt 0 ] || set -- -m pytest -p no:cacheprovider tests/table -k neon
exec qemu-aarch64-static -cpu max -L "$folder/debian" -E PYTHONHOME="$folder/debian/usr" -E PYTHONPATH="$tree:$folder/site" \
    "$folder/debian/usr/bin/python$version" "$@"
