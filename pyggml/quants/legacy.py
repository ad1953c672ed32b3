"""Blocks of 32 weights with one scale: Q4_0 Q4_1 Q5_0 Q5_1 Q8_0, and the activation format Q8_1.

Nibbles come in two halves: byte j of `qs` holds weight j in its low half and weight j + 16 in its high half.
"""

from __future__ import annotations

import numpy as np

from pyggml.quants import search
from pyggml.quants.codec import Codec, column, inverse, largest, register, round_away


def nibbles(qs: np.ndarray) -> np.ndarray:
    """(n, 16) bytes -> (n, 32) codes."""
    return np.concatenate([qs & 15, qs >> 4], axis=1)


def pack_nibbles(q: np.ndarray) -> np.ndarray:
    """(n, 32) codes -> (n, 16) bytes."""
    q = q.astype(np.uint8)
    return q[:, :16] & 15 | q[:, 16:] << 4


def bits(packed: np.ndarray) -> np.ndarray:
    """(n, k) bytes -> (n, 8k) bits, the lowest first."""
    return np.unpackbits(packed, axis=1, bitorder="little")


def pack_bits(b: np.ndarray) -> np.ndarray:
    return np.packbits(b.astype(np.uint8), axis=1, bitorder="little")


class _Symmetric(Codec):
    """Weights d * (q - zero) with q in 0 .. 2 zero - 1."""

    zero: int

    def fields(self, q: np.ndarray) -> dict[str, np.ndarray]:
        return {"qs": pack_nibbles(q)}

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        if w is None:
            d = largest(x) / np.float32(-self.zero)
            q = np.minimum(2 * self.zero - 1, np.trunc(x * inverse(d) + np.float32(self.zero + 0.5)))
        else:
            d, v = search.fit_scale(x, w, search.Integers(-self.zero, self.zero - 1))
            q = v + self.zero
        return self.blocks(len(x), d=d[:, 0], **self.fields(q))


class _Affine(Codec):
    """Weights d * q + m with q in 0 .. top."""

    top: int

    def fields(self, q: np.ndarray) -> dict[str, np.ndarray]:
        return {"qs": pack_nibbles(q)}

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        if w is None:
            m = x.min(axis=1, keepdims=True)
            d = (x.max(axis=1, keepdims=True) - m) / np.float32(self.top)
            q = np.minimum(self.top, np.trunc((x - m) * inverse(d) + np.float32(0.5)))
        else:
            d, m, q = search.fit_affine(x, w, self.top)
        return self.blocks(len(x), d=d[:, 0], m=m[:, 0], **self.fields(q))


@register
class Q4_0(_Symmetric):
    """
    | d: f16 | qs: 16 bytes of nibbles |    weight = d * (q - 8)
    """

    zero = 8

    def decode(self, b: np.ndarray) -> np.ndarray:
        return (nibbles(b["qs"]).astype(np.float32) - 8) * column(b["d"])


@register
class Q4_1(_Affine):
    """
    | d: f16 | m: f16 | qs: 16 bytes of nibbles |    weight = d * q + m
    """

    top = 15

    def decode(self, b: np.ndarray) -> np.ndarray:
        return nibbles(b["qs"]).astype(np.float32) * column(b["d"]) + column(b["m"])


@register
class Q5_0(_Symmetric):
    """
    | d: f16 | qh: 32 bits, bit j the fifth bit of weight j | qs: 16 bytes of nibbles |    weight = d * (q - 16)
    """

    zero = 16

    def fields(self, q: np.ndarray) -> dict[str, np.ndarray]:
        return {"qs": pack_nibbles(q), "qh": pack_bits(q >= 16)}

    def decode(self, b: np.ndarray) -> np.ndarray:
        q = nibbles(b["qs"]) | bits(b["qh"]) << 4
        return (q.astype(np.float32) - 16) * column(b["d"])


@register
class Q5_1(_Affine):
    """
    | d: f16 | m: f16 | qh: 32 bits, bit j the fifth bit of weight j | qs: 16 bytes of nibbles |    weight = d * q + m
    """

    top = 31

    def fields(self, q: np.ndarray) -> dict[str, np.ndarray]:
        return {"qs": pack_nibbles(q), "qh": pack_bits(q >= 16)}

    def decode(self, b: np.ndarray) -> np.ndarray:
        q = nibbles(b["qs"]) | bits(b["qh"]) << 4
        return q.astype(np.float32) * column(b["d"]) + column(b["m"])


@register
class Q8_0(Codec):
    """
    | d: f16 | qs: 32 signed bytes |    weight = d * q
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        return b["qs"].astype(np.float32) * column(b["d"])

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
        return self.blocks(len(x), d=d[:, 0], qs=round_away(x * inverse(d)))


@register
class Q8_1(Codec):
    """
    | d: f16 | s: f16 = d * sum of q | qs: 32 signed bytes |    value = d * q; what activations become beside types with a minimum
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        return b["qs"].astype(np.float32) * column(b["d"])

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
        q = round_away(x * inverse(d))
        return self.blocks(len(x), d=d[:, 0], s=q.sum(axis=1) * d[:, 0], qs=q)
