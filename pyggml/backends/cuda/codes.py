"""Codes of a group of 32 weights: of_X(x, grid), the words that were loaded -> 8 words of 4 signed bytes (see decode.py)."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyggml.backends.cuda.intrinsics import device
from pyggml.backends.cuda.prims import load32, load64, prmt
from pyggml.quants.codebooks import codebook

u32, i32 = np.uint32, np.int32

NIBBLES, PAIRS, ONES = u32(0x0F0F0F0F), u32(0x03030303), u32(0x01010101)


@device
def of_4(x, grid):
    return (x[0] & NIBBLES, x[1] & NIBBLES, x[2] & NIBBLES, x[3] & NIBBLES,
            x[0] >> 4 & NIBBLES, x[1] >> 4 & NIBBLES, x[2] >> 4 & NIBBLES, x[3] >> 4 & NIBBLES)


@device
def of_5(x, grid):
    h = x[4]
    return (x[0] & NIBBLES | (h & ONES) << 4, x[1] & NIBBLES | (h >> 1 & ONES) << 4,
            x[2] & NIBBLES | (h >> 2 & ONES) << 4, x[3] & NIBBLES | (h >> 3 & ONES) << 4,
            x[0] >> 4 & NIBBLES | h & ONES << 4, x[1] >> 4 & NIBBLES | h >> 1 & ONES << 4,
            x[2] >> 4 & NIBBLES | h >> 2 & ONES << 4, x[3] >> 4 & NIBBLES | h >> 3 & ONES << 4)


@device
def of_6(x, grid):
    a, b = x[4], x[5]
    return (x[0] & NIBBLES | (a & PAIRS) << 4, x[1] & NIBBLES | (b & PAIRS) << 4,
            x[2] & NIBBLES | a << 2 & PAIRS << 4, x[3] & NIBBLES | b << 2 & PAIRS << 4,
            x[0] >> 4 & NIBBLES | a & PAIRS << 4, x[1] >> 4 & NIBBLES | b & PAIRS << 4,
            x[2] >> 4 & NIBBLES | a >> 2 & PAIRS << 4, x[3] >> 4 & NIBBLES | b >> 2 & PAIRS << 4)


@device
def of_2(x, grid):
    a, b = x[0], x[1]
    return (a & PAIRS, b & PAIRS, a >> 2 & PAIRS, b >> 2 & PAIRS, a >> 4 & PAIRS, b >> 4 & PAIRS, a >> 6 & PAIRS, b >> 6 & PAIRS)


@device
def of_3(x, grid):
    a, b, h = x[0], x[1], x[2]
    return (a & PAIRS | (h & ONES) << 2, b & PAIRS | h << 1 & ONES << 2, a >> 2 & PAIRS | h & ONES << 2, b >> 2 & PAIRS | h >> 1 & ONES << 2,
            a >> 4 & PAIRS | h >> 2 & ONES << 2, b >> 4 & PAIRS | h >> 3 & ONES << 2,
            a >> 6 & PAIRS | h >> 4 & ONES << 2, b >> 6 & PAIRS | h >> 5 & ONES << 2)


@device
def of_8(x, grid):
    return x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]


@device
def sign_quad(h, n):                                                 # bit 1: 1, bit 0: -1
    return ((h >> n & ONES ^ ONES) * u32(255)) | ONES


@device
def of_1(x, grid):
    h = x[0]
    return (sign_quad(h, 0), sign_quad(h, 1), sign_quad(h, 2), sign_quad(h, 3),
            sign_quad(h, 4), sign_quad(h, 5), sign_quad(h, 6), sign_quad(h, 7))


def of_table(values: str) -> Any:
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
def of_iq2_xxs(x, grid):
    q, s = x[0], x[1]
    a = signed_8(grid, q & u32(255), with_parity(s & u32(127)))
    b = signed_8(grid, q >> 8 & u32(255), with_parity(s >> 7 & u32(127)))
    c = signed_8(grid, q >> 16 & u32(255), with_parity(s >> 14 & u32(127)))
    d = signed_8(grid, q >> 24, with_parity(s >> 21 & u32(127)))
    return a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]


@device
def of_iq2_xs(x, grid):
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
def of_iq2_s(x, grid):
    q, signs, h = x[0], x[1], x[2]
    a = load64(grid, 8 * i32(q & u32(255) | (h & u32(3)) << 8))
    b = load64(grid, 8 * i32(q >> 8 & u32(255) | (h >> 2 & u32(3)) << 8))
    c = load64(grid, 8 * i32(q >> 16 & u32(255) | (h >> 4 & u32(3)) << 8))
    d = load64(grid, 8 * i32(q >> 24 | (h >> 6 & u32(3)) << 8))
    a, b, c, d = signed_quads(a[0], a[1], signs, 0), signed_quads(b[0], b[1], signs, 2), signed_quads(c[0], c[1], signs, 4), \
        signed_quads(d[0], d[1], signs, 6)
    return a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]


@device
def of_iq3_xxs(x, grid):
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
def of_iq3_s(x, grid):
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
def of_iq1_s(x, grid):
    q, h = x[0], x[1]
    down = h >> 15
    a, b = eighths(grid, q & u32(255) | (h & u32(7)) << 8, down), eighths(grid, q >> 8 & u32(255) | (h >> 3 & u32(7)) << 8, down)
    c, d = eighths(grid, q >> 16 & u32(255) | (h >> 6 & u32(7)) << 8, down), eighths(grid, q >> 24 | (h >> 9 & u32(7)) << 8, down)
    return a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]


@device
def of_iq1_m(x, grid):
    q, h = x[0], x[1]
    a, b = eighths(grid, q & u32(255) | (h & u32(7)) << 8, h >> 3), eighths(grid, q >> 8 & u32(255) | (h >> 4 & u32(7)) << 8, h >> 7)
    c, d = eighths(grid, q >> 16 & u32(255) | (h >> 8 & u32(7)) << 8, h >> 11), eighths(grid, q >> 24 | (h >> 12 & u32(7)) << 8, h >> 15)
    return a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]
