"""Compiles kernels to PTX, and to machine code with ptxas; prints what came out as JSON.

    python tests/cuda/compiled.py 9.0 8.0 10.0
    {"9.0": {"kernel": {"registers": .., "spilled": .., "stack": .., "shared": .., "instructions": {..}}, ..}, ..}

The first capability gets all kernels, the others some. No GPU takes part: Numba is told that there is one of the first, and what it lowers
once is compiled for the others too, whose instructions must be the same (prims.py has other ones before 8.0). Run by tests/unit/test_cuda_ptx.py.
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numba.cuda.compiler as compiler
import numba.cuda.dispatcher as dispatcher
from numba import types

from pyggml.backends.cuda import act, attention, factors, gemm, matvec, qkv, sample
from pyggml.backends.cuda.cachestore import Heads

NUMBERS = {"U8": types.uint8, "I32": types.int32, "F32": types.float32, "F16": types.float16}
SCALARS = {"i": types.int64, "f": types.float32}
INSTRUCTIONS = re.compile(r"\b(dp4a|mma\.sync|ldmatrix|cp\.async\.cg|ld\.global\.nc\.L1::no_allocate\.v4\.u32|ld\.global\.nc\.v4\.u32)")


def signature(text: str) -> tuple:
    """"U8 i i f": array and scalar types of a kernel's arguments."""
    return tuple(types.Array(NUMBERS[word], 1, "C") if word in NUMBERS else SCALARS[word] for word in text.split())


def _matvec(form: matvec.Form) -> tuple:
    w, x = ("F16", "F32") if form.gate == "F16" else ("U8", "U8")
    planes = f"{w} i i i U8"
    return matvec.matvec_kernel(form), f"{planes} {planes} {x} i I32 i i F32 F32 F32 F32 f f i i F32 f U8 I32 I32 i i"


def _gemm(form: gemm.Form) -> tuple:
    return gemm.gemm_kernel(form), "U8 i i i U8 U8 i I32 I32 i F32 F32 F32 f f i i i I32 i i i"


def _attention(form: attention.Form) -> tuple:
    k = "F16" if form.type_k == "F16" else "U8"
    return attention.attention_kernel(form), f"F32 {k} i {k} i I32 I32 F32 F32 U8 F32 F32 I32 i i i i f f I32 i i"


def _decoding(name: str, up: str = "", columns: int = 1, m: int = 1 << 17, **options: bool) -> tuple:
    """The kernel that a matrix of m rows of 4096 takes."""
    units = 4096 // factors.factor(name).unit
    return _matvec(matvec.Form(name, up, columns=columns, **matvec.shape_of(m, units, columns, bool(up)), **options))


def _qkv(name: str, other: str, cache: str = "") -> tuple:
    """Queries, keys and values of a model of 4096 numbers with 8 heads of keys, whose heads may be settled in a cache of this type."""
    shape = matvec.shape_of(4096 + 1024 + 1024, 4096 // factors.factor(name).unit, 1, False)
    forms = tuple(matvec.Form(n, **shape) for n in (name, name, other))
    planes, tensor = "U8 i i i U8 i F32 F32", "F16" if cache == "F16" else "U8"
    return (qkv.qkv_kernel(qkv.Form(forms, Heads(cache, cache) if cache else None)),
            f"{planes} {planes} {planes} U8 I32 i I32 F32 F32 f f F32 I32 {tensor} i {tensor} i F32 i i i i i i i I32 i i")


SOME = {
    "matvec Q4_K": lambda: _decoding("Q4_K"),
    "gemm Q4_K small": lambda: _gemm(gemm.Form("Q4_K", 64, 32)),
    "attention decode F16": lambda: _attention(attention.Form("F16", "F16", 64, 64, True)),
    "top_k": lambda: (sample._top_k, "F32 I32 F32 i i I32 i i"),
    "prepare": lambda: (act._prepare_kernel(act.INT8, True), "F32 F32 f U8 i i i I32 i i"),
}
ALL = {
    **SOME,
    "matvec Q4_K few rows": lambda: _decoding("Q4_K", m=1024),
    "matvec Q6_K": lambda: _decoding("Q6_K"),
    "matvec Q8_0": lambda: _decoding("Q8_0"),
    "matvec F16": lambda: _decoding("F16"),
    "matvec gated Q4_K": lambda: _decoding("Q4_K", "Q4_K", hands_on=act.INT8),
    "matvec Q4_K 8 columns": lambda: _decoding("Q4_K", columns=8),
    "matvec Q4_K normed": lambda: _decoding("Q4_K", m=4096, residual=True, hands_on=act.INT8, normed=True),
    "qkv Q4_K Q6_K": lambda: _qkv("Q4_K", "Q6_K"),
    "qkv Q4_K Q6_K F16": lambda: _qkv("Q4_K", "Q6_K", "F16"),
    "qkv Q8_0 Q8_0": lambda: _qkv("Q8_0", "Q8_0", "Q8_0"),
    "gemm Q4_K": lambda: _gemm(gemm.Form("Q4_K")),
    "attention decode Q8_0 128": lambda: _attention(attention.Form("Q8_0", "Q8_0", 128, 128, True, hands_on=True)),
    "attention prefill F16 128": lambda: _attention(attention.Form("F16", "F16", 128, 128, False)),
    "attention decode F16 256": lambda: _attention(attention.Form("F16", "F16", 256, 256, True)),
}


def ptxas() -> str | None:
    """ptxas of the CUDA compiler's wheel, beside which numba-cuda finds its own parts."""
    import nvidia

    found = sorted(path for root in nvidia.__path__ for path in Path(root).glob("*/bin/ptxas"))
    return str(found[0]) if found else None


def assembled(ptx: str, cc: tuple[int, int], folder: str) -> dict[str, int]:
    """What ptxas -v says about one kernel."""
    source = Path(folder) / "kernel.ptx"
    source.write_text(ptx)
    tool = ptxas()
    assert tool is not None
    command = [tool, f"-arch=sm_{cc[0]}{cc[1]}", "-v", str(source), "-o", str(source.with_suffix(".cubin"))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    text = done.stdout + done.stderr

    def number(pattern: str) -> int:
        found = re.search(pattern, text)
        return int(found[1]) if found else 0
    return dict(registers=number(r"Used (\d+) registers"), stack=number(r"(\d+) bytes stack frame"), spilled=number(r"(\d+) bytes spill stores"),
                shared=number(r"(\d+) bytes smem"))


def main(first: str, *others: str) -> None:
    gc.disable()                            # compiling makes millions of small objects that stay
    capabilities = {name: tuple(int(part) for part in name.split(".")) for name in (first, *others)}
    cc = capabilities[first]
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=cc, id=0)     # device functions are compiled for "this" GPU
    out: dict[str, dict] = {name: {} for name in capabilities}
    with tempfile.TemporaryDirectory() as folder:
        for name, make in (ALL if others else SOME).items():
            kernel, arguments = make()
            library, _ = compiler._compile_pyfunc_with_fixup(kernel.py_func, signature(arguments), device=False, abi="numba", cc=cc, fastmath=True)
            for capability, of in capabilities.items():
                if capability == first or name in SOME:
                    ptx = library.get_asm_str(cc=of)
                    out[capability][name] = {**assembled(ptx, of, folder), "instructions": Counter(INSTRUCTIONS.findall(ptx))}
    print(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
