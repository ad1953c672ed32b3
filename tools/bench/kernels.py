"""Times single kernels at the shapes of a 1.1B model: python tools/bench/kernels.py [--threads N] [--only SUBSTRING] [--cache F16] [--coarse].

Each line gives the median and the fastest of many calls in microseconds; for attention also billions of multiply-adds per
second, and what 22 layers of it cost. PYGGML_ISA chooses the instruction set.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from pyggml import native
from pyggml.backends.cpu import Pool, Program, physical_cores
from pyggml.types import tensor_type

LAYERS, D_MODEL, FFN, HEADS, KV_HEADS, HEAD = 22, 2048, 5632, 32, 4, 64
SECONDS = 0.6                   # spent on each line


def measure(program: Program, pool: Pool, clock) -> tuple[float, float]:
    """Median and minimum microseconds of a run, by `clock` (nanoseconds)."""
    program.finish()
    times, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 5:
        start = clock()
        program.run(pool)
        times.append((clock() - start) / 1e3)
    return statistics.median(times), min(times)


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def attention(cache_type: str, tokens: int, depth: int, coarse: bool) -> Program:
    """`tokens` new tokens of one sequence on top of `depth` cells; decoding also ropes and stores."""
    program, cells, row = Program(), depth + tokens, tensor_type(cache_type)
    shape = (KV_HEADS, cells, HEAD)
    views = [program.view(floats(tokens, HEADS, HEAD))]
    for _ in "kv":
        size = KV_HEADS * cells * row.row_bytes(HEAD)
        memory = np.zeros(size + 64, np.uint8)
        cache = memory[-memory.ctypes.data % 64:][:size]
        if cache_type == "F16":
            cache.view(np.float16)[:] = floats(size // 2)
        views.append(program.view(cache, cache_type, shape))
    views += [program.view(np.arange(depth, cells, dtype=np.int32)), program.view(np.zeros(tokens, np.int32))]
    dst = program.view(np.zeros((tokens, HEADS * HEAD), np.float32))
    if tokens <= 8:
        views += [program.view(floats(*shape)) for shape in ((tokens, KV_HEADS, HEAD), (tokens, KV_HEADS, HEAD), (tokens, HEAD // 2, 2))]
        program.step("attention_step", dst, views, i=[0, 0, HEAD, coarse], f=[HEAD ** -0.5, 0.0])
    else:
        program.step("attention", dst, views, i=[0, coarse], f=[HEAD ** -0.5, 0.0])
    return program


def element_wise(op: str, dst: tuple[int, ...], *src, i=(), f=()) -> Program:
    program = Program()
    program.step(op, program.view(np.zeros(dst, np.float32)), [program.view(x) for x in src], i, f)
    return program


def cases(cache_type: str, coarse: bool):
    """(name, program, multiply-adds or 0)"""
    for tokens in (1, 512):
        at, table = f"T={tokens}", floats(tokens, HEAD // 2, 2)
        yield f"rms_norm {at}", element_wise("rms_norm", (tokens, D_MODEL), floats(tokens, D_MODEL), floats(D_MODEL), f=[1e-5]), 0
        yield f"add {at}", element_wise("add", (tokens, D_MODEL), floats(tokens, D_MODEL), floats(tokens, D_MODEL)), 0
        yield f"glu {at}", element_wise("glu", (tokens, FFN), floats(tokens, FFN), floats(tokens, FFN), i=[0]), 0
        yield f"rope {at}", element_wise("rope", (tokens, HEADS, HEAD), floats(tokens, HEADS, HEAD), table, i=[0, HEAD]), 0
        yield f"rope neox {at}", element_wise("rope", (tokens, HEADS, HEAD), floats(tokens, HEADS, HEAD), table, i=[1, HEAD]), 0
        positions = np.arange(tokens, dtype=np.int32)
        yield f"rope_table {at}", element_wise("rope_table", (tokens, HEAD // 2, 2), positions, floats(HEAD // 2), f=[1.0]), 0
    for tokens, depth in ((1, 0), (1, 512), (1, 4096), (4, 512), (8, 4096), (512, 0), (512, 4096)):
        seen = tokens * depth + tokens * (tokens + 1) // 2
        yield f"attention {cache_type} T={tokens} depth {depth}", attention(cache_type, tokens, depth, coarse), 2 * HEADS * HEAD * seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--only", default="", help="lines whose name contains this")
    parser.add_argument("--cache", default="F16", help="type of the K/V cache")
    parser.add_argument("--coarse", action="store_true", help="attention may round products to bf16")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of the calling thread: for one thread on a busy machine")
    options = parser.parse_args()
    pool = Pool(options.threads)
    print(f"{native.isa}, {options.threads} threads")
    for name, program, macs in cases(options.cache, options.coarse):
        if options.only in name:
            middle, best = measure(program, pool, time.thread_time_ns if options.cpu_time else time.perf_counter_ns)
            rate = f"  {macs / middle / 1e3:6.1f} GMAC/s  {LAYERS * middle / 1e3:8.2f} ms for {LAYERS} layers" if macs else ""
            print(f"{name:34} {middle:10.1f} us  min {best:10.1f}{rate}", flush=True)


if __name__ == "__main__":
    main()
