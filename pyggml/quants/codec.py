"""The registry of codecs: for each tensor type a class that reads and writes its blocks in plain numpy.

A codec works on arrays of whole blocks: `decode(b)` turns a structured array (n,) into float32 (n, block) and `encode(x, w)`
turns float32 (n, block) into a structured array (n,); `w` is None or the importance of each weight, float32 (n, block).
Field names are those of native/blocks.h. Decoders round each operation in the order given, which is ggml's, so they are exact.
"""

from __future__ import annotations

import numpy as np

from pyggml.errors import PyggmlError
from pyggml.types import BY_NAME, TensorType, add_type, tensor_type

CODECS: dict[str, Codec] = {}


class Codec:
    """What a codec class fills in. The class name is the type's name; a type that types.py does not know also states its row."""

    row: TensorType

    def decode(self, b: np.ndarray) -> np.ndarray:
        raise PyggmlError(f"{self.row} cannot be decoded; its codec has no decode()")

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        raise PyggmlError(f"{self.row} cannot be encoded; its codec has no encode()")

    def blocks(self, n: int, **fields: np.ndarray) -> np.ndarray:
        """A structured array of n blocks with these fields (each cast to the field's type)."""
        b = np.zeros(n, self.row.layout)
        for name, value in fields.items():
            b[name] = value
        return b


def register(cls: type[Codec]) -> type[Codec]:
    """Class decorator: make the type that `cls` describes readable and writable everywhere a type name is taken.

    A type of your own states `id` (1000 or more, so that it never meets a ggml id), `block` (weights per block) and `layout`
    (the numpy dtype of one block).
    """
    name = cls.__name__
    if name not in BY_NAME:
        add_type(TensorType(cls.id, name, cls.block, dtype=np.dtype(cls.layout)))  # type: ignore[attr-defined]
    cls.row = BY_NAME[name]
    CODECS[name] = cls()
    return cls


def codec(which: int | str | TensorType) -> Codec:
    """The codec of a type id or name."""
    return CODECS[tensor_type(which).name]


def column(field: np.ndarray) -> np.ndarray:
    """A per-block number (n,) as float32 (n, 1); bits of a half float become its value."""
    return field.astype(np.float32)[:, None]


def spread(scales: np.ndarray, n: int) -> np.ndarray:
    """Scales (blocks, k), each repeated for its n consecutive weights: (blocks, k * n)."""
    return np.repeat(scales, n, axis=1)


def inverse(d: np.ndarray) -> np.ndarray:
    """1 / d, and 0 for 0."""
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)


def round_away(x: np.ndarray) -> np.ndarray:
    """Round to nearest, halves away from zero (C's roundf)."""
    whole = np.trunc(x)
    return whole + np.sign(x) * (np.abs(x - whole) >= 0.5)


def largest(x: np.ndarray) -> np.ndarray:
    """The value of largest magnitude in each row, with its sign; of two the first, and never -0.0. (n, k) -> (n, 1)"""
    return np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1) + np.float32(0)
