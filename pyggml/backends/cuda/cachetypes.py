"""How keys and values lie in a cache on the GPU: what a lane fetches for the tensor cores, and how a row is stored.

F32, F16, BF16   numbers (Hk, C, D)
Q8_0, Q4_0       over the whole tensor a plane of codes, (Hk, C, D) bytes or (Hk, C, D / 2) bytes of nibbles (16 bytes hold 32 numbers:
                 byte j numbers j and 16 + j), and behind it a plane of half-float scales, (Hk, C, D / 32)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from pyggml.backends.cuda.factors import HIGH
from pyggml.backends.cuda.intrinsics import device
from pyggml.backends.cuda.prims import bits_of, float_of, half, half2, load16, load32, load64, load128, shfl_xor, store8, store16, store32, stream128
from pyggml.errors import PyggmlError

f32, i32, i64, u32 = np.float32, np.int32, np.int64, np.uint32


# ---- eight numbers from d on (a multiple of 8) of a row as four words of half floats; `plane`: where the scales start --------------------

def _fetch_F16(load: Any) -> Any:
    @device
    def fetch(cache, plane, row, d, size):
        return load(cache, 2 * (row * size + d))
    return fetch


def _fetch_F32(load: Any) -> Any:
    @device
    def fetch(cache, plane, row, d, size):
        a, b = load(cache, 4 * (row * size + d)), load(cache, 4 * (row * size + d) + 16)
        return (half2(float_of(a[0]), float_of(a[1])), half2(float_of(a[2]), float_of(a[3])),
                half2(float_of(b[0]), float_of(b[1])), half2(float_of(b[2]), float_of(b[3])))
    return fetch


def _fetch_BF16(load: Any) -> Any:
    @device
    def fetch(cache, plane, row, d, size):
        a = load(cache, 2 * (row * size + d))
        return (half2(float_of(a[0] << 16), float_of(a[0] & HIGH)), half2(float_of(a[1] << 16), float_of(a[1] & HIGH)),
                half2(float_of(a[2] << 16), float_of(a[2] & HIGH)), half2(float_of(a[3] << 16), float_of(a[3] & HIGH)))
    return fetch


@device
def _scaled(word, zero, s):
    """Four signed bytes as two words of half floats."""
    a, b = f32((i32(word & u32(255)) ^ 128) - 128 - zero), f32((i32(word >> 8 & u32(255)) ^ 128) - 128 - zero)
    c, d = f32((i32(word >> 16 & u32(255)) ^ 128) - 128 - zero), f32((i32(word >> 24) ^ 128) - 128 - zero)
    return half2(a * s, b * s), half2(c * s, d * s)


def _fetch_Q8_0(load: Any) -> Any:
    @device
    def fetch(cache, plane, row, d, size):
        q = load64(cache, row * size + d)
        s = half(load16(cache, plane + 2 * ((row * size + d) >> 5)))
        a, b = _scaled(q[0], 0, s), _scaled(q[1], 0, s)
        return a[0], a[1], b[0], b[1]
    return fetch


def _fetch_Q4_0(load: Any) -> Any:
    @device
    def fetch(cache, plane, row, d, size):
        at = row * size + d
        byte = (at >> 5) * 16 + (at & 8)                    # numbers 0..15 of 32 are low nibbles, 16..31 high ones
        shift = u32((at & 16) >> 2)
        s = half(load16(cache, plane + 2 * (at >> 5)))
        nibbles = u32(0x0F0F0F0F)
        a = _scaled(load32(cache, byte) >> shift & nibbles, 8, s)
        b = _scaled(load32(cache, byte + 4) >> shift & nibbles, 8, s)
        return a[0], a[1], b[0], b[1]
    return fetch


# ---- storing: a warp stores 32 numbers, a lane one of them; `keep`: the lane's number exists ----------------------------------------------

@device
def _store_F32(cache, plane, row, d, size, x, keep):
    if keep:
        store32(cache, 4 * (row * size + d), bits_of(x))


@device
def _store_F16(cache, plane, row, d, size, x, keep):
    if keep:
        store16(cache, 2 * (row * size + d), half2(x, f32(0)))


@device
def _store_BF16(cache, plane, row, d, size, x, keep):
    if keep:
        b = bits_of(x)
        rounded = (b + u32(0x7FFF) + (b >> 16 & u32(1))) >> 16       # to nearest, halves to even
        if x != x:
            rounded = b >> 16 | u32(64)
        store16(cache, 2 * (row * size + d), rounded)


@device
def _store_Q8_0(cache, plane, row, d, size, x, keep):
    """ggml's rule: d = max / 127, codes rounded from x / d, halves away from zero."""
    top = abs(x)
    for m in (16, 8, 4, 2, 1):
        top = max(top, shfl_xor(top, m))
    scale = top * f32(1 / 127)
    y = x * (f32(127) / top) if top > f32(0) else f32(0)
    code = i32(y + f32(0.5)) if y >= f32(0) else i32(y - f32(0.5))
    if keep:
        at = row * size + d
        store8(cache, at, u32(code & 255))
        if d & 31 == 0:
            store16(cache, plane + 2 * (at >> 5), half2(scale, f32(0)))


@device
def _store_Q4_0(cache, plane, row, d, size, x, keep):
    """ggml's rule: d = the value of largest magnitude (the first of equals) / -8, codes from 0 to 15 around 8."""
    top, lane = x, d & 31
    where = lane
    for m in (16, 8, 4, 2, 1):
        other, other_lane = shfl_xor(top, m), shfl_xor(where, m)
        if abs(other) > abs(top) or (abs(other) == abs(top) and other_lane < where):
            top, where = other, other_lane
    scale = top * f32(-1 / 8)
    y = x * (f32(-8) / top) if top != f32(0) else f32(0)
    code = min(15, i32(y + f32(8.5)))
    pair = shfl_xor(code, 16)
    if keep:
        at = row * size + d
        if lane < 16:
            store8(cache, (at >> 5) * 16 + lane, u32(code | pair << 4))
        if lane == 0:
            store16(cache, plane + 2 * (at >> 5), half2(scale, f32(0)))


@dataclass(frozen=True)
class CacheType:
    fetch: Callable[[Any], Any]         # (how to load 16 bytes) -> (cache, plane, row, d, D) -> four words
    store: Any                          # (cache, plane, row, d, D, x, keep)
    codes: float = 0                    # bytes of a number in the plane of codes, where there are scales


TYPES = {
    "F32": CacheType(_fetch_F32, _store_F32), "F16": CacheType(_fetch_F16, _store_F16), "BF16": CacheType(_fetch_BF16, _store_BF16),
    "Q8_0": CacheType(_fetch_Q8_0, _store_Q8_0, 1), "Q4_0": CacheType(_fetch_Q4_0, _store_Q4_0, 0.5),
}


def cache_type(name: str) -> CacheType:
    if name not in TYPES:
        raise PyggmlError(f"a cache of {name} cannot lie on the GPU; use {', '.join(TYPES)}")
    return TYPES[name]


@cache
def fetcher(name: str, once: bool) -> Any:
    """once: every number is read by one warp only, so that it need not stay in L1."""
    return cache_type(name).fetch(stream128 if once else load128)


def plane_offset(name: str, shape: tuple[int, ...]) -> int:
    """Where the scales of a cache tensor start."""
    return int(cache_type(name).codes * shape[0] * shape[1] * shape[2])
