"""Scales of a group of 32 weights: of_X(x, i), the words loaded for group i -> (scale, scale, min, min) of its halves (see decode.py)."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyggml.backends.cuda.intrinsics import device
from pyggml.backends.cuda.prims import float_of, half, halves

u32, i32, f32 = np.uint32, np.int32, np.float32
ZERO = f32(0)


def half_at(n: int) -> Any:
    @device
    def scales(x, i):
        d = half(x[n])
        return d, d, ZERO, ZERO
    return scales


def half_and_min_at(n: int) -> Any:
    @device
    def scales(x, i):
        d, m = halves(x[n])
        return d, d, m, m
    return scales


@device
def of_q8_K(x, i):
    d = float_of(x[8])
    return d, d, ZERO, ZERO


def k4_at(n: int) -> Any:
    @device
    def scales(x, i):
        """Words n ..: d and dmin, then twelve bytes of 6-bit scales and mins (drawn in pyggml/quants/kquants.py)."""
        d, dmin = halves(x[n])
        a, b, c = x[n + 1], x[n + 2], x[n + 3]
        j = u32(i & 3) << 3                                          # the byte of each word that this group has a part in
        if i & 4:
            s, m = c >> j & u32(15) | (a >> j & u32(0xC0)) >> 2, c >> j >> 4 & u32(15) | (b >> j & u32(0xC0)) >> 2
        else:
            s, m = a >> j & u32(63), b >> j & u32(63)
        scale, low = d * f32(s), -dmin * f32(m)
        return scale, scale, low, low
    return scales


@device
def of_q2_K(x, i):
    d, dmin = halves(x[3])
    s = x[2]
    return d * f32(s & u32(15)), d * f32(s >> 8 & u32(15)), -dmin * f32(s >> 4 & u32(15)), -dmin * f32(s >> 12 & u32(15))


@device
def of_q3_K(x, i):
    d, s = half(x[4]), x[3]
    return d * f32(i32(s & u32(63)) - 32), d * f32(i32(s >> 8) - 32), ZERO, ZERO


@device
def of_q6_K(x, i):
    d, s = half(x[7]), x[6]
    return d * f32(i32(s & u32(255) ^ u32(128)) - 128), d * f32(i32(s >> 8 ^ u32(128)) - 128), ZERO, ZERO


@device
def of_iq4_xs(x, i):
    d = half(x[5]) * f32(i32(x[4]) - 32)
    return d, d, ZERO, ZERO


@device
def of_mxfp4(x, i):                                              # half of 2^(e - 127); the two smallest are denormals
    e = x[4]
    d = float_of((e - u32(1)) << 23 if e >= u32(2) else u32(0x200000) << e)
    return d, d, ZERO, ZERO


@device
def ue4m3_half(bits):
    """Half of the unsigned float eeee mmm of bias 7; bit 7 counts for nothing, and 127, the NaN elsewhere, is 0."""
    e, m = bits >> 3 & u32(15), bits & u32(7)
    value = float_of((e + u32(119)) << 23 | m << 20) if e > u32(0) else f32(m) * f32(2**-10)
    return value if bits != u32(127) else ZERO


@device
def of_nvfp4(x, i):
    return ue4m3_half(x[4] & u32(255)), ue4m3_half(x[4] >> 8), ZERO, ZERO


@device
def of_iq2_xxs(x, i):
    d = half(x[2]) * (f32(0.5) + f32(x[1] >> 28)) * f32(0.25)
    return d, d, ZERO, ZERO


@device
def of_iq3_xxs(x, i):
    d = half(x[3]) * (f32(0.5) + f32(x[2] >> 28)) * f32(0.5)
    return d, d, ZERO, ZERO


@device
def of_iq2_xs(x, i):
    d, s = half(x[3]), x[2]
    return d * (f32(0.5) + f32(s & u32(15))) * f32(0.25), d * (f32(0.5) + f32(s >> 4)) * f32(0.25), ZERO, ZERO


@device
def of_iq2_s(x, i):
    d, s = half(x[3]), x[2] >> 8
    return d * (f32(0.5) + f32(s & u32(15))) * f32(0.25), d * (f32(0.5) + f32(s >> 4)) * f32(0.25), ZERO, ZERO


@device
def of_iq3_s(x, i):
    d = half(x[4]) * f32(u32(1) + u32(2) * (x[3] >> 8))
    return d, d, ZERO, ZERO


@device
def of_iq1_s(x, i):
    d = half(x[2]) * f32(u32(1) + u32(2) * (x[1] >> 12 & u32(7))) * f32(0.125)
    return d, d, ZERO, ZERO


@device
def of_iq1_m(x, i):
    d, s = half(x[3]), x[2]
    return d * f32(u32(1) + u32(2) * (s & u32(7))) * f32(0.125), d * f32(u32(1) + u32(2) * (s >> 3)) * f32(0.125), ZERO, ZERO
