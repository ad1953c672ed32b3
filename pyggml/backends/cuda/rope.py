"""Rotary position embedding: the table of angles of this batch, and the rotation (two values a lane)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda

from pyggml.backends.cuda.act import count_of
from pyggml.backends.cuda.base import DeviceStep, Launch, Needs, Scratch
from pyggml.backends.cuda.intrinsics import device, exact_kernel

THREADS = 128
f32, f64, i64 = np.float32, np.float64, np.int64


@exact_kernel                                        # angles of long contexts need every bit
def _table(pos, inv_freq, dst, half, mscale, slots, slot, limit):
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i < count_of(slots, slot, 1, limit) * half:
        angle = f64(pos[i // half]) * f64(inv_freq[i % half])
        dst[2 * i] = f32(math.cos(angle) * mscale)
        dst[2 * i + 1] = f32(math.sin(angle) * mscale)


def rope_table(stream: Any, slots: Any, step: DeviceStep, scratch: Scratch) -> None:
    pos, inv_freq = step.src[0], step.src[1]
    assert pos is not None and inv_freq is not None
    limit, half = pos.shape[0], inv_freq.shape[0]
    blocks = -(-limit * half // THREADS)
    _table[blocks, THREADS, stream](pos.array, inv_freq.array, step.dst.array, half, float(step.f[0]), slots, step.dst.slot, limit)


@device
def rotated(x, row, i, d, half, mode, table, t):
    """(value of place i, i) of a head's row after rotation; a place below `half` stands for its pair, one above 2 half for itself.

    i counts lanes: lane i < half has the pair (2i, 2i + 1) or (i, i + half), the others place half + i. -> (a, b, place of a, of b or -1)
    """
    if i >= half:
        return x[row + half + i], f32(0), half + i, -1
    first = 2 * i if mode == 0 else i
    second = 2 * i + 1 if mode == 0 else i + half
    a, b = x[row + first], x[row + second]
    c, s = table[2 * (t * half + i)], table[2 * (t * half + i) + 1]
    return a * c - b * s, a * s + b * c, first, second


@device
def rope_at(x, row, d, half, mode, table, t, norm, factor, normed):
    """Number d of a head's row after rotation (and, before it, a norm: times the factor and its weights), for who writes elsewhere than it reads."""
    if d >= 2 * half:
        return x[row + d] * factor * norm[d] if normed else x[row + d]
    i = d >> 1 if mode == 0 else (d if d < half else d - half)
    first, second = (2 * i, 2 * i + 1) if mode == 0 else (i, i + half)
    a, b = x[row + first], x[row + second]
    if normed:
        a, b = a * factor * norm[first], b * factor * norm[second]
    c, s = table[2 * (t * half + i)], table[2 * (t * half + i) + 1]
    return a * c - b * s if d == first else a * s + b * c


@exact_kernel
def _rope(x, table, dst, heads, d, half, mode, slots, slot, limit):
    lanes = d - half                                 # of a head
    i = i64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
    if i >= i64(count_of(slots, slot, 1, limit)) * heads * lanes:
        return
    row = i // lanes
    a, b, first, second = rotated(x, row * d, i % lanes, d, half, mode, table, row // heads)
    dst[row * d + first] = a
    if second >= 0:
        dst[row * d + second] = b


def rope(stream: Any, slots: Any, step: DeviceStep, scratch: Scratch) -> None:
    x, table = step.src[0], step.src[1]
    assert x is not None and table is not None
    limit, heads, d = x.shape
    mode, half = step.i[0], step.i[1] // 2
    _rope[-(-limit * heads * (d - half) // THREADS), THREADS, stream](
        x.array, table.array, step.dst.array, heads, d, half, mode, slots, step.dst.slot, limit)


LAUNCHES: dict[str, Launch] = {"rope_table": rope_table, "rope": rope}
NEEDS: dict[str, Needs] = {}
