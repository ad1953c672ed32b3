"""THE op table: one row per op, a file per family.

A row says what an op is: how its shape follows from its sources, what it computes (a numpy reference of a few lines, which
is the oracle for every backend and the fallback), and under which name the C and CUDA backends have it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyggml.shapes import Shape


@dataclass(frozen=True)
class Op:
    """One op. `shape(*srcs, **attrs)` gives the result's shape; `reference(*arrays, **attrs)` its value."""

    name: str
    shape: Callable[..., Shape]
    reference: Callable[..., np.ndarray]
    defaults: dict[str, Any] = field(default_factory=dict)      # attributes and their defaults
    type: str = "F32"                                           # of the result; "": its first source's
    cpu: str = ""                                               # step of native/engine.h; "" means the numpy reference
    cuda: str = ""
    matmul: bool = False                                        # its second source is multiplied with a weight matrix


OPS: dict[str, Op] = {}


def op(name: str, **row: Any) -> None:
    """Add a row; the result's shape is that of the first source unless the row says otherwise."""
    row.setdefault("shape", lambda x, *_, **__: x.shape)
    OPS[name] = Op(name, **row)


from pyggml.ops import attention, basic, matmul, moe, norm, rope  # noqa: E402, F401  (each adds its rows)
