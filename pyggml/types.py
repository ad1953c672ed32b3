"""THE tensor type table: one row per ggml type id.

A row names the type, its block length in weights, and the C struct that lays out a block (native/blocks.h); sizes and the
numpy layout are derived from that struct. `activation` is the type that activations take when they are multiplied with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pyggml.errors import PyggmlError
from pyggml.native import ffi

_PRIMITIVES = {"f16": "<f2", "bf16": "<u2", "e8m0": "u1", "ue4m3": "u1", "float": "<f4", "double": "<f8",
               "uint8_t": "u1", "int8_t": "i1", "uint16_t": "<u2", "int16_t": "<i2", "uint32_t": "<u4", "int32_t": "<i4", "int64_t": "<i8"}


def _numpy_layout(ctype) -> np.dtype:
    """The numpy dtype with the fields of a C type."""
    if ctype.kind == "array":
        return np.dtype((_numpy_layout(ctype.item), (ctype.length,)))
    if ctype.cname in _PRIMITIVES:
        return np.dtype(_PRIMITIVES[ctype.cname])
    return np.dtype([(name, _numpy_layout(member.type)) for name, member in ctype.fields])


@dataclass(frozen=True)
class TensorType:
    """One tensor type. `layout` is the numpy dtype of one block (a plain number for unblocked types)."""

    id: int
    name: str
    block: int = 1                   # weights per block
    ctype: str = ""                  # C type of one block, or "" for a type defined in Python (add_type), which states dtype
    activation: str = ""             # name of the type that activations are quantized to, "" for types nobody multiplies with
    dtype: np.dtype | None = None

    @cached_property
    def layout(self) -> np.dtype:
        return self.dtype if self.dtype is not None else _numpy_layout(ffi.typeof(self.ctype))

    @property
    def user_defined(self) -> bool:
        """True for a type that C does not know."""
        return self.dtype is not None

    @cached_property
    def bytes(self) -> int:
        """Bytes of one block."""
        return self.layout.itemsize

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.block

    @property
    def quantized(self) -> bool:
        return self.block > 1

    @property
    def for_weights(self) -> bool:
        """Weights of this type can be multiplied with something."""
        return bool(self.activation) or self.user_defined

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of `n` weights; PyggmlError when `n` is not a multiple of the block."""
        if n % self.block:
            raise PyggmlError(f"a row of {n} weights does not divide into {self.name} blocks of {self.block}")
        return n // self.block * self.bytes

    def __str__(self) -> str:
        return self.name


TYPES: tuple[TensorType, ...] = (
    TensorType(0, "F32", 1, "float", "F32"),
    TensorType(1, "F16", 1, "f16", "F32"),
    TensorType(2, "Q4_0", 32, "block_q4_0", "Q8_0"),
    TensorType(3, "Q4_1", 32, "block_q4_1", "Q8_1"),
    TensorType(6, "Q5_0", 32, "block_q5_0", "Q8_0"),
    TensorType(7, "Q5_1", 32, "block_q5_1", "Q8_1"),
    TensorType(8, "Q8_0", 32, "block_q8_0", "Q8_0"),
    TensorType(9, "Q8_1", 32, "block_q8_1"),
    TensorType(10, "Q2_K", 256, "block_q2_K", "Q8_K"),
    TensorType(11, "Q3_K", 256, "block_q3_K", "Q8_K"),
    TensorType(12, "Q4_K", 256, "block_q4_K", "Q8_K"),
    TensorType(13, "Q5_K", 256, "block_q5_K", "Q8_K"),
    TensorType(14, "Q6_K", 256, "block_q6_K", "Q8_K"),
    TensorType(15, "Q8_K", 256, "block_q8_K"),
    TensorType(16, "IQ2_XXS", 256, "block_iq2_xxs", "Q8_K"),
    TensorType(17, "IQ2_XS", 256, "block_iq2_xs", "Q8_K"),
    TensorType(18, "IQ3_XXS", 256, "block_iq3_xxs", "Q8_K"),
    TensorType(19, "IQ1_S", 256, "block_iq1_s", "Q8_K"),
    TensorType(20, "IQ4_NL", 32, "block_iq4_nl", "Q8_0"),
    TensorType(21, "IQ3_S", 256, "block_iq3_s", "Q8_K"),
    TensorType(22, "IQ2_S", 256, "block_iq2_s", "Q8_K"),
    TensorType(23, "IQ4_XS", 256, "block_iq4_xs", "Q8_K"),
    TensorType(24, "I8", 1, "int8_t"),
    TensorType(25, "I16", 1, "int16_t"),
    TensorType(26, "I32", 1, "int32_t"),
    TensorType(27, "I64", 1, "int64_t"),
    TensorType(28, "F64", 1, "double"),
    TensorType(29, "IQ1_M", 256, "block_iq1_m", "Q8_K"),
    TensorType(30, "BF16", 1, "bf16", "F32"),
    TensorType(34, "TQ1_0", 256, "block_tq1_0", "Q8_K"),
    TensorType(35, "TQ2_0", 256, "block_tq2_0", "Q8_K"),
    TensorType(39, "MXFP4", 32, "block_mxfp4", "Q8_0"),
    TensorType(40, "NVFP4", 64, "block_nvfp4", "Q8_0"),
    TensorType(41, "Q1_0", 128, "block_q1_0", "Q8_0"),
    TensorType(42, "Q2_0", 64, "block_q2_0", "Q8_0"),
)

# Types that once had an id and were taken out of the format: named in errors, never decoded.
REMOVED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}

BY_ID = {t.id: t for t in TYPES}
BY_NAME = {t.name: t for t in TYPES}
FIRST_USER_ID = 1000


def add_type(row: TensorType) -> None:
    """Make a type defined in Python known by its id and name. PyggmlError when either is taken or the id is not a user's."""
    if row.id < FIRST_USER_ID:
        raise PyggmlError(f"type {row.name} asks for id {row.id}; ids below {FIRST_USER_ID} belong to ggml, choose a larger one")
    for taken in (BY_ID.get(row.id), BY_NAME.get(row.name.upper())):
        if taken is not None:
            raise PyggmlError(f"type {row.name} (id {row.id}) is taken by {taken.name} (id {taken.id}); choose another name and id")
    BY_ID[row.id] = BY_NAME[row.name.upper()] = row


def tensor_type(which: int | str | TensorType) -> TensorType:
    """The row for a type id or name (any case). PyggmlError names what is known."""
    if isinstance(which, TensorType):
        return which
    row = BY_ID.get(which) if isinstance(which, int) else BY_NAME.get(which.upper())
    if row is not None:
        return row
    if isinstance(which, int) and which in REMOVED:
        raise PyggmlError(f"tensor type {which} ({REMOVED[which]}) was removed from the format; convert the file again from its source")
    raise PyggmlError(f"tensor type {which!r} is unknown; known are {', '.join(t.name for t in TYPES)}")
