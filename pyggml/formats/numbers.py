"""Finding numbers that no sound model holds: NaN and infinity, in float tensors and in the scales of quantized blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from pyggml.formats.tensorfile import PIECE, OpaqueType, Tensor, swap
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
    """The tensors in lists: together small ones of one type and size that lie at equal distances in a piece of a file, others alone."""
    run: list[Tensor] = []
    for t in tensors:
        if run and not _continues(run, t):
            yield run
            run = []
        run.append(t)
    if run:
        yield run


def _continues(run: list[Tensor], t: Tensor) -> bool:
    first = run[0]
    step = (run[1] if len(run) > 1 else t).offset - first.offset
    return (t.type is first.type and t.nbytes == first.nbytes and t.source is first.source and type(t) is type(first) is Tensor
            and not isinstance(t.type, OpaqueType) and t.offset == first.offset + step * len(run)
            and 0 < t.nbytes <= step and t.offset + t.nbytes <= first.offset + PIECE)


def bad_ones(run: list[Tensor]) -> Iterator[tuple[Tensor, Bad]]:
    """Those of a run that hold a number that is not finite, each with its first."""
    first = run[0]
    if isinstance(first.type, OpaqueType):
        return
    if len(run) == 1:
        bad = first_bad(first)
        if bad is not None:
            yield first, bad
        return
    step = run[1].offset - first.offset
    data = first.source.array(first.offset, step * (len(run) - 1) + first.nbytes)
    blocks = np.ascontiguousarray(np.lib.stride_tricks.as_strided(data, (len(run), first.nbytes), (step, 1))).reshape(-1)
    found = _first_of_each(first.type, swap(first.type, blocks) if first.swapped else blocks, len(run))
    for i in sorted(found):
        yield run[i], found[i]


def first_bad(tensor: Tensor) -> Bad | None:
    """The first block of a tensor with a number that is not finite, or None."""
    if isinstance(tensor.type, OpaqueType):
        return None
    row, start = tensor.type, 0
    for piece in tensor.pieces():
        found = _first_of_each(row, piece, 1)
        if found:
            return found[0]._replace(block=start + found[0].block)
        start += piece.nbytes // row.bytes
    return None


def _fields(row: TensorType) -> tuple[Scale, ...]:
    # IQ1_M has no field for its scale: the four bits at the top of each 16-bit word of `scales` make up one half float
    return (Scale("scales", "spread", 0, 1),) if row.name == "IQ1_M" else scales(row)


def _first_of_each(row: TensorType, blocks: np.ndarray, parts: int) -> dict[int, Bad]:
    """Of equal parts of `blocks`, uint8, the first block of each that has a number that is not finite."""
    found: dict[int, Bad] = {}
    for scale in _fields(row):
        bits, kind = _bits(row, blocks, scale)
        mask = bits.dtype.type(_EXPONENT[kind][1])
        suspect = (bits & mask) == mask
        if not suspect.any():
            continue
        suspect = suspect.reshape(parts, -1)
        firsts = suspect.argmax(1)
        for i in np.flatnonzero(suspect[np.arange(parts), firsts]).tolist():
            first = int(firsts[i])
            value = int(bits.flat[i * suspect.shape[1] + first])
            bad = Bad(first // scale.width, scale.name, "NaN" if value & _MANTISSA[kind] else "infinity")
            if i not in found or bad.block < found[i].block:
                found[i] = bad
    return found


def _bits(row: TensorType, blocks: np.ndarray, scale: Scale) -> tuple[np.ndarray, str]:
    """A field of all blocks as integers, and the C type of its numbers."""
    if scale.kind == "spread":
        words = blocks.view(row.layout)["scales"].view("<u2")
        return (words[:, 0] >> 12) | (words[:, 1] >> 8 & 0x00F0) | (words[:, 2] >> 4 & 0x0F00) | (words[:, 3] & 0xF000), "f16"
    dtype = np.dtype(_EXPONENT[scale.kind][0])
    bits = np.ndarray((blocks.nbytes // row.bytes, scale.width), dtype, blocks, scale.offset, (row.bytes, dtype.itemsize))
    return bits.reshape(-1) if row.bytes == dtype.itemsize else bits, scale.kind
