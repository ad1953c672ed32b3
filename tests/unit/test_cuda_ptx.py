"""What the GPU's kernels are compiled to, without a GPU: the instructions that they are written for, and registers without spills."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WIDE = "ld.global.nc.L1::no_allocate.v4.u32"
missing = [name for name in ("numba_cuda", "nvidia") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason="needs the CUDA compiler's wheels: pip install 'pyggml[cuda]'")

# registers a thread of a hot kernel may take (4 warps a block): 64 leave room for 32 warps a multiprocessor (top_k has
# blocks of so many, which are not launched otherwise), 128 for 16, 255 for 8
REGISTERS = {
    "matvec Q4_K": 64, "matvec Q4_K few rows": 64, "matvec Q6_K": 80, "matvec Q8_0": 80, "matvec F16": 64,
    "matvec gated Q4_K": 72, "matvec Q4_K 8 columns": 144, "prepare": 40, "top_k": 64, "gemm Q4_K small": 160, "gemm Q4_K": 255,
    "matvec Q4_K normed": 64, "qkv Q4_K Q6_K": 80, "qkv Q4_K Q6_K F16": 80, "qkv Q8_0 Q8_0": 80,
    "attention decode F16": 128, "attention decode Q8_0 128": 184, "attention prefill F16 128": 184,
    "attention decode F16 256": 255,
}


@cache
def compiled(*capabilities: str) -> dict:
    """What tests/cuda/compiled.py says."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_ENABLE_CUDASIM": "0"}
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "cuda" / "compiled.py"), *capabilities], env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


LATER = "9.0", "8.0", "10.0"


@pytest.mark.parametrize("capability", ["7.5", *LATER])
def test_hot_kernels(capability):
    for name, made in compiled(*(LATER if capability in LATER else [capability]))[capability].items():
        used = made["instructions"]
        assert made["spilled"] == made["stack"] == 0, (name, made)
        assert capability == "7.5" or made["registers"] <= REGISTERS[name], (name, made)
        assert made["shared"] <= 48 << 10, (name, made)
        if name.startswith("matvec F16"):
            assert used[WIDE] >= 2, (name, used)
        elif name.startswith(("matvec", "qkv")):
            assert used["dp4a"] >= 8 and used[WIDE] >= 1, (name, used)
        elif name.startswith("gemm"):
            assert used["mma.sync"] >= 4 and used["ldmatrix"] >= 2, (name, used)
            assert (used.get("cp.async.cg", 0) > 0) == (capability != "7.5"), (name, used)      # before 8.0 copies go through registers
        elif name.startswith("attention"):
            assert used["mma.sync"] >= 16, (name, used)


def test_several_wide_loads_are_under_way():
    """Bytes in flight hide the memory's latency: each lane of a decoding kernel asks for at least 64 bytes before it computes."""
    kernels = compiled(*LATER)["9.0"]
    for name in ("matvec Q4_K", "matvec Q6_K", "matvec Q4_K few rows"):
        assert 16 * kernels[name]["instructions"][WIDE] >= 64 or name.endswith("few rows"), (name, kernels[name])
