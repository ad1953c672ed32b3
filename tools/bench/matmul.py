"""Speed of the packed matmuls: GMAC/s and GB/s of weights per type, shape, number of columns and threads.

    python tools/bench/matmul.py [--types Q4_0,Q4_K] [--cols 1,4,8,64,512] [--shapes 2048x2048,5632x2048] [--threads 1,2] [--isa avx512]

Shapes are rows x k; the default ones are TinyLlama's. Weights are random bytes, packed before the clock starts; the time
includes everything a step does: preparing the activations, the sums, the epilogue. Weights that would stay in the cache are
repeated until they fill --memory megabytes, so that one column measures memory. `limit` is the time that reading the weights or
multiplying takes at best here, which is measured first (pyggml/roofline.py), as a share of the time it took.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from pyggml.backends.cpu import Pool, Program  # noqa: E402
from pyggml.native import huge_zeros, lib, select_isa  # noqa: E402
from pyggml.roofline import Work, measure_peaks  # noqa: E402
from pyggml.types import tensor_type  # noqa: E402


def weights(name: str, rows: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Raw (rows, bytes): random bits under scales of 1/64."""
    row = tensor_type(name)
    if row.block == 1:
        return np.full((rows, k * row.bytes), 0x1c, np.uint8)
    raw = rng.integers(0, 256, (rows, row.row_bytes(k)), np.uint8)
    blocks = raw.reshape(rows, -1, row.bytes).view(row.layout)
    for field in ("d", "m", "dmin"):
        if field in row.layout.names:
            blocks[field] = 1 / 64
    return raw


def kind(name: str, cols: int) -> str:
    """Which multiplications a product of packed weights with so many columns is made of: a field of Work."""
    row = tensor_type(name)
    if lib.pyg_act_format(row.id, 1, 0, 0) >= lib.PYG_ACT_WIDE * lib.PYG_ACT_BF16 and cols > lib.PYG_WIDE_COLS:
        return "bf16"
    return "int8" if row.quantized else "floats"


def measure(name: str, rows: int, k: int, cols: int, threads: int, memory: int, seconds: float) -> tuple[float, int]:
    """Best seconds of one matmul, and the bytes of its packed weight."""
    rng = np.random.default_rng(0)
    type_id = tensor_type(name).id
    size = lib.pyg_pack_bytes(type_id, rows, k)
    if not size:
        sys.exit(f"{name} has no packed form for rows of {k} weights")
    copies = max(1, min(64, (memory << 20) // size)) if cols <= 8 else 1
    raw = weights(name, rows, k, rng)
    fmt = lib.pyg_act_format(type_id, 1, 0, 0)
    program, pool = Program(), Pool(threads)
    x, y = rng.standard_normal((cols, k)).astype(np.float32), np.zeros((cols, rows), np.float32)
    xv, yv = program.view(x), program.view(y)
    prepared = int(cols > 8)
    if prepared:
        buffer = program.view(np.zeros(lib.pyg_act_bytes(fmt, k, cols), np.int8))
        program.step("prepare", buffer, [xv, -1], [0, fmt])
        xv = buffer
    for c in range(copies):
        ready = np.zeros(-(-rows // 16), np.uint8)
        w = program.view(raw, name, (rows, k), packed=huge_zeros(size), ready=ready)
        program.step("mul_mat", yv, [w, xv], [1, fmt, prepared], [0.0, 1.0], sync=c == 0)
    program.finish()
    program.run(pool)
    best, end = 1e9, time.perf_counter() + seconds
    while time.perf_counter() < end or best == 1e9:
        start = time.perf_counter()
        program.run(pool)
        best = min(best, (time.perf_counter() - start) / copies)
    return best, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="F16,Q4_0,Q8_0,Q4_K,Q6_K")
    parser.add_argument("--cols", default="1,4,8,64,512")
    parser.add_argument("--shapes", default="2048x2048,5632x2048,2048x5632,32000x2048")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--isa")
    parser.add_argument("--memory", type=int, default=256, help="MB of weights that a small batch walks through")
    parser.add_argument("--seconds", type=float, default=0.5, help="per measurement; the best of the runs that fit")
    options = parser.parse_args()
    print("isa:", select_isa(options.isa))
    crews = [int(n) for n in options.threads.split(",")]
    peaks = {n: measure_peaks(n) for n in crews}
    print(f"{'type':7} {'rows x k':>12} {'threads':>7} {'cols':>5} {'us':>10} {'GMAC/s':>8} {'GB/s':>7}  limit")
    for name in options.types.split(","):
        for shape in options.shapes.split(","):
            rows, k = map(int, shape.split("x"))
            for threads in crews:
                for cols in map(int, options.cols.split(",")):
                    t, size = measure(name, rows, k, cols, threads, options.memory, options.seconds)
                    macs = rows * k * cols
                    least, limit = peaks[threads].least(Work(size, **{kind(name, cols): macs}))
                    print(f"{name:7} {shape:>12} {threads:7} {cols:5} {t * 1e6:10.1f} {macs / t / 1e9:8.1f} {size / t / 1e9:7.1f}"
                          f"  {least / t:4.0%} {limit}", flush=True)


if __name__ == "__main__":
    main()
