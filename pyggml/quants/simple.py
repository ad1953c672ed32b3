"""Types without blocks: each weight is one number, little-endian."""

from __future__ import annotations

import numpy as np

from pyggml.quants.codec import Codec, register


class _Number(Codec):
    def decode(self, b: np.ndarray) -> np.ndarray:
        return b.astype(np.float32)[:, None]

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        return x[:, 0].astype(self.row.layout)


class _Integer(_Number):
    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        limits = np.iinfo(self.row.layout)
        return np.clip(np.rint(x[:, 0].astype(np.float64)), limits.min, limits.max).astype(self.row.layout)


@register
class F32(_Number):
    pass


@register
class F64(_Number):
    pass


@register
class F16(_Number):
    pass


@register
class I8(_Integer):
    pass


@register
class I16(_Integer):
    pass


@register
class I32(_Integer):
    pass


@register
class I64(_Integer):
    pass


@register
class BF16(Codec):
    """The upper half of a float32:  s eeeeeeee mmmmmmm"""

    def decode(self, b: np.ndarray) -> np.ndarray:
        return (b.astype(np.uint32) << 16).view(np.float32)[:, None]

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        bits = x[:, 0].view(np.uint32)
        nearest_even = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        quiet_nan = bits >> 16 | 64
        return np.where(np.isnan(x[:, 0]), quiet_nan, nearest_even).astype("<u2")
