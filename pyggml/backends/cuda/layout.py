"""How a weight lies in GPU memory: four planes, so that neighbouring lanes of a warp load neighbouring 16 bytes.

A row is cut into groups of 32 weights and a lane takes a group. What a group consists of lies in planes, entry beside entry over
all groups of the tensor: the low bits of its codes (up to 16 bytes), the bits above them, its scales, and what several groups share.

    low     16 bytes   nibbles        byte j: weight j, weight 16 + j
            8 bytes    2 bits each    word w, bits 2p of byte b: weight 8p + 4w + b
            4 bytes    1 bit each     bit i of byte b: weight 4i + b
    high    the same forms for the bits above; bytes (Q8_0) are two 16-byte halves, low and high

So one shift and one mask give four consecutive weights in the four bytes of a word, as dp4a wants them. Bytes that no lane would
want apart (grid indices, packed scales) stay as the format has them. decode.py reads all this.

A type costs what its blocks cost in the file, except where the table says so. `relay` turns the blocks of one type into its planes
in numpy; as it only moves bits (TQ1_0 aside), the GPU's kernel follows a table that is found by giving `relay` one bit at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

from pyggml.quants.codec import codec
from pyggml.quants.iquants import pairs
from pyggml.quants.kquants import bit_planes, nibble_planes
from pyggml.quants.legacy import bits, nibbles
from pyggml.quants.ternary import planes
from pyggml.types import tensor_type

GROUP = 32              # weights a lane takes at a time
ALIGN = 256             # bytes at which planes start
FLOAT_ROW = 8           # rows of floats are padded to so many numbers, so that each starts at 16 bytes
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}

Planes = Sequence[np.ndarray]       # per plane (blocks, bytes)


# ---- codes of whole blocks (n, weights) to bytes (n, ...) of the forms above -----------------------------------------------------

def pack4(q: np.ndarray) -> np.ndarray:
    q = q.reshape(len(q), -1, 2, 16)
    return (q[:, :, 0] & 15 | q[:, :, 1] << 4).reshape(len(q), -1)


def pack2(q: np.ndarray) -> np.ndarray:
    q = q.reshape(len(q), -1, 4, 8)
    return (q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6).reshape(len(q), -1)


def pack1(q: np.ndarray) -> np.ndarray:
    return np.packbits(q.reshape(len(q), -1, 8, 4).transpose(0, 1, 3, 2), axis=-1, bitorder="little").reshape(len(q), -1)


def pack_quads(q: np.ndarray) -> np.ndarray:
    """Nibbles for a table look-up: word w holds four consecutive codes from 4w on in its low half, from 16 + 4w on in its high half."""
    q = q.reshape(len(q), -1, 2, 4, 2, 2)
    return (q[..., 0] & 15 | q[..., 1] << 4).transpose(0, 1, 3, 2, 4).reshape(len(q), -1)


def raw(field: np.ndarray) -> np.ndarray:
    """A field of the blocks as the bytes it is."""
    return np.ascontiguousarray(field).view(np.uint8).reshape(len(field), -1)


def beside(groups: int, *fields: np.ndarray) -> np.ndarray:
    """Fields (n, bytes) of blocks of so many groups, dealt out so that what belongs to one group lies together."""
    return np.concatenate([f.reshape(len(f), groups, -1) for f in fields], axis=2).reshape(len(fields[0]), -1)


NONE = np.empty((0, 0), np.uint8)


def _halves(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    q = raw(b["qs"]).reshape(len(b), -1, 2, 16)
    return q[:, :, 0].reshape(len(b), -1), q[:, :, 1].reshape(len(b), -1)


def _super_k4(b: np.ndarray) -> np.ndarray:
    return np.concatenate([raw(b["d"]), raw(b["dmin"]), b["scales"]], axis=1)


def _scales_q3(b: np.ndarray) -> np.ndarray:
    low, two = b["scales"][:, :8], b["scales"][:, 8:]
    high = (two[:, None, :] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(-1, 16)
    return np.concatenate([low & 15, low >> 4], axis=1) | high << 4


def _low_q6(b: np.ndarray) -> np.ndarray:
    return (b["ql"].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None] & 15).reshape(len(b), 256)


def _scales_iq4(b: np.ndarray) -> np.ndarray:
    high = (b["scales_h"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3).astype(np.uint8)
    return pairs(b["scales_l"]) | high << 4


def _nvfp4(b: np.ndarray) -> np.ndarray:
    qs = b["qs"].reshape(-1, 4, 8)
    return np.concatenate([qs & 15, qs >> 4], axis=2).reshape(len(b), 64)


def _q2_0(b: np.ndarray) -> np.ndarray:
    return (b["qs"][:, :, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(len(b), 64)


def _tq1_0(b: np.ndarray) -> np.ndarray:
    """Base-3 digits as 2-bit codes: 8 + 2 / 8 bytes for 32 weights instead of 6.75."""
    one = np.ones(len(b), b.dtype)
    one["qs"], one["qh"], one["d"] = b["qs"], b["qh"], 1
    return pack2((codec("TQ1_0").decode(one) + 1).astype(np.uint8))


def _iq1_m(b: np.ndarray) -> Planes:
    words = raw(b["scales"]).view("<u2")
    d = words[:, 0] >> 12 | words[:, 1] >> 12 << 4 | words[:, 2] >> 12 << 8 | words[:, 3] >> 12 << 12
    three = (words[:, :, None] >> np.array([0, 6], np.uint16) & 63).reshape(len(b), 8)
    return raw(b["qs"]), raw(b["qh"]), three.astype(np.uint8), raw(d.astype("<u2"))


@dataclass(frozen=True)
class Layout:
    """How one type is re-laid.

    entries   bytes of an entry of the planes low, high, scales, shared (0: no such plane)
    shared    groups that share an entry of the last plane
    relay     blocks (structured, (n,)) -> bytes of each plane (n, ..)
    zero      what decode.py's codes have to be lowered by
    span      weights that a scale belongs to: 32, or 16 for two scales a group
    grid      name of the codebook that codes index, if any
    """

    entries: tuple[int, int, int, int]
    relay: Callable[[np.ndarray], Planes]
    zero: int = 0
    span: int = 32
    shared: int = 8
    grid: str = ""

    def bytes_of(self, plane: int, groups: int) -> int:
        return self.entries[plane] * (groups // self.shared if plane == 3 else groups)

    def offsets(self, groups: int) -> tuple[int, int, int, int]:
        """Where the planes high, scales and shared start, and where they end, for a tensor of so many groups."""
        ends, at = [], 0
        for plane in range(4):
            at += -(-self.bytes_of(plane, groups) // ALIGN) * ALIGN
            ends.append(at)
        return tuple(ends)  # type: ignore[return-value]


LAYOUTS: dict[str, Layout] = {
    "Q4_0": Layout((16, 0, 2, 0), lambda b: (pack4(nibbles(b["qs"])), NONE, raw(b["d"]), NONE), zero=8),
    "Q4_1": Layout((16, 0, 4, 0), lambda b: (pack4(nibbles(b["qs"])), NONE, beside(1, raw(b["d"]), raw(b["m"])), NONE)),
    "Q5_0": Layout((16, 4, 2, 0), lambda b: (pack4(nibbles(b["qs"])), pack1(bits(b["qh"])), raw(b["d"]), NONE), zero=16),
    "Q5_1": Layout((16, 4, 4, 0), lambda b: (pack4(nibbles(b["qs"])), pack1(bits(b["qh"])), beside(1, raw(b["d"]), raw(b["m"])), NONE)),
    "Q8_0": Layout((16, 16, 2, 0), lambda b: (*_halves(b), raw(b["d"]), NONE)),
    "Q8_1": Layout((16, 16, 2, 0), lambda b: (*_halves(b), raw(b["d"]), NONE)),
    "Q8_K": Layout((16, 16, 0, 4), lambda b: (*_halves(b), NONE, raw(b["d"]))),
    "Q2_K": Layout((8, 0, 2, 4), lambda b: (pack2(planes(b["qs"])), NONE, b["scales"], beside(1, raw(b["d"]), raw(b["dmin"]))), span=16),
    # six-bit scales as bytes: 114 bytes a block instead of 110
    "Q3_K": Layout((8, 4, 2, 2), lambda b: (pack2(planes(b["qs"])), pack1(bit_planes(b["hmask"])), _scales_q3(b), raw(b["d"])),
                   zero=4, span=16),
    "Q4_K": Layout((16, 0, 0, 16), lambda b: (pack4(nibble_planes(b["qs"])), NONE, NONE, _super_k4(b))),
    "Q5_K": Layout((16, 4, 0, 16), lambda b: (pack4(nibble_planes(b["qs"])), pack1(bit_planes(b["qh"])), NONE, _super_k4(b))),
    "Q6_K": Layout((16, 8, 2, 2), lambda b: (pack4(_low_q6(b)), pack2(planes(b["qh"])), raw(b["scales"]), raw(b["d"])), zero=32, span=16),
    "IQ4_NL": Layout((16, 0, 2, 0), lambda b: (pack_quads(nibbles(b["qs"])), NONE, raw(b["d"]), NONE)),
    # six-bit scales as bytes: 138 bytes a block instead of 136
    "IQ4_XS": Layout((16, 0, 1, 2), lambda b: (pack_quads(nibbles(b["qs"].reshape(-1, 16)).reshape(-1, 256)), NONE, _scales_iq4(b), raw(b["d"]))),
    "MXFP4": Layout((16, 0, 1, 0), lambda b: (pack_quads(nibbles(b["qs"])), NONE, raw(b["e"]), NONE)),
    "NVFP4": Layout((16, 0, 2, 0), lambda b: (pack_quads(_nvfp4(b)), NONE, raw(b["d"]), NONE), span=16),
    "Q1_0": Layout((4, 0, 0, 2), lambda b: (pack1(bits(b["qs"])), NONE, NONE, raw(b["d"])), shared=4),
    "Q2_0": Layout((8, 0, 0, 2), lambda b: (pack2(_q2_0(b)), NONE, NONE, raw(b["d"])), zero=1, shared=2),
    # base-3 digits as two bits each: 66 bytes a block instead of 54
    "TQ1_0": Layout((8, 0, 0, 2), lambda b: (_tq1_0(b), NONE, NONE, raw(b["d"])), zero=1),
    "TQ2_0": Layout((8, 0, 0, 2), lambda b: (pack2(planes(b["qs"])), NONE, NONE, raw(b["d"])), zero=1),
    "IQ2_XXS": Layout((8, 0, 0, 2), lambda b: (raw(b["qs"]), NONE, NONE, raw(b["d"])), grid="iq2_xxs_grid"),
    "IQ2_XS": Layout((8, 0, 1, 2), lambda b: (raw(b["qs"]), NONE, b["scales"], raw(b["d"])), span=16, grid="iq2_xs_grid"),
    "IQ2_S": Layout((8, 0, 2, 2), lambda b: (beside(8, b["qs"][:, :32], pack1(bits(b["qs"][:, 32:]))), NONE, beside(8, b["qh"], b["scales"]),
                                             raw(b["d"])), span=16, grid="iq2_s_grid"),
    "IQ3_XXS": Layout((8, 4, 0, 2), lambda b: (b["qs"][:, :64], b["qs"][:, 64:], NONE, raw(b["d"])), grid="iq3_xxs_grid"),
    # four-bit scales as bytes: 114 bytes a block instead of 110
    "IQ3_S": Layout((8, 4, 2, 2), lambda b: (b["qs"], pack1(bits(b["signs"])), beside(8, b["qh"], pairs(b["scales"])), raw(b["d"])),
                    grid="iq3_s_grid"),
    "IQ1_S": Layout((4, 0, 2, 2), lambda b: (raw(b["qs"]), NONE, raw(b["qh"]), raw(b["d"])), zero=9, grid="iq1_grid"),
    # two three-bit scales as a byte, and the super-scale apart: 58 bytes a block instead of 56
    "IQ1_M": Layout((4, 2, 1, 2), _iq1_m, zero=9, span=16, grid="iq1_grid"),
}


# ---- sizes --------------------------------------------------------------------------------------------------------------------------

def float_row(k: int) -> int:
    """Numbers in a row of a re-laid matrix of floats: k, padded."""
    return -(-k // FLOAT_ROW) * FLOAT_ROW


def relaid_bytes(type_name: str, shape: Sequence[int]) -> int:
    """Bytes of a weight of this type and numpy shape in GPU memory."""
    rows, k = math.prod(shape[:-1]), shape[-1]
    if type_name in FLOATS:
        return rows * float_row(k) * np.dtype(FLOATS[type_name]).itemsize
    return LAYOUTS[type_name].offsets(rows * k // GROUP)[3]


@dataclass(frozen=True)
class RelaidWeight:
    """A weight in GPU memory. Matrices of experts (E, M, K) are E * M rows.

    data      1-D device array: uint8 planes, or for F32, F16 and BF16 the numbers (float32, float16, uint16), rows padded
    offsets   bytes at which the planes high, scales and shared start
    """

    type: str
    shape: tuple[int, ...]
    data: Any

    @cached_property
    def offsets(self) -> tuple[int, int, int]:
        return LAYOUTS[self.type].offsets(math.prod(self.shape) // GROUP)[:3] if self.quantized else (0, 0, 0)

    @property
    def quantized(self) -> bool:
        return self.type in LAYOUTS

    @property
    def rows(self) -> int:
        """Rows of one matrix: M."""
        return self.shape[-2]

    @property
    def k(self) -> int:
        """Numbers in a row as it lies in memory."""
        return self.shape[-1] if self.quantized else float_row(self.shape[-1])


def relay_numpy(type_name: str, shape: Sequence[int], blocks: np.ndarray) -> np.ndarray:
    """The re-laid bytes of a weight, from ggml's (uint8, any shape): what the GPU's kernel must give too."""
    out = np.zeros(relaid_bytes(type_name, shape), np.uint8)
    flat = np.ascontiguousarray(blocks).reshape(-1)
    if type_name in FLOATS:
        numbers = flat.view(FLOATS[type_name]).reshape(-1, shape[-1])
        out.view(FLOATS[type_name]).reshape(len(numbers), -1)[:, :shape[-1]] = numbers
        return out
    layout = LAYOUTS[type_name]
    starts = (0, *layout.offsets(math.prod(shape) // GROUP))
    for start, plane in zip(starts, layout.relay(flat.view(tensor_type(type_name).layout)), strict=False):
        out[start:start + plane.size] = plane.reshape(-1)
    return out


# ---- the table that the GPU's kernel follows ------------------------------------------------------------------------------------------

@cache
def bit_sources(type_name: str) -> np.ndarray:
    """For every bit of a block's planes (low, high, scales, shared, one after another) the bit of the block that it is, or -1."""
    row, layout = tensor_type(type_name), LAYOUTS[type_name]
    with np.errstate(all="ignore"):
        def planes_of(blocks: np.ndarray) -> np.ndarray:
            made = [p for p in layout.relay(blocks.reshape(-1).view(row.layout)) if p.size]
            return np.unpackbits(np.concatenate(made, axis=1), axis=1, bitorder="little")
        one_bit = np.packbits(np.eye(8 * row.bytes, dtype=np.uint8), axis=1, bitorder="little")
        seen = planes_of(one_bit)                                   # (bit of the block, bit of the planes)
    return np.where(seen.any(axis=0), seen.argmax(axis=0), -1).astype(np.int16)


# ---- caches of quantized types: a plane of codes, then a plane of scales, over the whole tensor (Hk, C, D) --------------------------------

def _cache_planes(type_name: str, shape: Sequence[int], memory: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes (Hk, C, D / 32, bytes) and scales (Hk, C, D / 32, 2) in a tensor's bytes."""
    heads, cells, d = shape
    codes = tensor_type(type_name).bytes - 2
    split = heads * cells * (d // GROUP) * codes
    flat = memory.reshape(-1)
    return flat[:split].reshape(heads, cells, d // GROUP, codes), flat[split:].reshape(heads, cells, d // GROUP, 2)


def cache_rows(type_name: str, shape: Sequence[int], memory: np.ndarray, n: int) -> np.ndarray:
    """The first n cells of a cache tensor (Hk, C, D), given its bytes as they lie on the GPU, as ggml's rows: uint8 (Hk, n, bytes)."""
    if type_name in FLOATS:
        return np.ascontiguousarray(memory.reshape(shape[0], shape[1], -1)[:, :n])
    codes, scales = _cache_planes(type_name, shape, memory)
    return np.concatenate([scales[:, :n], codes[:, :n]], axis=3).reshape(shape[0], n, -1)


def put_cache_rows(type_name: str, shape: Sequence[int], memory: np.ndarray, rows: np.ndarray) -> None:
    """Write what cache_rows gives into the first cells of a tensor's bytes."""
    n = rows.shape[1]
    if type_name in FLOATS:
        memory.reshape(shape[0], shape[1], -1)[:, :n] = rows
        return
    codes, scales = _cache_planes(type_name, shape, memory)
    blocks = rows.reshape(shape[0], n, shape[2] // GROUP, -1)
    scales[:, :n], codes[:, :n] = blocks[..., :2], blocks[..., 2:]
