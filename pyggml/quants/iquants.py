"""The I types: a code indexes a codebook, of single values (IQ4) or of whole groups of 8 or 4 weights (IQ1, IQ2, IQ3).

In IQ2 and IQ3 the codebook holds magnitudes and the block holds the signs. `even_signs`: seven bits a group, the eighth makes the
number of minus signs even. In IQ1 every group of 8 is shifted by an eighth up or down, so that values are odd multiples of 1/8.
"""

from __future__ import annotations

import numpy as np

from pyggml.quants import search
from pyggml.quants.codebooks import codebook
from pyggml.quants.codec import Codec, column, register, spread
from pyggml.quants.legacy import bits, nibbles, pack_bits, pack_nibbles

_HALF, _QUARTER = np.float32(0.5), np.float32(0.25)


def pairs(packed: np.ndarray) -> np.ndarray:
    """(n, k) bytes -> (n, 2k) nibbles, the low one first."""
    return np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), 2 * packed.shape[1])


def pack_pairs(q: np.ndarray) -> np.ndarray:
    q = q.astype(np.uint8)
    return q[:, ::2] & 15 | q[:, 1::2] << 4


def signed(magnitudes: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Magnitudes with a minus where `negative` is 1."""
    m = magnitudes.astype(np.float32)
    return np.where(negative != 0, -m, m)


def even_signs(seven: np.ndarray) -> np.ndarray:
    """(n, groups) seven-bit fields -> (n, 8 * groups) sign bits with even parity in each group."""
    b = seven[..., None] >> np.arange(7, dtype=seven.dtype) & 1
    return np.concatenate([b, b.sum(axis=-1, keepdims=True) & 1], axis=-1).reshape(len(seven), 8 * seven.shape[1])


@register
class IQ4_NL(Codec):
    """
    | d: f16 | qs: 16 bytes of nibbles |    weight = d * iq4_values[q]
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        return column(b["d"]) * codebook("iq4_values")[nibbles(b["qs"]), 0].astype(np.float32)

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        d, v = search.fit_scale(x, search.weights(x, w), IQ4_TABLE)
        return self.blocks(len(x), d=d[:, 0], qs=pack_nibbles(iq4_codes(v)))


@register
class IQ4_XS(Codec):
    """
    | d: f16 | scales_h: 8 x 2 bits | scales_l: 8 nibbles | qs: 128 bytes of nibbles, 16 for every 32 weights |

    weight = d * (scale - 32) * iq4_values[q], a 6-bit scale for every 32 weights.
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        high = b["scales_h"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3
        scale = column(b["d"]) * ((pairs(b["scales_l"]) | high << 4).astype(np.float32) - 32)
        q = nibbles(b["qs"].reshape(-1, 16)).reshape(-1, 256)
        return spread(scale, 32) * codebook("iq4_values")[q, 0].astype(np.float32)

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        d, s, v = search.fit_scaled(x, search.weights(x, w), 32, IQ4_TABLE, search.Multipliers(-32, 31))
        s = s + 32
        high = ((s >> 4) << np.arange(0, 16, 2)).sum(axis=1)
        qs = pack_nibbles(iq4_codes(v).reshape(-1, 32)).reshape(-1, 128)
        return self.blocks(len(x), d=d, scales_h=high, scales_l=pack_pairs(s & 15), qs=qs)


IQ4_TABLE = search.Table(codebook("iq4_values")[:, 0])


def iq4_codes(v: np.ndarray) -> np.ndarray:
    """Codes of values that are in the table."""
    return np.searchsorted(codebook("iq4_values")[:, 0], v.astype(np.int8))


@register
class IQ2_XXS(Codec):
    """
    | d: f16 | qs: 8 x (4 bytes of grid index, 28 bits of even_signs, 4 bits of scale) |

    weight = d * (scale + 1/2) / 4 * sign * grid, a scale for every 32 weights.
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        words = np.ascontiguousarray(b["qs"]).view("<u4").reshape(len(b), 8, 2)
        index = np.ascontiguousarray(words[:, :, 0]).view(np.uint8)
        scale = column(b["d"]) * (_HALF + (words[:, :, 1] >> 28).astype(np.float32)) * _QUARTER
        negative = even_signs((words[:, :, 1, None] >> np.arange(0, 28, 7, dtype=np.uint32) & 127).reshape(len(b), 32))
        return spread(scale, 32) * signed(codebook("iq2_xxs_grid")[index].reshape(len(b), 256), negative)

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        d, s, v = search.fit_scaled(x, search.weights(x, w), 32, _IQ2_XXS, search.Multipliers(0, 15, 0.25, 0.125))
        index, negative = _IQ2_XXS.codes(v)
        words = np.zeros((len(x), 8, 2), "<u4")
        words[:, :, 0] = index.astype(np.uint8).reshape(len(x), 32).view("<u4")
        seven = (negative[..., :7] << np.arange(7)).sum(axis=-1).reshape(len(x), 8, 4)
        words[:, :, 1] = (seven << np.arange(0, 28, 7)).sum(axis=-1) | s << 28
        return self.blocks(len(x), d=d, qs=words.reshape(len(x), 16).view("<u2"))


@register
class IQ2_XS(Codec):
    """
    | d: f16 | qs: 32 x (9 bits of grid index, 7 of even_signs) | scales: 16 nibbles |

    weight = d * (scale + 1/2) / 4 * sign * grid, a scale for every 16 weights.
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        scale = column(b["d"]) * (_HALF + pairs(b["scales"]).astype(np.float32)) * _QUARTER
        magnitudes = codebook("iq2_xs_grid")[b["qs"] & 511].reshape(len(b), 256)
        return spread(scale, 16) * signed(magnitudes, even_signs(b["qs"] >> 9))

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        d, s, v = search.fit_scaled(x, search.weights(x, w), 16, _IQ2_XS, search.Multipliers(0, 15, 0.25, 0.125))
        index, negative = _IQ2_XS.codes(v)
        seven = (negative[..., :7] << np.arange(7)).sum(axis=-1)
        return self.blocks(len(x), d=d, qs=(index | seven << 9).reshape(len(x), 32), scales=pack_pairs(s))


@register
class IQ2_S(Codec):
    """
    | d: f16 | qs: 32 bytes of grid index, 32 bytes of signs | qh: 8 bytes, four times 2 more index bits | scales: 16 nibbles |

    weight = d * (scale + 1/2) / 4 * sign * grid, a scale for every 16 weights.
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        scale = column(b["d"]) * (_HALF + pairs(b["scales"]).astype(np.float32)) * _QUARTER
        high = (b["qh"][:, :, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(len(b), 32).astype(np.uint16)
        magnitudes = codebook("iq2_s_grid")[b["qs"][:, :32] | high << 8].reshape(len(b), 256)
        return spread(scale, 16) * signed(magnitudes, bits(b["qs"][:, 32:]))

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        d, s, v = search.fit_scaled(x, search.weights(x, w), 16, _IQ2_S, search.Multipliers(0, 15, 0.25, 0.125))
        index, negative = _IQ2_S.codes(v)
        index = index.reshape(len(x), 32)
        qs = np.concatenate([index & 255, pack_bits(negative.reshape(len(x), 256))], axis=1)
        qh = ((index >> 8).reshape(len(x), 8, 4) << np.arange(0, 8, 2)).sum(axis=2)
        return self.blocks(len(x), d=d, qs=qs, qh=qh, scales=pack_pairs(s))


@register
class IQ3_XXS(Codec):
    """
    | d: f16 | qs: 64 bytes of grid index, then 8 x (28 bits of even_signs, 4 bits of scale) |

    weight = d * (scale + 1/2) / 2 * sign * grid (groups of 4), a scale for every 32 weights.
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        words = np.ascontiguousarray(b["qs"][:, 64:]).view("<u4")
        scale = column(b["d"]) * (_HALF + (words >> 28).astype(np.float32)) * _HALF
        negative = even_signs((words[:, :, None] >> np.arange(0, 28, 7, dtype=np.uint32) & 127).reshape(len(b), 32))
        return spread(scale, 32) * signed(codebook("iq3_xxs_grid")[b["qs"][:, :64]].reshape(len(b), 256), negative)

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        d, s, v = search.fit_scaled(x, search.weights(x, w), 32, _IQ3_XXS, search.Multipliers(0, 15, 0.5, 0.25))
        index, negative = _IQ3_XXS.codes(v)
        seven = (negative.reshape(-1, 8)[:, :7] << np.arange(7)).sum(axis=-1).reshape(len(x), 8, 4)
        words = ((seven << np.arange(0, 28, 7)).sum(axis=-1) | s << 28).astype("<u4")
        return self.blocks(len(x), d=d, qs=np.concatenate([index.reshape(len(x), 64).astype(np.uint8), words.view(np.uint8)], axis=1))


@register
class IQ3_S(Codec):
    """
    | d: f16 | qs: 64 bytes of grid index | qh: 64 bits, the ninth of each index | signs: 256 bits | scales: 8 nibbles |

    weight = d * (1 + 2 * scale) * sign * grid (groups of 4), a scale for every 32 weights.
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        scale = column(b["d"]) * (1 + 2 * pairs(b["scales"]).astype(np.float32))
        index = b["qs"] | bits(b["qh"]).astype(np.uint16) << 8
        return spread(scale, 32) * signed(codebook("iq3_s_grid")[index].reshape(len(b), 256), bits(b["signs"]))

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        d, s, v = search.fit_scaled(x, search.weights(x, w), 32, _IQ3_S, search.Multipliers(0, 15, 2, 1))
        index, negative = _IQ3_S.codes(v)
        index = index.reshape(len(x), 64)
        return self.blocks(len(x), d=d, qs=index & 255, qh=pack_bits(index >> 8), signs=pack_bits(negative.reshape(len(x), 256)),
                           scales=pack_pairs(s))


@register
class IQ1_S(Codec):
    """
    | d: f16 | qs: 32 bytes of grid index | qh: 8 x (four times 3 more index bits, 3 bits of scale, 1 bit: shift down) |

    weight = d * (2 * scale + 1) * (grid +- 1/8), scale and shift for every 32 weights.
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        high = (b["qh"][:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7).reshape(len(b), 32)
        scale = column(b["d"]) * (2 * (b["qh"] >> 12 & 7).astype(np.float32) + 1)
        shift = np.where(b["qh"] >> 15, np.float32(-0.125), np.float32(0.125))
        grid = codebook("iq1_grid")[b["qs"] | high << 8].reshape(len(b), 256).astype(np.float32)
        return spread(scale, 32) * (grid + spread(shift, 32))

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        d, s, v = search.fit_scaled(x, search.weights(x, w), 32, _IQ1_S, search.Multipliers(0, 7, 2, 1))
        index, down = _IQ1_S.codes(v)
        index = index.reshape(len(x), 8, 4)
        qh = ((index >> 8) << np.arange(0, 12, 3)).sum(axis=2) | s << 12 | down.reshape(len(x), 8, 4)[:, :, 0] << 15
        return self.blocks(len(x), d=d, qs=index.reshape(len(x), 32) & 255, qh=qh)


@register
class IQ1_M(Codec):
    """
    | qs: 32 bytes of grid index | qh: 32 nibbles (3 more index bits, 1 bit: shift down) | scales: four 16-bit words |

    weight = d * (2 * scale + 1) * (grid +- 1/8), a 3-bit scale for every 16 weights, a shift for every 8. Each word of `scales` holds
    four scales and on top a nibble of d, an f16, the lowest nibble in the first word.
    """

    def decode(self, b: np.ndarray) -> np.ndarray:
        words = np.ascontiguousarray(b["scales"]).view("<u2")
        d = ((words >> 12) << np.arange(0, 16, 4, dtype=np.uint16)).sum(axis=1).astype("<u2").view("<f2")
        scale = column(d) * (2 * (words[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7).reshape(len(b), 16).astype(np.float32) + 1)
        q = pairs(b["qh"]).astype(np.uint16)
        grid = codebook("iq1_grid")[b["qs"] | (q & 7) << 8].reshape(len(b), 256).astype(np.float32)
        shift = np.where(q >> 3, np.float32(-0.125), np.float32(0.125))
        return spread(scale, 16) * (grid + spread(shift, 8))

    def encode(self, x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        d, s, v = search.fit_scaled(x, search.weights(x, w), 16, _IQ1_M, search.Multipliers(0, 7, 2, 1))
        index, down = _IQ1_M.codes(v)
        index = index.reshape(len(x), 32)
        bits_of_d = d.astype("<f2").view("<u2")[:, None] >> np.arange(0, 16, 4) & 15
        words = ((s.reshape(-1, 4, 4) << np.arange(0, 12, 3)).sum(axis=2) | bits_of_d << 12).astype("<u2")
        return self.blocks(len(x), qs=index & 255, qh=pack_pairs(index >> 8 | down.reshape(len(x), 32) << 3), scales=words.view(np.uint8))


class Magnitudes:
    """Projection onto groups of a codebook of magnitudes, with free signs or (`even`) an even number of minus signs in every 8."""

    def __init__(self, name: str, even: bool) -> None:
        self.grid = codebook(name).astype(np.float32)
        self.even = even
        largest = float(self.grid.max())
        self.extremes = (largest,)
        self.jitter = np.linspace(-0.35, 0.25, 9, dtype=np.float32) * largest

    def __call__(self, t: np.ndarray, w: np.ndarray) -> np.ndarray:
        width = self.grid.shape[1]
        negative = t < 0
        if self.even:                                          # flip the sign whose loss is least
            loss, n8 = (w * np.abs(t)).reshape(-1, 8), negative.reshape(-1, 8).copy()
            odd = n8.sum(axis=1) & 1 == 1
            weakest = loss.argmin(axis=1)
            n8[odd, weakest[odd]] ^= True
            negative = n8.reshape(t.shape)
        magnitude = np.where(negative, -t, t)
        index = nearest_group(magnitude.reshape(-1, width), w.reshape(-1, width), self.grid)
        return signed(self.grid[index].reshape(t.shape), negative)

    def codes(self, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices (groups,) and sign bits (groups, width) of values that are in the codebook."""
        width = self.grid.shape[1]
        groups = v.reshape(-1, width)
        return entry(np.abs(groups), self.grid), (groups < 0).astype(np.int64)


class Shifted:
    """Projection onto the ternary codebook shifted by an eighth, one shift for every `span` weights."""

    def __init__(self, span: int) -> None:
        self.grid = codebook("iq1_grid").astype(np.float32)
        self.span = span
        self.extremes = (1.125,)
        self.jitter = np.linspace(-0.5, 0.5, 11, dtype=np.float32)

    def __call__(self, t: np.ndarray, w: np.ndarray) -> np.ndarray:
        t8, w8 = t.reshape(-1, 8), w.reshape(-1, 8)
        found, errors = [], []
        for shift in (np.float32(0.125), np.float32(-0.125)):
            v = self.grid[nearest_group(t8 - shift, w8, self.grid)] + shift
            found.append(v.reshape(-1, self.span))
            errors.append((w8 * (t8 - v) ** 2).reshape(-1, self.span).sum(axis=1, keepdims=True))
        return np.where(errors[0] <= errors[1], *found).reshape(t.shape)

    def codes(self, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices (groups,) and whether each group is shifted down."""
        groups = v.reshape(-1, 8)
        whole = np.rint(groups)
        return entry(whole, self.grid), (groups[:, 0] < whole[:, 0]).astype(np.int64)


def nearest_group(t: np.ndarray, w: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Index of the codebook entry of least weighted squared distance to each group. t, w (n, width)"""
    index = np.empty(len(t), np.int64)
    for i in range(0, len(t), 4096):
        part = slice(i, i + 4096)
        index[part] = (w[part] @ (grid * grid).T - 2 * (w[part] * t[part]) @ grid.T).argmin(axis=1)
    return index


def entry(groups: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Index of groups that are codebook entries."""
    radix = 64.0 ** np.arange(grid.shape[1])
    keys = (grid.astype(np.float64) + 1) @ radix
    order = keys.argsort()
    return order[np.searchsorted(keys[order], (groups.astype(np.float64) + 1) @ radix)]


_IQ2_XXS, _IQ2_XS = Magnitudes("iq2_xxs_grid", even=True), Magnitudes("iq2_xs_grid", even=True)
_IQ2_S = Magnitudes("iq2_s_grid", even=False)
_IQ3_XXS, _IQ3_S = Magnitudes("iq3_xxs_grid", even=True), Magnitudes("iq3_s_grid", even=False)
_IQ1_S, _IQ1_M = Shifted(32), Shifted(8)
