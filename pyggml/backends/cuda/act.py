"""Activations as a matrix product wants them, made once for all products that read them, normed on the way if they ask for it.

    INT8   for quantized weights and few columns: per 32 numbers signed bytes and a float scale.
           Column c: bytes 0..15 of every group, then bytes 16..31 (a lane's 16 bytes stand beside its neighbour's).
           Behind all columns: (scale f32, sums of the codes of both halves i16 i16) per column and group.
    HALF   for the tensor cores: half floats (columns, K padded to 32)
    FLOAT  for weights that are floats: floats (columns, K padded to 8)
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from pyggml.backends.cuda.base import DeviceView, Scratch
from pyggml.backends.cuda.intrinsics import device, kernel
from pyggml.backends.cuda.prims import (
    LOG2_E,
    bits_of,
    block_barrier,
    exp2,
    float_of,
    half2,
    load128_now,
    round_int,
    shfl_xor,
    store32,
    store64,
    store128,
    warp_sum,
)
from pyggml.backends.cuda.upload import device_constant

INT8, HALF, FLOAT = range(3)
THREADS = 256
WARPS = THREADS // 32
f32, i32, i64, u32 = np.float32, np.int32, np.int64, np.uint32


def none_of(dtype: Any) -> Any:
    """Stands for an absent array among a kernel's arguments."""
    return device_constant(dtype, lambda: np.zeros(16, dtype))


def array_of(view: DeviceView | None, dtype: Any) -> Any:
    return none_of(dtype) if view is None else view.array


@device
def count_of(slots, slot, per, limit):
    """How many there are in this run: `per` for each of slots[slot], or the limit where the size is fixed."""
    return min(slots[slot] * per, limit) if slot >= 0 else limit


@device
def block_sum(x, shared, tid, threads):
    """The sum of x over a block of whole warps; `shared` has a float for each warp."""
    x = warp_sum(x)
    if tid & 31 == 0:
        shared[tid >> 5] = x
    block_barrier()
    total = f32(0)
    for w in range(threads >> 5):
        total += shared[w]
    block_barrier()
    return total


def row_length(kind: int, k: int) -> int:
    """Numbers a column is padded to."""
    return -(-k // 8) * 8 if kind == FLOAT else -(-k // 32) * 32


def act_bytes(kind: int, k: int, columns: int) -> int:
    size = {INT8: 1.25, HALF: 2, FLOAT: 4}[kind]
    return int(columns * row_length(kind, k) * size)


@device
def bounded(x):
    """The nearest number that a half float has room for: infinity times 0 would be NaN, and a few numbers of some models are that large."""
    return max(f32(-65504), min(x, f32(65504)))


@cache
def _prepare_kernel(kind: int, normed: bool) -> Any:
    @kernel
    def prepare(x, norm, eps, act, k, padded, columns, slots, slot, per):
        """Block (c, s): numbers [s span, (s + 1) span) of column c, four to a lane; every block of a column sums its squares."""
        shared = cuda.shared.array(WARPS, np.float32)
        c = cuda.blockIdx.x                     # the grid's only axis that takes more than 65535
        if c >= count_of(slots, slot, per, columns):
            return
        tid, threads = cuda.threadIdx.x, cuda.blockDim.x
        row, span = i64(c) * k, 4 * threads
        factor = f32(1)
        if normed:
            squares = f32(0)
            if k & 3 == 0:
                for at in range(4 * tid, k, span):
                    v = load128_now(x, 4 * (row + at))
                    a, b, d, e = float_of(v[0]), float_of(v[1]), float_of(v[2]), float_of(v[3])
                    squares += a * a + b * b + d * d + e * e
            else:
                for at in range(tid, k, threads):
                    squares += x[row + at] * x[row + at]
            factor = f32(1) / math.sqrt(block_sum(squares, shared, tid, threads) / f32(k) + eps)
        at = cuda.blockIdx.y * span + 4 * tid
        a, b, d, e = f32(0), f32(0), f32(0), f32(0)
        if at + 3 < k and k & 3 == 0:
            v = load128_now(x, 4 * (row + at))
            a, b, d, e = float_of(v[0]), float_of(v[1]), float_of(v[2]), float_of(v[3])
            if normed:
                a, b, d, e = a * factor * norm[at], b * factor * norm[at + 1], d * factor * norm[at + 2], e * factor * norm[at + 3]
        else:
            if at < k:
                a = x[row + at] * factor * (norm[at] if normed else f32(1))
            if at + 1 < k:
                b = x[row + at + 1] * factor * (norm[at + 1] if normed else f32(1))
            if at + 2 < k:
                d = x[row + at + 2] * factor * (norm[at + 2] if normed else f32(1))
            if at + 3 < k:
                e = x[row + at + 3] * factor * (norm[at + 3] if normed else f32(1))
        if kind == INT8:
            quantize(a, b, d, e, act, i64(c) * padded, i64(columns) * padded + 8 * (i64(c) * (padded >> 5)), at, padded)
        elif at < padded:
            if kind == HALF:
                store64(act, 2 * (i64(c) * padded + at), half2(bounded(a), bounded(b)), half2(bounded(d), bounded(e)))
            else:
                store128(act, 4 * (i64(c) * padded + at), bits_of(a), bits_of(b), bits_of(d), bits_of(e))
    return prepare


@device
def quantize(a, b, c, d, act, codes, meta, at, k):
    """Numbers at .. at + 3 of a column of k to INT8: eight lanes share a group. All lanes of a warp come here; those past k write nothing."""
    top = max(max(abs(a), abs(b)), max(abs(c), abs(d)))
    top = max(top, shfl_xor(top, 1))
    top = max(top, shfl_xor(top, 2))
    top = max(top, shfl_xor(top, 4))
    scale = top * f32(1 / 127)
    inverse = f32(127) / top if top > f32(0) else f32(0)
    qa, qb, qc, qd = round_int(a * inverse), round_int(b * inverse), round_int(c * inverse), round_int(d * inverse)
    total = qa + qb + qc + qd
    total += shfl_xor(total, 1)
    total += shfl_xor(total, 2)
    other = shfl_xor(total, 4)
    if at < k:
        group, place = at >> 5, at & 31
        word = u32(qa & 255) | u32(qb & 255) << 8 | u32(qc & 255) << 16 | u32(qd & 255) << 24
        store32(act, codes + ((place >> 4) * (k >> 1) + 16 * group + (place & 15)), word)
        if place == 0:
            store64(act, meta + 8 * group, bits_of(scale), u32(total & 0xFFFF) | u32(other & 0xFFFF) << 16)


# ---- launching -------------------------------------------------------------------------------------------------------------------------

def prepare(kind: int, act_id: int, x: DeviceView, norm: DeviceView | None, eps: float, slots: Any, stream: Any, scratch: Scratch) -> Any:
    """Where the columns of x (.., K) are, prepared: in scratch.act, or where another step handed them on."""
    if act_id >= 0 and (act_id, kind) == scratch.handed_form:
        return scratch.handed
    if act_id >= 0 and (act_id, kind) == scratch.prepared:
        return scratch.act
    k = x.shape[-1]
    columns, per = math.prod(x.shape[:-1]), math.prod(x.shape[1:-1])
    padded = row_length(kind, k)
    threads = min(THREADS, -(-padded // 128) * 32)
    launch = _prepare_kernel(kind, norm is not None)[(columns, -(-padded // (4 * threads))), threads, stream]
    launch(x.array, norm.array if norm is not None else none_of(np.float32), f32(eps), scratch.act, k, padded, columns, slots, x.slot, per)
    scratch.prepared = act_id, kind
    return scratch.act


# ---- functions of one number, for gated units and caps ---------------------------------------------------------------------------------

@device
def _tanh(x):
    return f32(1) - f32(2) / (exp2(x * f32(2 * LOG2_E)) + f32(1))


@device
def capped(x, cap):
    """What is far beyond `cap` comes near it."""
    return cap * _tanh(x / cap)


@device
def _sigmoid(x):
    return f32(1) / (f32(1) + exp2(-x * f32(LOG2_E)))


@device
def gated_unit(gate, up, kind):
    """GLU_* of native/engine.h: act(gate) * up of silu, gelu (tanh form) and relu, and gpt-oss's clamped form."""
    if kind == 0:
        return gate * _sigmoid(gate) * up
    if kind == 1:
        return f32(0.5) * gate * (f32(1) + _tanh(f32(0.7978845608028654) * (gate + f32(0.044715) * gate * gate * gate))) * up
    if kind == 2:
        return max(gate, f32(0)) * up
    gate, up = min(gate, f32(7)), max(min(up, f32(7)), f32(-7))
    return gate * _sigmoid(f32(1.702) * gate) * (up + f32(1))
