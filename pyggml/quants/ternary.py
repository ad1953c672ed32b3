"""One to two bits a weight without a codebook: TQ1_0 TQ2_0 (ternary), Q1_0 (signs), Q2_0 (-1, 0, 1, 2)."""

from __future__ import annotations

import numpy as np

from pyggml.quants.codec import Codec, column, inverse, register, round_away
from pyggml.quants.legacy import bits, pack_bits

POW3 = np.array([1, 3, 9, 27, 81], np.uint8)


def _ternary(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest magnitude (n, 1) and codes 0, 1, 2 for -1, 0, 1."""
    d = np.abs(x).max(axis=1, keepdims=True)
    return d, (round_away(x * inverse(d)) + 1).astype(np.uint8)


def _digits(packed: np.ndarray, count: int) -> np.ndarray:
    """(n, k) bytes -> (n, count * k) ternary codes: times 3^i, the leading base-3 digit of byte / 256 is digit i."""
    q = packed[:, None, :] * POW3[:count, None]
    return (q.astype(np.uint16) * 3 >> 8).reshape(len(packed), count * packed.shape[1])


def _fractions(q: np.ndarray, count: int) -> np.ndarray:
    """(n, count * k) ternary codes -> (n, k) bytes: five digits as a fraction of 256, rounded up so that _digits finds them."""
    digits = q.reshape(len(q), count, -1).astype(np.uint16)
    value = (digits * POW3[4::-1][:count, None]).sum(axis=1)
    return (value * 256 + 242) // 243


@register
class TQ1_0(Codec):
    """
    | qs: 48 bytes, five weights each | qh: 4 bytes, four weights each | d: f16 |    weight = d * (digit - 1)

    qs[0..31]: digit i is weight 32i + j;  qs[32..47]: weight 160 + 16i + j;  qh: weight 240 + 4i + j.
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        q = np.concatenate([_digits(b["qs"][:, :32], 5), _digits(b["qs"][:, 32:], 5), _digits(b["qh"], 4)], axis=1)
        return (q.astype(np.float32) - 1) * column(b["d"])

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        d, q = _ternary(x)
        qs = np.concatenate([_fractions(q[:, :160], 5), _fractions(q[:, 160:240], 5)], axis=1)
        return self.blocks(len(x), d=d[:, 0], qs=qs, qh=_fractions(q[:, 240:], 4))


@register
class TQ2_0(Codec):
    """
    | qs: 64 bytes | d: f16 |    weight = d * (q - 1)

    Each 32 bytes hold 128 weights in four planes: bits 2p, 2p + 1 of byte j are weight 32p + j.
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        return (planes(b["qs"]).astype(np.float32) - 1) * column(b["d"])

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        d, q = _ternary(x)
        return self.blocks(len(x), d=d[:, 0], qs=pack_planes(q))


@register
class Q1_0(Codec):
    """
    | d: f16 | qs: 128 bits |    weight = d where its bit is 1, -d where it is 0
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        return (bits(b["qs"]).astype(np.float32) * 2 - 1) * column(b["d"])

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        total = np.cumsum(np.abs(x), axis=1, dtype=np.float32)[:, -1]      # in order, as ggml sums
        return self.blocks(len(x), d=total / np.float32(128), qs=pack_bits(x >= 0))


@register
class Q2_0(Codec):
    """
    | d: f16 | qs: 16 bytes, four weights each, the lowest bits first |    weight = d * (q - 1)
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        q = (b["qs"][:, :, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(len(b), 64)
        return (q.astype(np.float32) - 1) * column(b["d"])

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        d = np.abs(x).max(axis=1, keepdims=True)
        q = np.clip(round_away(x * inverse(d)) + 1, 0, 3).astype(np.uint8).reshape(len(x), -1, 4)
        return self.blocks(len(x), d=d[:, 0], qs=q[..., 0] | q[..., 1] << 2 | q[..., 2] << 4 | q[..., 3] << 6)


def planes(qs: np.ndarray) -> np.ndarray:
    """(n, 64) bytes -> (n, 256) two-bit codes: bits 2p, 2p + 1 of each 32 bytes are 32 consecutive weights."""
    return (qs.reshape(len(qs), 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(len(qs), 256)


def pack_planes(q: np.ndarray) -> np.ndarray:
    """(n, 256) two-bit codes -> (n, 64) bytes."""
    p = q.astype(np.uint8).reshape(len(q), 2, 4, 32)
    return (p[:, :, 0] | p[:, :, 1] << 2 | p[:, :, 2] << 4 | p[:, :, 3] << 6).reshape(len(q), 64)
