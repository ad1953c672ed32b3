"""4-bit floats (E2M1) with small-float block scales: MXFP4 and NVFP4.

A code is  s eem : sign, two exponent bits, one mantissa bit; fp4_values holds the sixteen values doubled, so block scales are halved.
"""

from __future__ import annotations

import numpy as np

from pyggml.quants.codebooks import codebook
from pyggml.quants.codec import Codec, register, spread
from pyggml.quants.legacy import nibbles, pack_nibbles


def e8m0_half(e: np.ndarray) -> np.ndarray:
    """2^(e - 128); the two smallest are denormals."""
    bits = np.where(e < 2, np.uint32(0x200000) << np.minimum(e, 1).astype(np.uint32), (e.astype(np.uint32) - 1) << 23)
    return bits.astype(np.uint32).view(np.float32)


# Half the value of each unsigned float eeee mmm (bias 7): the last one is a NaN elsewhere and reads as 0; bit 7 is not a sign here.
_exponent, _mantissa = np.arange(256) >> 3 & 15, np.arange(256) & 7
UE4M3_HALF = np.where(_exponent == 0, _mantissa / 1024, (8 + _mantissa) / 16 * 2.0 ** (_exponent - 7)).astype(np.float32)
UE4M3_HALF[0x7F] = 0


def ue4m3(x: np.ndarray) -> np.ndarray:
    """The nearest unsigned float of x, halves upwards, at most 448; what is below the smallest normal one does not become it."""
    bits = ((x.astype(np.float32).view(np.uint32).astype(np.int64) + 0x80000) >> 20) - (120 << 3)
    small = np.minimum(np.floor(np.maximum(x, 0) * np.float32(512) + np.float32(0.5)), 7)
    return np.where(x < 2.0**-6, small, np.minimum(bits, 0x7E)).astype(np.uint8)


def nearest_codes(x: np.ndarray, d: np.ndarray) -> np.ndarray:
    """The code whose value times d (n, 1) is nearest to each x (n, k); of two equally near the first."""
    values = codebook("fp4_values")[:, 0].astype(np.float32)
    return np.abs(d[:, :, None] * values - x[:, :, None]).argmin(axis=2)


@register
class MXFP4(Codec):
    """
    | e: e8m0 | qs: 16 bytes of nibbles |    weight = 2^(e - 127) * e2m1 value
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        return e8m0_half(b["e"])[:, None] * codebook("fp4_values")[nibbles(b["qs"]), 0].astype(np.float32)

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        top = np.abs(x).max(axis=1)
        with np.errstate(divide="ignore"):
            e = np.where(top > 0, np.maximum(np.floor(np.log2(top)) - 2 + 127, 0), 0).astype(np.uint8)
        return self.blocks(len(x), e=e, qs=pack_nibbles(nearest_codes(x, e8m0_half(e)[:, None])))


@register
class NVFP4(Codec):
    """
    | d: 4 x ue4m3 | qs: 4 x 8 bytes, weights 0..7 of a group in the low nibbles, 8..15 in the high ones |

    weight = d * e2m1 value, a scale for every 16 weights.
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        qs = b["qs"].reshape(-1, 4, 8)
        q = np.concatenate([qs & 15, qs >> 4], axis=2).reshape(len(b), 64)
        return spread(UE4M3_HALF[b["d"]], 16) * codebook("fp4_values")[q, 0].astype(np.float32)

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        groups = x.reshape(-1, 16)
        d = ue4m3(np.abs(groups).max(axis=1) / np.float32(6))  # the largest value, 6, covers the group
        q = nearest_codes(groups, UE4M3_HALF[d][:, None]).astype(np.uint8)
        return self.blocks(len(x), d=d.reshape(-1, 4), qs=(q[:, :8] | q[:, 8:] << 4).reshape(-1, 32))
