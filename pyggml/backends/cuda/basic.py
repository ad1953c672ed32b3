"""Rows of a table, and arithmetic element by element."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from pyggml.backends.cuda.act import capped, count_of, gated_unit
from pyggml.backends.cuda.base import DeviceStep, Launch, Needs, Scratch
from pyggml.backends.cuda.decode import decoder
from pyggml.backends.cuda.factors import EIGHT
from pyggml.backends.cuda.intrinsics import device, kernel
from pyggml.backends.cuda.matvec import planes_of
from pyggml.backends.cuda.prims import add_rn, bits_of, float_of, load128_now, mul_rn, store128

THREADS = 128
f32, i32, i64, u32 = np.float32, np.int32, np.int64, np.uint32


# ---- get_rows: a lane decodes a group of 32 weights, or 8 floats ---------------------------------------------------------------------

@device
def signed_byte(word, n):
    return (i32(word >> 8 * n & u32(255)) ^ 128) - 128


@device
def put(dst, at, word, zero, scale, low, factor):
    """Four weights of one word of codes: scale (code - zero) + low, rounded as ggml rounds it, times the embedding's factor."""
    a, b = f32(signed_byte(word, 0) - zero), f32(signed_byte(word, 1) - zero)
    c, d = f32(signed_byte(word, 2) - zero), f32(signed_byte(word, 3) - zero)
    store128(dst, at, bits_of(mul_rn(add_rn(mul_rn(scale, a), low), factor)), bits_of(mul_rn(add_rn(mul_rn(scale, b), low), factor)),
             bits_of(mul_rn(add_rn(mul_rn(scale, c), low), factor)), bits_of(mul_rn(add_rn(mul_rn(scale, d), low), factor)))


@cache
def _quantized_rows(type_name: str) -> Any:
    d = decoder(type_name)
    load, codes, scales, zero = d.load, d.codes, d.scales, d.zero

    @kernel
    def get_rows(w, o1, o2, o3, grid, ids, dst, groups, factor, slots, slot, limit):
        t = cuda.blockIdx.x
        g = cuda.blockIdx.y * THREADS + cuda.threadIdx.x
        if t >= count_of(slots, slot, 1, limit) or g >= groups:
            return
        x = load(w, o1, o2, o3, i64(ids[t]) * groups + g)
        q, s = codes(x, grid), scales(x, g)
        at = 128 * (i64(t) * groups + g)
        for n in range(4):
            put(dst, at + 16 * n, q[n], zero, s[0], s[2], factor)
            put(dst, at + 64 + 16 * n, q[4 + n], zero, s[1], s[3], factor)
    return get_rows


@cache
def _float_rows(type_name: str) -> Any:
    eight = EIGHT[type_name]

    @kernel
    def get_rows(w, o1, o2, o3, grid, ids, dst, eights, d, factor, slots, slot, limit):
        t = cuda.blockIdx.x
        i = cuda.blockIdx.y * THREADS + cuda.threadIdx.x
        if t >= count_of(slots, slot, 1, limit) or i >= eights:
            return
        q = eight(w, i64(ids[t]) * eights + i)
        for n in range(8):
            if 8 * i + n < d:
                dst[i64(t) * d + 8 * i + n] = mul_rn(q[n], factor)
    return get_rows


@kernel
def _rows_of_values(x, ids, dst, d, factor, slots, slot, limit):
    t = cuda.blockIdx.x
    i = cuda.blockIdx.y * THREADS + cuda.threadIdx.x
    if t < count_of(slots, slot, 1, limit) and i < d:
        dst[i64(t) * d + i] = x[i64(ids[t]) * d + i] * factor


def get_rows(stream: Any, slots: Any, step: DeviceStep, scratch: Scratch) -> None:
    table, ids = step.src[0], step.src[1]
    assert table is not None and ids is not None
    limit, d, w = math.prod(step.dst.shape[:-1]), step.dst.shape[-1], table.weight
    tail = (f32(step.f[0] if step.f else 1), slots, step.dst.slot, limit)
    if w is None:                                   # rows of a value: the tokens whose logits are wanted
        _rows_of_values[(limit, -(-d // THREADS)), THREADS, stream](table.array, ids.array, step.dst.array, d, *tail)
    elif w.quantized:
        groups = d // 32
        _quantized_rows(w.type)[(limit, -(-groups // THREADS)), THREADS, stream](*planes_of(w), ids.array, step.dst.array, groups, *tail)
    else:
        eights = w.k // 8
        _float_rows(w.type)[(limit, -(-eights // THREADS)), THREADS, stream](*planes_of(w), ids.array, step.dst.array, eights, d, *tail)


# ---- element by element, four to a lane -------------------------------------------------------------------------------------------------

OF_ONE = ("scale", "softcap")           # with a factor or a cap


@cache
def _elementwise(op: str, kind: int) -> Any:
    @device
    def apply(a, b, factor):
        if op == "add":
            return a + b
        if op == "mul":
            return a * b
        if op == "scale":
            return a * factor
        if op == "softcap":
            return capped(a, factor)
        return gated_unit(a, b, kind)

    @kernel
    def each(a, b, dst, factor, per, repeat, slots, slot, rows):
        """`per` numbers a row; b repeats after `repeat` numbers."""
        total = i64(count_of(slots, slot, 1, rows)) * per
        at = 4 * (i64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x)
        if at + 3 < total and per & 3 == 0:
            x, y = load128_now(a, 4 * at), load128_now(b, 4 * (at % repeat))
            store128(dst, 4 * at, bits_of(apply(float_of(x[0]), float_of(y[0]), factor)), bits_of(apply(float_of(x[1]), float_of(y[1]), factor)),
                     bits_of(apply(float_of(x[2]), float_of(y[2]), factor)), bits_of(apply(float_of(x[3]), float_of(y[3]), factor)))
        else:
            for i in range(at, min(at + 4, total)):
                dst[i] = apply(a[i], b[i % repeat], factor)
    return each


def _launch(op: str) -> Launch:
    def launch(stream: Any, slots: Any, step: DeviceStep, scratch: Scratch) -> None:
        a, b = step.src[0], step.src[1] if len(step.src) > 1 else step.src[0]
        assert a is not None and b is not None
        rows, per = step.dst.shape[0], math.prod(step.dst.shape[1:])
        repeat = math.prod(b.shape) if op not in OF_ONE else rows * per
        blocks = -(-rows * per // (4 * THREADS))
        _elementwise(op, step.i[0] if op == "glu" else 0)[blocks, THREADS, stream](
            a.array, b.array, step.dst.array, f32(step.f[0] if op in OF_ONE else 1), per, repeat, slots, step.dst.slot, rows)
    return launch


LAUNCHES: dict[str, Launch] = {"get_rows": get_rows, **{op: _launch(op) for op in ("add", "mul", "glu", *OF_ONE)}}
NEEDS: dict[str, Needs] = {}
