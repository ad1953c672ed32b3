"""Finding numbers that no sound model holds: NaN and infinity, in float tensors and in the scales of quantized blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from pyggml.formats.tensorfile import PIECE, OpaqueType, Tensor
from pyggml.native import ffi
from pyggml.types import TensorType

# C types of blocks.h that can hold NaN or infinity: all exponent bits set means one of them. For e8m0 it means NaN.
_EXPONENT = {"f16": ("<u2", 0x7C00), "bf16": ("<u2", 0x7F80), "float": ("<u4", 0x7F800000), "double": ("<u8", 0x7FF << 52),
             "e8m0": ("u1", 0xFF)}
_MANTISSA = {"f16": 0x03FF, "bf16": 0x007F, "float": 0x7FFFFF, "double": (1 << 52) - 1, "e8m0": 0xFF}


_KINDS = {"<f2": "f16", "<f4": "float", "<f8": "double"}         # what numpy calls them, for types that are defined in Python


class Scale(NamedTuple):
    """A floating point field of a block (or the number itself, with name "")."""

    name: str
    kind: str           # C type
    offset: int         # bytes from the start of the block
    width: int          # how many numbers


@cache
def scales(row: TensorType) -> tuple[Scale, ...]:
    """The floating point fields of a type's block."""
    if row.user_defined:
        fields = row.layout.fields or {"": (row.layout, 0)}
        return tuple(Scale(name, _KINDS[base.str], offset, math.prod(shape)) for name, (dtype, offset, *_) in fields.items()
                     for base, shape in [dtype.subdtype or (dtype, ())] if base.str in _KINDS)
    ctype = ffi.typeof(row.ctype)
    if ctype.cname in _EXPONENT:
        return (Scale("", ctype.cname, 0, 1),)
    if ctype.kind != "struct":
        return ()

    def members(fields: Any) -> Iterator[Scale]:
        for name, field in fields:
            item, width = (field.type.item, field.type.length) if field.type.kind == "array" else (field.type, 1)
            if item.cname in _EXPONENT:
                yield Scale(name, item.cname, field.offset, width)
    return tuple(members(ctype.fields))


class Bad(NamedTuple):
    """The first number of a tensor that is not finite."""

    block: int          # index of the block in the tensor (of the weight, for unblocked types)
    field: str          # "" for a plain number
    value: str          # "NaN" or "infinity"


def runs(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in lists: together those of one type of plain numbers that lie one behind the other in a piece of a file, others alone."""
    run: list[Tensor] = []
    for t in tensors:
        if run:
            first, before = run[0], run[-1]
            apart = t.offset - before.offset - before.nbytes
            if (t.type is not first.type or t.source is not first.source or type(t) is not Tensor or type(first) is not Tensor
                    or isinstance(first.type, OpaqueType) or first.type.block > 1 or not t.nbytes or not 0 <= apart < PIECE
                    or t.offset + t.nbytes - first.offset > PIECE or (t.offset - first.offset) % first.type.bytes):
                yield run
                run = []
        run.append(t)
    if run:
        yield run


def span(run: list[Tensor]) -> Tensor:
    """The bytes from the first tensor of a run to its last, what lies between included, as a tensor."""
    first, last = run[0], run[-1]
    assert not isinstance(first.type, OpaqueType)           # such a tensor is a run of its own
    n = last.offset + last.nbytes - first.offset
    return Tensor(first.source, first.name, first.type, (n // first.type.bytes,), first.offset, n, first.swapped)


def first_bad(tensor: Tensor) -> Bad | None:
    """The first block of a tensor with a number that is not finite, or None."""
    if isinstance(tensor.type, OpaqueType):
        return None
    row, start = tensor.type, 0
    for piece in tensor.pieces():
        found = [bad for bad in (_in_piece(row, piece, scale) for scale in _fields(row)) if bad]
        if found:
            bad = min(found, key=lambda b: b.block)
            return bad._replace(block=start + bad.block)
        start += piece.nbytes // row.bytes
    return None


def _fields(row: TensorType) -> tuple[Scale, ...]:
    # IQ1_M has no field for its scale: the four bits at the top of each 16-bit word of `scales` make up one half float
    return (Scale("scales", "spread", 0, 1),) if row.name == "IQ1_M" else scales(row)


def _in_piece(row: TensorType, piece: np.ndarray, scale: Scale) -> Bad | None:
    kind = scale.kind
    if kind == "spread":
        words = piece.view(row.layout)["scales"].view("<u2")
        bits = (words[:, 0] >> 12) | (words[:, 1] >> 8 & 0x00F0) | (words[:, 2] >> 4 & 0x0F00) | (words[:, 3] & 0xF000)
        kind = "f16"
    else:
        dtype = np.dtype(_EXPONENT[kind][0])
        n = piece.nbytes // row.bytes
        bits = np.ndarray((n, scale.width), dtype, piece, scale.offset, (row.bytes, dtype.itemsize))
        if row.bytes == dtype.itemsize:
            bits = bits.reshape(-1)
    mask = bits.dtype.type(_EXPONENT[kind][1])
    suspect = (bits & mask) == mask
    if not suspect.any():
        return None
    first = int(np.argmax(suspect))
    value = int(np.ravel(bits)[first])
    return Bad(first // scale.width, scale.name, "NaN" if value & _MANTISSA[kind] else "infinity")
