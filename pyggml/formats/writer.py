"""Writing GGUF version 3, in either byte order. What is written is the strict part of the format, which every reader takes:
tensors in table order, each padded to the alignment, the last one too."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyggml.errors import PyggmlError
from pyggml.formats.atomic import Output, replacing
from pyggml.formats.gguf import DEFAULT_ALIGNMENT, MAGIC, MAX_WEIGHTS, VERSIONS, Limits, prove
from pyggml.formats.tensorfile import Metadata, OpaqueType, Tensor, swap
from pyggml.formats.values import Typed, encode_metadata, encode_string, printable, typed_values
from pyggml.types import TYPES, TensorType, tensor_type


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write. `data` is an array with the little-endian blocks (any shape), or a function that yields such arrays
    one after the other, so that a model larger than memory can be written. `shape` is in weights, numpy order."""

    name: str
    type: TensorType | OpaqueType
    shape: tuple[int, ...]
    data: np.ndarray | Callable[[], Iterable[np.ndarray]]
    nbytes: int
    order: str = "<"            # of data of an unknown type, which is written as it is

    def chunks(self, order: str) -> Iterable[Any]:
        if isinstance(self.type, OpaqueType) and order != self.order:
            raise PyggmlError(f'tensor "{printable(self.name)}": {self.type.why()}, so its byte order cannot be changed')
        parts = self.data() if callable(self.data) else (self.data,)
        for part in parts:
            part = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
            yield swap(self.type, part) if order == ">" and isinstance(self.type, TensorType) else part


def new_tensor(name: str, data: Any, type: str | int | TensorType | None = None, shape: Iterable[int] | None = None) -> NewTensor:
    """A tensor from an array: the type follows from its dtype, or `data` holds blocks of `type` and `shape` gives the weights.

    With `shape` left out, blocks of shape (..., row_bytes) give it.
    """
    if callable(data):
        if type is None or shape is None:
            raise PyggmlError(f'tensor "{printable(name)}": data that is produced on the way needs its type and shape')
        row = tensor_type(type)
        shape = tuple(int(n) for n in shape)
        return NewTensor(name, row, shape, data, _nbytes(name, row, shape))
    data = np.asarray(data)
    row = tensor_type(type) if type is not None else _type_of(name, data.dtype)
    if shape is None:
        last = data.shape[-1] * data.dtype.itemsize // row.bytes * row.block if data.ndim else 1
        shape = data.shape if type is None else (*data.shape[:-1], last)
    shape = tuple(int(n) for n in shape)
    nbytes = _nbytes(name, row, shape)
    if nbytes != data.nbytes:
        raise PyggmlError(f'tensor "{printable(name)}": {shape} weights of {row} take {nbytes} bytes, the array has {data.nbytes}')
    return NewTensor(name, row, shape, data.astype(data.dtype.newbyteorder("<"), copy=False), nbytes)


def _type_of(name: str, dtype: np.dtype) -> TensorType:
    for row in TYPES:
        if not row.quantized and row.layout == dtype.newbyteorder("<") and row.name != "BF16":
            return row
    raise PyggmlError(f'tensor "{printable(name)}": numpy type {dtype} has no tensor type; convert it or give the type of its blocks')


def _nbytes(name: str, row: TensorType, shape: tuple[int, ...]) -> int:
    if math.prod(max(1, n) for n in shape) >= MAX_WEIGHTS or any(n < 0 for n in shape):
        raise PyggmlError(f'tensor "{printable(name)}": {shape} is not a shape')
    try:
        return math.prod(shape[:-1]) * row.row_bytes(shape[-1] if shape else 1)
    except PyggmlError as error:
        raise PyggmlError(f'tensor "{printable(name)}": {error}') from None


def _existing(t: Tensor) -> NewTensor:
    """A tensor of an open file, copied in pieces; a byte order is changed where needed."""
    return NewTensor(t.name, t.type, t.shape, t.pieces, t.nbytes, ">" if t.swapped else "<")


Tensors = Mapping[str, Any] | Iterable[Tensor | NewTensor]


def normal(tensors: Tensors) -> list[NewTensor]:
    """Tensors of any accepted form as NewTensor, with unique names of legal length."""
    if isinstance(tensors, Mapping):
        tensors = [v if isinstance(v, Tensor | NewTensor) else new_tensor(k, v) for k, v in tensors.items()]
    result = [_existing(t) if isinstance(t, Tensor) else t for t in tensors]
    limits, seen = Limits(), set()
    for t in result:
        size = len(t.name.encode("utf-8", "surrogateescape"))
        if not 0 < size <= limits.name or "\0" in t.name:
            raise PyggmlError(f'tensor "{printable(t.name)}": a name has 1 to {limits.name} bytes and no NUL; this one has {size}')
        if len(t.shape) > limits.dims:
            raise PyggmlError(f'tensor "{printable(t.name)}": {len(t.shape)} dimensions (limit {limits.dims})')
        if t.name in seen:
            raise PyggmlError(f'tensor "{printable(t.name)}" is given twice')
        seen.add(t.name)
    return result


def header(kv: Mapping[str, Any], tensors: list[NewTensor], order: str = "<", name: str = "<memory>") -> tuple[bytes, int]:
    """Everything before the data of the file `name`, padding included, and the alignment."""
    values: dict[str, Typed] = kv.typed() if isinstance(kv, Metadata) else typed_values(kv)
    alignment = _alignment(values)
    parts = [MAGIC, struct.pack(order + "IQQ", VERSIONS[-1], len(tensors), len(values)), encode_metadata(values, order)]
    offset = 0
    for t in tensors:
        dims = t.shape[::-1]
        parts += [encode_string(t.name, order), struct.pack(f"{order}I{len(dims)}QIQ", len(dims), *dims, t.type.id, offset)]
        offset += -(-t.nbytes // alignment) * alignment
    head = b"".join(parts)
    head += bytes(-len(head) % alignment)
    prove(head, len(head) + offset, name)
    return head, alignment


def _alignment(values: Mapping[str, Typed]) -> int:
    if "general.alignment" not in values:
        return DEFAULT_ALIGNMENT
    value = values["general.alignment"]
    limit = Limits().alignment
    if value.type != "u32" or not 8 <= value.value <= limit or value.value & (value.value - 1):
        raise PyggmlError(f"general.alignment is {value.value} ({value.type}); it must be a u32 and a power of two from 8 to {limit}")
    return value.value


def write(path: str | os.PathLike[str], kv: Mapping[str, Any], tensors: Tensors = (), *, order: str = "<") -> None:
    """Write a GGUF v3 file, whole or not at all (see atomic.py).

    kv: metadata; a `Metadata` or `Typed` values keep their types, other values get their natural one (see values.typed).
    tensors: name -> array, or Tensor (of an open file) and NewTensor objects. order: "<" little-endian, ">" big-endian.
    """
    items = normal(tensors)
    head, alignment = header(kv, items, order, os.fspath(path))
    total = len(head) + sum(-(-t.nbytes // alignment) * alignment for t in items)

    def check(out: Output) -> None:
        if out.tell() != total or out.read(0, len(head)) != head:
            raise PyggmlError(f"{out.path}: the header read back is not what was written; the disk or its file system is damaged")

    with replacing(path, total, check) as out:
        out.write(head)
        for t in items:
            start = out.tell()
            for chunk in t.chunks(order):
                out.write(chunk)
            if out.tell() - start != t.nbytes:
                raise PyggmlError(f'tensor "{printable(t.name)}": got {out.tell() - start} bytes, its shape and type take {t.nbytes}')
            out.pad(alignment)
