"""Decoding without the host: the best token, the k best, and the step to the next token. Shapes in base.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from pyggml.backends.cuda.act import count_of
from pyggml.backends.cuda.base import DeviceStep, Launch, Needs, Scratch
from pyggml.backends.cuda.intrinsics import SIMULATED, kernel
from pyggml.backends.cuda.prims import shfl_xor

THREADS = 32 if SIMULATED else 1024
WARPS = THREADS // 32
LOWEST = np.float32(-3.4e38)
NEVER = np.int32(0x7FFFFFFF)
f32, i32, i64 = np.float32, np.int32, np.int64


@kernel
def _top_k(logits, ids, values, n, k, slots, slot, limit):
    """A block a row, k rounds: each finds the largest value that comes after the one before (larger first, of equals the lower id)."""
    best = cuda.shared.array(WARPS, np.float32)         # on lines of their own: the simulator tells shared arrays apart by line
    where = cuda.shared.array(WARPS, np.int32)
    b = cuda.blockIdx.x
    if b >= count_of(slots, slot, 1, limit):
        return
    row, tid = i64(b) * n, cuda.threadIdx.x
    last, last_id = f32(3.4e38), i32(-1)
    for round_ in range(k):
        x, at = LOWEST, NEVER
        for i in range(tid, n, THREADS):
            y = logits[row + i]
            after = y < last or (y == last and i > last_id)
            if after and (y > x or at == NEVER):
                x, at = y, i32(i)
        for m in (16, 8, 4, 2, 1):
            other, other_at = shfl_xor(x, m), shfl_xor(at, m)
            if other_at != NEVER and (at == NEVER or other > x or (other == x and other_at < at)):
                x, at = other, other_at
        if tid & 31 == 0:
            best[tid >> 5], where[tid >> 5] = x, at
        cuda.syncthreads()
        x, at = best[0], where[0]
        for w in range(1, WARPS):
            if where[w] != NEVER and (at == NEVER or best[w] > x or (best[w] == x and where[w] < at)):
                x, at = best[w], where[w]
        cuda.syncthreads()
        last, last_id = x, at
        if tid == 0:
            ids[i64(b) * k + round_] = at if at != NEVER else 0
            values[i64(b) * k + round_] = x


@kernel
def _advance(ids, tokens, pos, cell, history, count, n, rows):
    b = cuda.threadIdx.x
    done = count[0]
    cuda.syncthreads()
    if b < rows:
        if done < n:
            history[done * rows + b] = ids[b]
        tokens[b] = ids[b]
        pos[b] += 1
        cell[b] += 1
    if b == 0:
        count[0] = done + 1


def argmax(stream: Any, slots: Any, step: DeviceStep, scratch: Scratch) -> None:
    logits = step.src[0]
    assert logits is not None
    rows, n = logits.shape
    _top_k[rows, THREADS, stream](logits.array, step.dst.array, scratch.temp[:4 * rows].view(np.float32), n, 1, slots, logits.slot, rows)


def top_k(stream: Any, slots: Any, step: DeviceStep, scratch: Scratch) -> None:
    logits, values = step.src[0], step.src[1]
    assert logits is not None and values is not None
    rows, n = logits.shape
    _top_k[rows, THREADS, stream](logits.array, step.dst.array, values.array, n, step.dst.shape[-1], slots, logits.slot, rows)


def advance(stream: Any, slots: Any, step: DeviceStep, scratch: Scratch) -> None:
    ids, pos, cell, history, count = (view.array for view in step.src if view is not None)
    assert step.src[3] is not None
    rows = step.dst.shape[0]
    _advance[1, -(-rows // 32) * 32, stream](ids, step.dst.array, pos, cell, history, count, step.src[3].shape[0], rows)


LAUNCHES: dict[str, Launch] = {"argmax": argmax, "top_k": top_k, "advance": advance}
NEEDS: dict[str, Needs] = {"argmax": lambda step, cells: (0, 4 * step.src[0].shape[0] if step.src[0] is not None else 0)}
