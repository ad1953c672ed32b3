"""The codebooks of the I-quants and 4-bit floats, read from the header that C compiles: int8 arrays (entries, weights)."""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from pyggml.native import header

_ARRAY = re.compile(r"static const (\w+) (\w+)\[(\d+)\] = \{([^}]*)\}")
_DTYPES = {"int8_t": "i1", "uint32_t": "<u4", "uint64_t": "<u8"}


@cache
def _arrays() -> dict[str, np.ndarray]:
    found = {}
    for ctype, name, count, body in _ARRAY.findall(header("codebooks.h")):
        values = np.array([int(v, 0) for v in body.replace(",", " ").split()], dtype=_DTYPES[ctype])
        found[name] = values.view(np.int8).reshape(int(count), -1)
    return found


def codebook(name: str) -> np.ndarray:
    """A codebook by its name in native/codebooks.h: `iq4_values` (16, 1), `iq2_s_grid` (1024, 8), `iq3_s_grid` (512, 4), ..."""
    return _arrays()[name]
