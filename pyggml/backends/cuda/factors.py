"""How each type takes part in a product with few columns (matvec.py): what a lane fetches of a row, and that times a column."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from pyggml.backends.cuda.act import FLOAT, INT8
from pyggml.backends.cuda.decode import decoder
from pyggml.backends.cuda.intrinsics import device
from pyggml.backends.cuda.layout import FLOATS
from pyggml.backends.cuda.prims import dp4a, float_of, halves, load64, load128, stream128

f32, i32, i64, u32 = np.float32, np.int32, np.int64, np.uint32


@dataclass(frozen=True)
class Factor:
    """How a type takes part: `fetch` a lane's unit of weights, `times` that unit with a column of activations of kind `act`."""

    fetch: Any              # (w, o1, o2, o3, grid, unit of the matrix, unit of the row) -> decoded
    times: Any              # (decoded, act, column, columns, units, unit of the row, 0 or 1) -> f32
    unit: int               # weights
    act: int


def quantized(type_name: str) -> Factor:
    d = decoder(type_name)
    load, codes, scales, zero, two, has_min = d.load, d.codes, d.scales, d.zero, d.halves, d.has_min

    @device
    def fetch(w, o1, o2, o3, grid, at, here):
        x = load(w, o1, o2, o3, at)
        return codes(x, grid), scales(x, here)

    @device
    def times(decoded, act, column, columns, groups, here, keep):
        q, s = decoded
        k = i64(groups) * 32
        at = column * k + 16 * here
        a, b = load128(act, at), load128(act, at + (k >> 1))
        meta = load64(act, columns * k + 8 * (i64(column) * groups + here))
        low = dp4a(q[3], a[3], dp4a(q[2], a[2], dp4a(q[1], a[1], dp4a(q[0], a[0], 0))))
        high = dp4a(q[7], b[3], dp4a(q[6], b[2], dp4a(q[5], b[1], dp4a(q[4], b[0], 0))))
        sum_low, sum_high = i32(meta[1] << 16) >> 16, i32(meta[1]) >> 16
        if two:
            y = s[0] * f32(low - zero * sum_low) + s[1] * f32(high - zero * sum_high)
            if has_min:
                y += s[2] * f32(sum_low) + s[3] * f32(sum_high)
        else:
            y = s[0] * f32(low + high - zero * (sum_low + sum_high))
            if has_min:
                y += s[2] * f32(sum_low + sum_high)
        return float_of(meta[0]) * keep * y
    return Factor(fetch, times, 32, INT8)


HIGH = u32(0xFFFF0000)


@device
def eight_F32(w, i):
    a, b = stream128(w, 32 * i), stream128(w, 32 * i + 16)
    return (float_of(a[0]), float_of(a[1]), float_of(a[2]), float_of(a[3]), float_of(b[0]), float_of(b[1]), float_of(b[2]), float_of(b[3]))


@device
def eight_F16(w, i):
    a = stream128(w, 16 * i)
    p, q, r, s = halves(a[0]), halves(a[1]), halves(a[2]), halves(a[3])
    return p[0], p[1], q[0], q[1], r[0], r[1], s[0], s[1]


@device
def eight_BF16(w, i):
    a = stream128(w, 16 * i)
    return (float_of(a[0] << 16), float_of(a[0] & HIGH), float_of(a[1] << 16), float_of(a[1] & HIGH),
            float_of(a[2] << 16), float_of(a[2] & HIGH), float_of(a[3] << 16), float_of(a[3] & HIGH))


EIGHT = {"F32": eight_F32, "F16": eight_F16, "BF16": eight_BF16}       # numbers 8i .. 8i + 7 of a matrix of floats


def floats(type_name: str) -> Factor:
    eight = EIGHT[type_name]

    @device
    def fetch(w, o1, o2, o3, grid, at, here):
        return eight(w, at)

    @device
    def times(q, act, column, columns, eights, here, keep):
        at = 32 * (i64(column) * eights + here)
        a, b = load128(act, at), load128(act, at + 16)
        y = q[0] * float_of(a[0]) + q[1] * float_of(a[1]) + q[2] * float_of(a[2]) + q[3] * float_of(a[3])
        y += q[4] * float_of(b[0]) + q[5] * float_of(b[1]) + q[6] * float_of(b[2]) + q[7] * float_of(b[3])
        return keep * y
    return Factor(fetch, times, 8, FLOAT)


@cache
def factor(type_name: str) -> Factor:
    return floats(type_name) if type_name in FLOATS else quantized(type_name)
