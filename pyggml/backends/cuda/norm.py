"""RMS norm as a step of its own: of heads (q and k norms), before a residual, and wherever more than matrices read the result."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from pyggml.backends.cuda.act import array_of, block_sum, count_of
from pyggml.backends.cuda.base import DeviceStep, Launch, Needs, Scratch
from pyggml.backends.cuda.intrinsics import kernel
from pyggml.backends.cuda.tails import hand_on_normed

MOST_THREADS = 256
MOST_WARPS = MOST_THREADS // 32
f32, i64 = np.float32, np.int64


@cache
def _kernel(weighted: bool, with_residual: bool, hands_on: int) -> Any:
    @kernel
    def rms_norm(x, weight, residual, dst, d, eps, after, eps_after, made, slots, slot, per, rows):
        """A block a row, which it may leave normed once more and prepared for the next product."""
        shared = cuda.shared.array(MOST_WARPS, np.float32)
        if cuda.blockIdx.x >= count_of(slots, slot, per, rows):
            return
        tid, threads, row = cuda.threadIdx.x, cuda.blockDim.x, i64(cuda.blockIdx.x) * d
        squares = f32(0)
        for i in range(tid, d, threads):
            squares += x[row + i] * x[row + i]
        factor = f32(1) / math.sqrt(block_sum(squares, shared, tid, threads) / f32(d) + eps)
        for i in range(tid, d, threads):
            y = x[row + i] * factor * (weight[i] if weighted else f32(1))
            dst[row + i] = y + residual[row + i] if with_residual else y
        if hands_on >= 0:
            cuda.syncthreads()                                  # the row is in memory
            hand_on_normed(dst, cuda.blockIdx.x, d, after, eps_after, hands_on, rows, made, shared, tid, threads)
    return rms_norm


def rms_norm(stream: Any, slots: Any, step: DeviceStep, scratch: Scratch) -> None:
    x, weight, residual = step.src
    assert x is not None
    d, rows, per = x.shape[-1], math.prod(x.shape[:-1]), math.prod(x.shape[1:-1])
    threads, on = min(MOST_THREADS, -(-d // 32) * 32), step.hands_on
    _kernel(weight is not None, residual is not None, on.kind if on is not None else -1)[rows, threads, stream](
        x.array, array_of(weight, np.float32), array_of(residual, np.float32), step.dst.array, d, f32(step.f[0]),
        array_of(on.norm if on is not None else None, np.float32), f32(on.eps if on is not None else 0), scratch.handing, slots, step.dst.slot,
        per, rows)
    scratch.hand_on(on)


def can_hand_on(step: DeviceStep, normed: bool) -> bool:
    """Can this step leave what it makes normed and prepared?"""
    return normed and len(step.dst.shape) == 2 and step.dst.shape[-1] % 8 == 0


LAUNCHES: dict[str, Launch] = {"rms_norm": rms_norm}
NEEDS: dict[str, Needs] = {}
