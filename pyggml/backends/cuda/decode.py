"""What each re-laid type contributes on the GPU: a group of 32 weights as four words of codes per half, and their scales.

    load(w, o1, o2, o3, i)     the words of group i of a weight w whose planes high, scales, shared start at o1, o2, o3
    codes(x, grid)             those words -> 8 words of 4 signed bytes: words 0..3 are weights 0..15, words 4..7 weights 16..31
    scales(x, i)               -> (scale, scale, min, min) of the two halves
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

from pyggml.backends.cuda import codes, scales
from pyggml.backends.cuda.intrinsics import device
from pyggml.backends.cuda.layout import LAYOUTS, Layout
from pyggml.backends.cuda.prims import load8, load16, load32, load64, load128, stream8, stream16, stream32, stream64, stream128
from pyggml.quants.codebooks import codebook

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


# ---- the table ---------------------------------------------------------------------------------------------------------------------------

_iq4, _fp4 = codes.of_table("iq4_values"), codes.of_table("fp4_values")

_PARTS: dict[str, tuple[Callable, Callable]] = {
    "Q4_0": (codes.of_4, scales.half_at(4)),
    "Q4_1": (codes.of_4, scales.half_and_min_at(4)),
    "Q5_0": (codes.of_5, scales.half_at(5)),
    "Q5_1": (codes.of_5, scales.half_and_min_at(5)),
    "Q8_0": (codes.of_8, scales.half_at(8)),
    "Q8_1": (codes.of_8, scales.half_at(8)),
    "Q8_K": (codes.of_8, scales.of_q8_K),
    "Q2_K": (codes.of_2, scales.of_q2_K),
    "Q3_K": (codes.of_3, scales.of_q3_K),
    "Q4_K": (codes.of_4, scales.k4_at(4)),
    "Q5_K": (codes.of_5, scales.k4_at(5)),
    "Q6_K": (codes.of_6, scales.of_q6_K),
    "IQ4_NL": (_iq4, scales.half_at(4)),
    "IQ4_XS": (_iq4, scales.of_iq4_xs),
    "MXFP4": (_fp4, scales.of_mxfp4),
    "NVFP4": (_fp4, scales.of_nvfp4),
    "Q1_0": (codes.of_1, scales.half_at(1)),
    "Q2_0": (codes.of_2, scales.half_at(2)),
    "TQ1_0": (codes.of_2, scales.half_at(2)),
    "TQ2_0": (codes.of_2, scales.half_at(2)),
    "IQ2_XXS": (codes.of_iq2_xxs, scales.of_iq2_xxs),
    "IQ2_XS": (codes.of_iq2_xs, scales.of_iq2_xs),
    "IQ2_S": (codes.of_iq2_s, scales.of_iq2_s),
    "IQ3_XXS": (codes.of_iq3_xxs, scales.of_iq3_xxs),
    "IQ3_S": (codes.of_iq3_s, scales.of_iq3_s),
    "IQ1_S": (codes.of_iq1_s, scales.of_iq1_s),
    "IQ1_M": (codes.of_iq1_m, scales.of_iq1_m),
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
    """The codebook that a type's codes index, as codes.py reads it from memory (16 zeros for types without)."""
    name = LAYOUTS[type_name].grid
    if not name:
        return np.zeros(16, np.uint8)
    entries = codebook(name)
    return (8 * (entries + 1) if name == "iq1_grid" else entries).astype(np.uint8).reshape(-1)


