"""RMS norm as a step of its own: of heads (q and k norms), and wherever more than matrices read the result."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from pyggml.backends.cuda.act import block_sum, count_of, none_of
from pyggml.backends.cuda.base import DeviceStep, Launch, Needs, Scratch
from pyggml.backends.cuda.intrinsics import kernel

MOST_THREADS = 256
MOST_WARPS = MOST_THREADS // 32
f32, i64 = np.float32, np.int64


@cache
def _kernel(weighted: bool) -> Any:
    @kernel
    def rms_norm(x, weight, dst, d, eps, slots, slot, per, rows):
        """A block a row."""
        shared = cuda.shared.array(MOST_WARPS, np.float32)
        if cuda.blockIdx.x >= count_of(slots, slot, per, rows):
            return
        tid, threads, row = cuda.threadIdx.x, cuda.blockDim.x, i64(cuda.blockIdx.x) * d
        squares = f32(0)
        for i in range(tid, d, threads):
            squares += x[row + i] * x[row + i]
        factor = f32(1) / math.sqrt(block_sum(squares, shared, tid, threads) / f32(d) + eps)
        for i in range(tid, d, threads):
            dst[row + i] = x[row + i] * factor * (weight[i] if weighted else f32(1))
    return rms_norm


def rms_norm(stream: Any, slots: Any, step: DeviceStep, scratch: Scratch) -> None:
    x, weight = step.src[0], step.src[1]
    assert x is not None
    d, rows, per = x.shape[-1], math.prod(x.shape[:-1]), math.prod(x.shape[1:-1])
    threads = min(MOST_THREADS, -(-d // 32) * 32)
    _kernel(weight is not None)[rows, threads, stream](
        x.array, weight.array if weight is not None else none_of(np.float32), step.dst.array, d, f32(step.f[0]), slots, step.dst.slot, per, rows)


LAUNCHES: dict[str, Launch] = {"rms_norm": rms_norm}
NEEDS: dict[str, Needs] = {}
