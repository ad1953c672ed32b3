"""The K types: 256 weights a block, in groups of 16 or 32 with integer scales that share one or two half-float super-scales."""

from __future__ import annotations

import numpy as np

from pyggml.quants import search
from pyggml.quants.codec import Codec, column, inverse, largest, register, spread
from pyggml.quants.legacy import bits, pack_bits
from pyggml.quants.ternary import pack_planes, planes


def nibble_planes(qs: np.ndarray) -> np.ndarray:
    """(n, 128) bytes -> (n, 256) codes: the low halves of each 32 bytes are 32 consecutive weights, the high halves the next 32."""
    return (qs.reshape(len(qs), 4, 1, 32) >> np.array([0, 4], np.uint8)[:, None] & 15).reshape(len(qs), 256)


def pack_nibble_planes(q: np.ndarray) -> np.ndarray:
    p = q.astype(np.uint8).reshape(len(q), 4, 2, 32)
    return (p[:, :, 0] & 15 | p[:, :, 1] << 4).reshape(len(q), 128)


def bit_planes(qh: np.ndarray) -> np.ndarray:
    """(n, 32) bytes -> (n, 256) bits: bit g of byte j belongs to weight 32g + j."""
    return bits(qh).reshape(len(qh), 32, 8).transpose(0, 2, 1).reshape(len(qh), 256)


def pack_bit_planes(b: np.ndarray) -> np.ndarray:
    return pack_bits(b.reshape(len(b), 8, 32).transpose(0, 2, 1).reshape(len(b), 256))


def scales_k4(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Twelve bytes -> eight 6-bit scales and eight 6-bit minimums, (n, 8) each.

    byte   0..3            4..7           8..11
         | Bb aaaaaa ... | Dd cccccc ...| dddd bbbb ... |
    a, c: scales and minimums 0..3; b, d: scales and minimums 4..7, their upper two bits (B, D) on top of the first eight bytes.
    """
    a, c, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    s = np.concatenate([a & 63, low & 15 | a >> 6 << 4], axis=1)
    m = np.concatenate([c & 63, low >> 4 | c >> 6 << 4], axis=1)
    return s, m


def pack_scales_k4(s: np.ndarray, m: np.ndarray) -> np.ndarray:
    s, m = s.astype(np.uint8), m.astype(np.uint8)
    return np.concatenate([s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, s[:, 4:] & 15 | m[:, 4:] << 4], axis=1)


@register
class Q2_K(Codec):
    """
    | scales: 16 bytes, scale low nibble, minimum high nibble | qs: 64 bytes of 2-bit planes | d: f16 | dmin: f16 |

    weight = d * scale * q - dmin * minimum, a scale and a minimum for every 16 weights.
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        scale = column(b["d"]) * (b["scales"] & 15).astype(np.float32)
        minimum = column(b["dmin"]) * (b["scales"] >> 4).astype(np.float32)
        return spread(scale, 16) * planes(b["qs"]).astype(np.float32) - spread(minimum, 16)

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        d, dmin, s, m, q = search.fit_scaled_affine(x, search.weights(x, w), 16, 3, 15)
        return self.blocks(len(x), d=d, dmin=dmin, scales=s | m << 4, qs=pack_planes(q))


@register
class Q3_K(Codec):
    """
    | hmask: 32 bytes of bit planes | qs: 64 bytes of 2-bit planes | scales: 12 bytes | d: f16 |

    weight = d * (scale - 32) * (q - 4), q = two bits of qs and the bit of hmask above them, a scale for every 16 weights.
    scales: byte j of 0..7 holds the low nibbles of scales j and j + 8; bits 2p, 2p + 1 of byte 8 + j are the upper two of scale 4p + j.
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        low, two = b["scales"][:, :8], b["scales"][:, 8:]
        high = (two[:, None, :] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(-1, 16)
        scale = column(b["d"]) * ((np.concatenate([low & 15, low >> 4], axis=1) | high << 4).astype(np.float32) - 32)
        q = planes(b["qs"]) | bit_planes(b["hmask"]) << 2
        return spread(scale, 16) * (q.astype(np.float32) - 4)

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        d, s, v = search.fit_scaled(x, search.weights(x, w), 16, search.Integers(-4, 3), search.Multipliers(-32, 31))
        s, q = (s + 32).astype(np.uint8), (v + 4).astype(np.uint8)
        p = (s >> 4).reshape(-1, 4, 4)
        scales = np.concatenate([s[:, :8] & 15 | s[:, 8:] << 4, p[:, 0] | p[:, 1] << 2 | p[:, 2] << 4 | p[:, 3] << 6], axis=1)
        return self.blocks(len(x), d=d, scales=scales, qs=pack_planes(q & 3), hmask=pack_bit_planes(q >> 2))


@register
class Q4_K(Codec):
    """
    | d: f16 | dmin: f16 | scales: 12 bytes, see scales_k4 | qs: 128 bytes of nibble planes |

    weight = d * scale * q - dmin * minimum, a scale and a minimum for every 32 weights.
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        s, m = scales_k4(b["scales"])
        scale, minimum = column(b["d"]) * s.astype(np.float32), column(b["dmin"]) * m.astype(np.float32)
        return spread(scale, 32) * nibble_planes(b["qs"]).astype(np.float32) - spread(minimum, 32)

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        d, dmin, s, m, q = search.fit_scaled_affine(x, search.weights(x, w), 32, 15, 63)
        return self.blocks(len(x), d=d, dmin=dmin, scales=pack_scales_k4(s, m), qs=pack_nibble_planes(q))


@register
class Q5_K(Codec):
    """
    | d: f16 | dmin: f16 | scales: 12 bytes, see scales_k4 | qh: 32 bytes of bit planes | qs: 128 bytes of nibble planes |

    As Q4_K, with a fifth bit from qh.
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        s, m = scales_k4(b["scales"])
        scale, minimum = column(b["d"]) * s.astype(np.float32), column(b["dmin"]) * m.astype(np.float32)
        q = nibble_planes(b["qs"]) | bit_planes(b["qh"]) << 4
        return spread(scale, 32) * q.astype(np.float32) - spread(minimum, 32)

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        d, dmin, s, m, q = search.fit_scaled_affine(x, search.weights(x, w), 32, 31, 63)
        return self.blocks(len(x), d=d, dmin=dmin, scales=pack_scales_k4(s, m), qs=pack_nibble_planes(q), qh=pack_bit_planes(q >> 4))


@register
class Q6_K(Codec):
    """
    | ql: 128 bytes | qh: 64 bytes of 2-bit planes | scales: 16 signed bytes | d: f16 |

    weight = d * scale * (q - 32), a scale for every 16 weights. In each half (128 weights): ql has 64 bytes, whose low nibbles
    are weights 0..63 and high nibbles weights 64..127; qh has the two bits above them.
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        ql = b["ql"].reshape(-1, 2, 1, 64)
        low = (ql >> np.array([0, 4], np.uint8)[:, None] & 15).reshape(-1, 256)
        q = low | planes(b["qh"]) << 4
        scale = column(b["d"]) * b["scales"].astype(np.float32)
        return spread(scale, 16) * (q.astype(np.float32) - 32)

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        d, s, v = search.fit_scaled(x, search.weights(x, w), 16, search.Integers(-32, 31), search.Multipliers(-128, 127))
        q = (v + 32).astype(np.uint8)
        p = (q & 15).reshape(-1, 2, 2, 64)
        ql = (p[:, :, 0] | p[:, :, 1] << 4).reshape(-1, 128)
        return self.blocks(len(x), d=d, scales=s, ql=ql, qh=pack_planes(q >> 4))


@register
class Q8_K(Codec):
    """
    | d: float | qs: 256 signed bytes | bsums: 16 int16, the sum of every 16 codes |

    value = d * q; what activations become beside types of 256 weights. The value of largest magnitude is given the code -127.
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        return column(b["d"]) * b["qs"].astype(np.float32)

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        top = largest(x)
        factor = np.divide(np.float32(-127), top, out=np.zeros_like(top), where=top != 0)
        q = np.rint(x * factor)
        return self.blocks(len(x), d=inverse(factor)[:, 0], qs=q, bsums=q.reshape(-1, 16, 16).sum(axis=2))
