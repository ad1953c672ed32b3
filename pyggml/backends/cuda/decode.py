"""What each re-laid type contributes on the GPU: a group of 32 weights as four words of codes per half, and their scales.

    load(w, o1, o2, o3, i)     the words of group i of a weight w whose planes high, scales, shared start at o1, o2, o3
    codes_X(x, grid)           those words -> 8 words of 4 signed bytes: words 0..3 are weights 0..15, words 4..7 weights 16..31
    scales_X(x, i)             -> (scale, scale, min, min) of the two halves
    weight = scale * (code - zero) + min, rounded in this order: the floats of pyggml.quants, bit for bit

Loading is apart from decoding so that a kernel can have several groups on the way before it needs the first. Matrix-vector
products, tiles for the tensor cores and get_rows all read weights through these three and know nothing else about a type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from pyggml.backends.cuda.layout import LAYOUTS, Layout
from pyggml.backends.cuda.prims import (
    device,
    float_of,
    half,
    halves,
    load8,
    load16,
    load32,
    load64,
    load128,
    prmt,
    stream8,
    stream16,
    stream32,
    stream64,
    stream128,
)
from pyggml.quants.codebooks import codebook

u32, i32, f32 = np.uint32, np.int32, np.float32


# ---- loads: the words of each plane, one plane after another ------------------------------------------------------------------------------

@device
def nothing(w, at):
    return ()


def _one(load: Any) -> Any:
    @device
    def one(w, at):
        return (load(w, at),)
    return one


# bytes of an entry -> how to load it, for weights that are read once (past L1) and for those that neighbours read again
_ONCE = {0: nothing, 1: _one(stream8), 2: _one(stream16), 4: _one(stream32), 8: stream64, 16: stream128}
_AGAIN = {0: nothing, 1: _one(load8), 2: _one(load16), 4: _one(load32), 8: load64, 16: load128}


def loader(layout: Layout, once: bool) -> Any:
    """(w, o1, o2, o3, i) -> the words of group i; what several groups share goes through L1 in any case."""
    by_size = _ONCE if once else _AGAIN
    low, high, scales, shared = (*(by_size[size] for size in layout.entries[:3]), _AGAIN[layout.entries[3]])
    n_low, n_high, n_scales, n_shared = layout.entries
    sharing = layout.shared.bit_length() - 1

    @device
    def load(w, o1, o2, o3, i):
        return low(w, n_low * i) + high(w, o1 + n_high * i) + scales(w, o2 + n_scales * i) + shared(w, o3 + n_shared * (i >> sharing))
    return load


# ---- codes ------------------------------------------------------------------------------------------------------------------------------

NIBBLES, PAIRS, ONES = u32(0x0F0F0F0F), u32(0x03030303), u32(0x01010101)


@device
def codes_4(x, grid):
    return (x[0] & NIBBLES, x[1] & NIBBLES, x[2] & NIBBLES, x[3] & NIBBLES,
            x[0] >> 4 & NIBBLES, x[1] >> 4 & NIBBLES, x[2] >> 4 & NIBBLES, x[3] >> 4 & NIBBLES)


@device
def codes_5(x, grid):
    h = x[4]
    return (x[0] & NIBBLES | (h & ONES) << 4, x[1] & NIBBLES | (h >> 1 & ONES) << 4,
            x[2] & NIBBLES | (h >> 2 & ONES) << 4, x[3] & NIBBLES | (h >> 3 & ONES) << 4,
            x[0] >> 4 & NIBBLES | h & ONES << 4, x[1] >> 4 & NIBBLES | h >> 1 & ONES << 4,
            x[2] >> 4 & NIBBLES | h >> 2 & ONES << 4, x[3] >> 4 & NIBBLES | h >> 3 & ONES << 4)


@device
def codes_6(x, grid):
    a, b = x[4], x[5]
    return (x[0] & NIBBLES | (a & PAIRS) << 4, x[1] & NIBBLES | (b & PAIRS) << 4,
            x[2] & NIBBLES | a << 2 & PAIRS << 4, x[3] & NIBBLES | b << 2 & PAIRS << 4,
            x[0] >> 4 & NIBBLES | a & PAIRS << 4, x[1] >> 4 & NIBBLES | b & PAIRS << 4,
            x[2] >> 4 & NIBBLES | a >> 2 & PAIRS << 4, x[3] >> 4 & NIBBLES | b >> 2 & PAIRS << 4)


@device
def codes_2(x, grid):
    a, b = x[0], x[1]
    return (a & PAIRS, b & PAIRS, a >> 2 & PAIRS, b >> 2 & PAIRS, a >> 4 & PAIRS, b >> 4 & PAIRS, a >> 6 & PAIRS, b >> 6 & PAIRS)


@device
def codes_3(x, grid):
    a, b, h = x[0], x[1], x[2]
    return (a & PAIRS | (h & ONES) << 2, b & PAIRS | h << 1 & ONES << 2, a >> 2 & PAIRS | h & ONES << 2, b >> 2 & PAIRS | h >> 1 & ONES << 2,
            a >> 4 & PAIRS | h >> 2 & ONES << 2, b >> 4 & PAIRS | h >> 3 & ONES << 2,
            a >> 6 & PAIRS | h >> 4 & ONES << 2, b >> 6 & PAIRS | h >> 5 & ONES << 2)


@device
def codes_8(x, grid):
    return x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]


@device
def sign_quad(h, n):                                                 # bit 1: 1, bit 0: -1
    return ((h >> n & ONES ^ ONES) * u32(255)) | ONES


@device
def codes_1(x, grid):
    h = x[0]
    return (sign_quad(h, 0), sign_quad(h, 1), sign_quad(h, 2), sign_quad(h, 3),
            sign_quad(h, 4), sign_quad(h, 5), sign_quad(h, 6), sign_quad(h, 7))


def table_codes(values: str) -> Any:
    """Codes of a type whose nibbles index sixteen signed bytes, which are kept in four registers."""
    t0, t1, t2, t3 = (u32(word) for word in codebook(values).reshape(-1).view("<u4"))

    @device
    def quad(four):                                                  # four nibbles in the low 16 bits
        index = four & u32(0x7777)
        return prmt(prmt(t0, t1, index), prmt(t2, t3, index), (four >> 1 & u32(0x4444)) | u32(0x3210))

    @device
    def codes(x, grid):
        return (quad(x[0]), quad(x[1]), quad(x[2]), quad(x[3]), quad(x[0] >> 16), quad(x[1] >> 16), quad(x[2] >> 16), quad(x[3] >> 16))
    return codes


# ---- codes of the I types: groups of 8 or 4 bytes from a codebook in memory, and signs ----------------------------------------------------

@device
def negate(magnitudes, mask):
    """Bytes with a minus where the mask is 255; no magnitude is 0, so that no byte carries into the next."""
    return (magnitudes ^ mask) + (mask & ONES)


@device
def four_masks(bits):                                                # bit n of the low four: byte n of the result is 255
    return ((bits & u32(15)) * u32(0x00204081) & ONES) * u32(255)


@device
def with_parity(seven):                                              # seven signs, the eighth makes their number even
    p = seven ^ seven >> 4
    p ^= p >> 2
    return seven | ((p ^ p >> 1) & u32(1)) << 7


@device
def signed_8(grid, index, signs):
    m = load64(grid, 8 * i32(index))
    return negate(m[0], four_masks(signs)), negate(m[1], four_masks(signs >> 4))


@device
def codes_iq2_xxs(x, grid):
    q, s = x[0], x[1]
    a = signed_8(grid, q & u32(255), with_parity(s & u32(127)))
    b = signed_8(grid, q >> 8 & u32(255), with_parity(s >> 7 & u32(127)))
    c = signed_8(grid, q >> 16 & u32(255), with_parity(s >> 14 & u32(127)))
    d = signed_8(grid, q >> 24, with_parity(s >> 21 & u32(127)))
    return a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]


@device
def codes_iq2_xs(x, grid):
    q, r = x[0], x[1]
    a = signed_8(grid, q & u32(511), with_parity(q >> 9 & u32(127)))
    b = signed_8(grid, q >> 16 & u32(511), with_parity(q >> 25))
    c = signed_8(grid, r & u32(511), with_parity(r >> 9 & u32(127)))
    d = signed_8(grid, r >> 16 & u32(511), with_parity(r >> 25))
    return a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]


@device
def signed_quads(low, high, signs, n):                               # signs in the one-bit form: bit n of byte b is weight 4n + b
    return negate(low, (signs >> n & ONES) * u32(255)), negate(high, (signs >> (n + 1) & ONES) * u32(255))


@device
def codes_iq2_s(x, grid):
    q, signs, h = x[0], x[1], x[2]
    a = load64(grid, 8 * i32(q & u32(255) | (h & u32(3)) << 8))
    b = load64(grid, 8 * i32(q >> 8 & u32(255) | (h >> 2 & u32(3)) << 8))
    c = load64(grid, 8 * i32(q >> 16 & u32(255) | (h >> 4 & u32(3)) << 8))
    d = load64(grid, 8 * i32(q >> 24 | (h >> 6 & u32(3)) << 8))
    a, b, c, d = signed_quads(a[0], a[1], signs, 0), signed_quads(b[0], b[1], signs, 2), signed_quads(c[0], c[1], signs, 4), \
        signed_quads(d[0], d[1], signs, 6)
    return a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]


@device
def codes_iq3_xxs(x, grid):
    q, r, s = x[0], x[1], x[2]
    a, b, c, d = with_parity(s & u32(127)), with_parity(s >> 7 & u32(127)), with_parity(s >> 14 & u32(127)), with_parity(s >> 21 & u32(127))
    return (negate(load32(grid, 4 * i32(q & u32(255))), four_masks(a)), negate(load32(grid, 4 * i32(q >> 8 & u32(255))), four_masks(a >> 4)),
            negate(load32(grid, 4 * i32(q >> 16 & u32(255))), four_masks(b)), negate(load32(grid, 4 * i32(q >> 24)), four_masks(b >> 4)),
            negate(load32(grid, 4 * i32(r & u32(255))), four_masks(c)), negate(load32(grid, 4 * i32(r >> 8 & u32(255))), four_masks(c >> 4)),
            negate(load32(grid, 4 * i32(r >> 16 & u32(255))), four_masks(d)), negate(load32(grid, 4 * i32(r >> 24)), four_masks(d >> 4)))


@device
def quad_iq3_s(grid, index, h, signs, n):
    return negate(load32(grid, 4 * i32(index & u32(255) | (h >> n & u32(1)) << 8)), (signs >> n & ONES) * u32(255))


@device
def codes_iq3_s(x, grid):
    q, r, s, h = x[0], x[1], x[2], x[3]
    return (quad_iq3_s(grid, q, h, s, 0), quad_iq3_s(grid, q >> 8, h, s, 1), quad_iq3_s(grid, q >> 16, h, s, 2), quad_iq3_s(grid, q >> 24, h, s, 3),
            quad_iq3_s(grid, r, h, s, 4), quad_iq3_s(grid, r >> 8, h, s, 5), quad_iq3_s(grid, r >> 16, h, s, 6), quad_iq3_s(grid, r >> 24, h, s, 7))


@device
def eighths(grid, index, down):
    """Eight weights of IQ1 in eighths, raised by 9 so that no byte is negative: 8 g + 9 + 1, or - 1 where the group is shifted down."""
    m = load64(grid, 8 * i32(index))                                 # 8 g + 8 (see GRIDS)
    up = u32(0x02020202) - (down & u32(1)) * u32(0x02020202)
    return m[0] + up, m[1] + up


@device
def codes_iq1_s(x, grid):
    q, h = x[0], x[1]
    down = h >> 15
    a, b = eighths(grid, q & u32(255) | (h & u32(7)) << 8, down), eighths(grid, q >> 8 & u32(255) | (h >> 3 & u32(7)) << 8, down)
    c, d = eighths(grid, q >> 16 & u32(255) | (h >> 6 & u32(7)) << 8, down), eighths(grid, q >> 24 | (h >> 9 & u32(7)) << 8, down)
    return a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]


@device
def codes_iq1_m(x, grid):
    q, h = x[0], x[1]
    a, b = eighths(grid, q & u32(255) | (h & u32(7)) << 8, h >> 3), eighths(grid, q >> 8 & u32(255) | (h >> 4 & u32(7)) << 8, h >> 7)
    c, d = eighths(grid, q >> 16 & u32(255) | (h >> 8 & u32(7)) << 8, h >> 11), eighths(grid, q >> 24 | (h >> 12 & u32(7)) << 8, h >> 15)
    return a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]


# ---- scales -------------------------------------------------------------------------------------------------------------------------------

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
def scales_q8_K(x, i):
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
def scales_q2_K(x, i):
    d, dmin = halves(x[3])
    s = x[2]
    return d * f32(s & u32(15)), d * f32(s >> 8 & u32(15)), -dmin * f32(s >> 4 & u32(15)), -dmin * f32(s >> 12 & u32(15))


@device
def scales_q3_K(x, i):
    d, s = half(x[4]), x[3]
    return d * f32(i32(s & u32(63)) - 32), d * f32(i32(s >> 8) - 32), ZERO, ZERO


@device
def scales_q6_K(x, i):
    d, s = half(x[7]), x[6]
    return d * f32(i32(s & u32(255) ^ u32(128)) - 128), d * f32(i32(s >> 8 ^ u32(128)) - 128), ZERO, ZERO


@device
def scales_iq4_xs(x, i):
    d = half(x[5]) * f32(i32(x[4]) - 32)
    return d, d, ZERO, ZERO


@device
def scales_mxfp4(x, i):                                              # half of 2^(e - 127); the two smallest are denormals
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
def scales_nvfp4(x, i):
    return ue4m3_half(x[4] & u32(255)), ue4m3_half(x[4] >> 8), ZERO, ZERO


@device
def scales_iq2_xxs(x, i):
    d = half(x[2]) * (f32(0.5) + f32(x[1] >> 28)) * f32(0.25)
    return d, d, ZERO, ZERO


@device
def scales_iq3_xxs(x, i):
    d = half(x[3]) * (f32(0.5) + f32(x[2] >> 28)) * f32(0.5)
    return d, d, ZERO, ZERO


@device
def scales_iq2_xs(x, i):
    d, s = half(x[3]), x[2]
    return d * (f32(0.5) + f32(s & u32(15))) * f32(0.25), d * (f32(0.5) + f32(s >> 4)) * f32(0.25), ZERO, ZERO


@device
def scales_iq2_s(x, i):
    d, s = half(x[3]), x[2] >> 8
    return d * (f32(0.5) + f32(s & u32(15))) * f32(0.25), d * (f32(0.5) + f32(s >> 4)) * f32(0.25), ZERO, ZERO


@device
def scales_iq3_s(x, i):
    d = half(x[4]) * f32(u32(1) + u32(2) * (x[3] >> 8))
    return d, d, ZERO, ZERO


@device
def scales_iq1_s(x, i):
    d = half(x[2]) * f32(u32(1) + u32(2) * (x[1] >> 12 & u32(7))) * f32(0.125)
    return d, d, ZERO, ZERO


@device
def scales_iq1_m(x, i):
    d, s = half(x[3]), x[2]
    return d * f32(u32(1) + u32(2) * (s & u32(7))) * f32(0.125), d * f32(u32(1) + u32(2) * (s >> 3)) * f32(0.125), ZERO, ZERO


# ---- the table --------------------------------------------------------------------------------------------------------------------------------

_iq4, _fp4 = table_codes("iq4_values"), table_codes("fp4_values")

_PARTS: dict[str, tuple[Callable, Callable]] = {
    "Q4_0": (codes_4, half_at(4)),
    "Q4_1": (codes_4, half_and_min_at(4)),
    "Q5_0": (codes_5, half_at(5)),
    "Q5_1": (codes_5, half_and_min_at(5)),
    "Q8_0": (codes_8, half_at(8)),
    "Q8_1": (codes_8, half_at(8)),
    "Q8_K": (codes_8, scales_q8_K),
    "Q2_K": (codes_2, scales_q2_K),
    "Q3_K": (codes_3, scales_q3_K),
    "Q4_K": (codes_4, k4_at(4)),
    "Q5_K": (codes_5, k4_at(5)),
    "Q6_K": (codes_6, scales_q6_K),
    "IQ4_NL": (_iq4, half_at(4)),
    "IQ4_XS": (_iq4, scales_iq4_xs),
    "MXFP4": (_fp4, scales_mxfp4),
    "NVFP4": (_fp4, scales_nvfp4),
    "Q1_0": (codes_1, half_at(1)),
    "Q2_0": (codes_2, half_at(2)),
    "TQ1_0": (codes_2, half_at(2)),
    "TQ2_0": (codes_2, half_at(2)),
    "IQ2_XXS": (codes_iq2_xxs, scales_iq2_xxs),
    "IQ2_XS": (codes_iq2_xs, scales_iq2_xs),
    "IQ2_S": (codes_iq2_s, scales_iq2_s),
    "IQ3_XXS": (codes_iq3_xxs, scales_iq3_xxs),
    "IQ3_S": (codes_iq3_s, scales_iq3_s),
    "IQ1_S": (codes_iq1_s, scales_iq1_s),
    "IQ1_M": (codes_iq1_m, scales_iq1_m),
}
HAS_MIN = {"Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"}


@dataclass(frozen=True)
class Decoder:
    """One type for kernels that are generic over types; the numbers are constants when a kernel is compiled."""

    load: Any               # for weights that are read once
    load_again: Any         # for weights that a neighbour reads soon
    codes: Any
    scales: Any
    zero: int
    halves: bool            # the two halves of a group have scales of their own
    has_min: bool


@cache
def decoder(type_name: str) -> Decoder:
    layout = LAYOUTS[type_name]
    return Decoder(loader(layout, True), loader(layout, False), *_PARTS[type_name],
                   zero=layout.zero, halves=layout.span == 16, has_min=type_name in HAS_MIN)


@cache
def grid_bytes(type_name: str) -> np.ndarray:
    """The codebook that a type's codes index, as codes_X reads it from memory (16 zeros for types without)."""
    name = LAYOUTS[type_name].grid
    if not name:
        return np.zeros(16, np.uint8)
    entries = codebook(name)
    return (8 * (entries + 1) if name == "iq1_grid" else entries).astype(np.uint8).reshape(-1)


