"""TensorFile: what every model format is read into. Metadata and tensors are looked up by name; nothing is copied until asked for."""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from pyggml.errors import PyggmlError
from pyggml.formats.source import MappedFile, Source
from pyggml.formats.values import Typed, printable
from pyggml.types import BY_NAME, REMOVED, TensorType

PIECE = 1 << 20         # bytes of a tensor that are looked at together: stays in the processor's cache


@dataclass(frozen=True)
class OpaqueType:
    """A tensor type that this version does not know: its bytes can be listed, copied and hashed, never decoded."""

    id: int
    at: int = field(default=0, compare=False)       # where the file says so
    block = 1
    quantized = True

    @property
    def name(self) -> str:
        return REMOVED.get(self.id, f"type {self.id}")

    def why(self) -> str:
        if self.id in REMOVED:
            return f"type {self.id} ({self.name}) was removed from the format in 2023 or 2024; convert the model again from its source"
        return f"type {self.id} is unknown to this version of pyggml"

    def __str__(self) -> str:
        return self.name


def swap(type: TensorType, data: np.ndarray) -> np.ndarray:
    """Blocks (uint8) in the other byte order."""
    return np.ascontiguousarray(data).view(type.layout.newbyteorder(">")).astype(type.layout).view(np.uint8)


class Metadata(Mapping[str, Any]):
    """Read-only metadata: numbers, bools and text as Python values, numeric arrays as numpy views, arrays of text decoded lazily.

    `type(key)` is the GGUF type ("u32", "str[]"), and `typed()` the whole as typed values, which write back unchanged.
    """

    def __init__(self, entries: Mapping[str, Any], decode: Callable[[Any], Typed]) -> None:
        self._entries, self.decode = entries, decode

    def __getitem__(self, key: str) -> Any:
        return _plain(self.typed_value(key))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def typed_value(self, key: str) -> Typed:
        return self.decode(self._entries[key])

    def type(self, key: str) -> str:
        entry = self._entries[key]
        return entry.type if isinstance(entry, Typed) else entry.kind

    def typed(self) -> dict[str, Typed]:
        return {key: self.typed_value(key) for key in self}

    def entry(self, key: str) -> Any:
        """Where the value lies in its file, as the reader of the format keeps it."""
        return self._entries[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return metadata, (self.typed(),)                    # what is pickled or copied is the values

    def __repr__(self) -> str:
        return f"<{len(self)} keys: {', '.join(printable(k) for k in list(self)[:4])}{', ...' if len(self) > 4 else ''}>"


def _plain(value: Typed) -> Any:
    return [_plain(v) for v in value.value] if value.type == "arr[]" else value.value


def metadata(values: Mapping[str, Typed]) -> Metadata:
    """Metadata from values in memory."""
    return Metadata(dict(values), lambda value: value)


class Tensor:
    """One tensor of a file. `shape` is in numpy order (rows before columns), `offset` counts from the start of the file."""

    def __init__(self, source: Source, name: str, type: TensorType | OpaqueType, shape: tuple[int, ...], offset: int, nbytes: int,
                 swapped: bool = False) -> None:
        self.source, self.name, self.type, self.shape, self.offset, self.nbytes = source, name, type, shape, offset, nbytes
        self.swapped = swapped              # stored in the other byte order than blocks.h says (big-endian)
        self.whole = name                   # the tensor of the file that this is, or that its rows are from
        self._cached: Any = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def mapped(self) -> bool:
        """`raw` is a view of the file's map, so its pages can be given back and come again."""
        return self.source.map is not None and not self.swapped

    @property
    def label(self) -> str:
        """File and name, for errors."""
        return f'{printable(self.source.name)}: tensor "{printable(self.name)}"'

    @property
    def stored(self) -> np.ndarray:
        """The bytes as they lie in the file: uint8 (nbytes,); a view of the map, or a copy where the file is not mapped."""
        return self.source.array(self.offset, self.nbytes)

    @property
    def raw(self) -> np.ndarray:
        """The blocks: uint8 (rows, row_bytes), little-endian; a view of the map when the file is mapped and little-endian.

        Without a map the copy is made once and shared by whoever holds it.
        """
        if self.mapped:
            return self._rows(self.stored)
        data = self._cached() if self._cached is not None else None
        if data is None:
            data = self._rows(self.part(0, self.nbytes))
            self._cached = weakref.ref(data)
        return data

    def pieces(self, limit: int = PIECE) -> Iterator[np.ndarray]:
        """The blocks from first to last in uint8 arrays of whole blocks, about `limit` bytes each, little-endian."""
        unit = 1 if isinstance(self.type, OpaqueType) else self.type.bytes
        step = max(1, limit // unit) * unit
        for start in range(0, self.nbytes, step):
            yield self.part(start, min(step, self.nbytes - start))

    def part(self, start: int, n: int) -> np.ndarray:
        """`n` bytes of the blocks from byte `start` on, both at block borders: uint8 (n,), little-endian unless the type is unknown."""
        data = self.source.array(self.offset + start, n)
        return swap(self.type, data) if self.swapped and isinstance(self.type, TensorType) else data

    def _rows(self, data: np.ndarray) -> np.ndarray:
        if isinstance(self.type, OpaqueType):
            return data.reshape(1, self.nbytes)
        return data.reshape(math.prod(self.shape[:-1]), self.type.row_bytes(self.shape[-1] if self.shape else 1))

    def numpy(self) -> np.ndarray:
        """The numbers of an unblocked type, in `shape`, without a copy where the file is mapped. BF16 comes as its uint16 bits."""
        if isinstance(self.type, OpaqueType) or self.type.quantized:
            raise PyggmlError(f"{self.label} is {self.type}; use .dequantize() for floats or .raw for its blocks")
        return self.raw.view(self.type.layout).reshape(self.shape)

    def dequantize(self) -> np.ndarray:
        """The weights as float32, in `shape`."""
        if isinstance(self.type, OpaqueType):
            raise PyggmlError(f"{self.label}: {self.type.why()}")
        from pyggml.quants import dequantize
        weights = dequantize(self.raw, self.type).reshape(self.shape)
        self.source.verify()
        return weights

    def rows(self, first: int, end: int) -> Tensor:
        """The rows from `first` up to `end`, as a tensor."""
        each = self.nbytes // self.shape[0]
        return self._part(f"{first}:{end}", (end - first, *self.shape[1:]), first * each, (end - first) * each)

    def as_row(self) -> Tensor:
        """The same numbers as a matrix of one row."""
        return self._part("None", (1, *self.shape), 0, self.nbytes)

    def _part(self, index: str, shape: tuple[int, ...], start: int, nbytes: int) -> Tensor:
        part = Tensor(self.source, f"{self.name}[{index}]", self.type, shape, self.offset + start, nbytes, self.swapped)
        part.whole = self.whole
        return part

    @property
    def computable(self) -> Tensor:
        """The tensor as the engine computes with it: one of a type that is defined in Python is decoded to F32, the C code knows the others."""
        return self._decoded if isinstance(self.type, TensorType) and self.type.user_defined else self

    @cached_property
    def _decoded(self) -> Tensor:           # not of every tensor: one that held itself would hold its file open until garbage is collected
        return DecodedTensor(self)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cached": None}            # a weak reference is not pickled; the source is by its path

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.shape)) or "scalar"
        return f"<{printable(self.name)} {self.type} {shape}, {self.nbytes} bytes at 0x{self.offset:x}>"


class DecodedTensor(Tensor):
    """The weights of another tensor as F32, decoded when they are asked for."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.source, tensor.name, BY_NAME["F32"], tensor.shape, tensor.offset, 4 * tensor.size)
        self._coded, self.whole = tensor, tensor.whole

    @property
    def mapped(self) -> bool:
        return False

    def part(self, start: int, n: int) -> np.ndarray:
        kind = self._coded.type
        assert isinstance(kind, TensorType)         # Tensor.computable has looked
        first, end = start // (4 * kind.block), -(-(start + n) // (4 * kind.block))
        from pyggml.quants import dequantize
        floats = dequantize(self._coded.part(first * kind.bytes, (end - first) * kind.bytes), kind).view(np.uint8)
        return floats[start - 4 * first * kind.block:][:n]


class TensorFile:
    """A model file: `kv` (metadata), `tensors` (name -> Tensor, in file order), and what was odd about it (`warnings`)."""

    def __init__(self, sources: list[Source], kv: Metadata, tensors: dict[str, Tensor], *, format: str, alignment: int = 1,
                 data_offset: int = 0, table_end: int = 0, order: str = "<", warnings: list[str] | None = None) -> None:
        self.sources, self.kv, self.tensors = sources, kv, tensors
        self.format, self.alignment, self.order = format, alignment, order
        self.table_end, self.data_offset = table_end, data_offset       # end of the tensor table, and that rounded up to the alignment
        self.warnings = warnings or []

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.sources,)                   # which are pickled by their paths

    @property
    def path(self) -> str:
        """The file's name; of a split model, the first part's."""
        return self.sources[0].name

    @property
    def paths(self) -> list[str]:
        """The names of all its files."""
        return [source.name for source in self.sources]

    @property
    def map(self) -> mmap.mmap | None:
        """The memory map of the (first) file, or None when it is read instead."""
        return self.sources[0].map

    @property
    def nbytes(self) -> int:
        return sum(s.size for s in self.sources)

    def verify(self) -> None:
        """To be called after looking at views of a mapped file: GGUFError when a part was gone from the file by then (it read as zeros)."""
        for source in self.sources:
            source.verify()

    def read_ahead(self) -> None:
        """Let the system begin to read what is mapped, because all of it will be used."""
        for source in self.sources:
            if isinstance(source, MappedFile):
                source.read_ahead()

    def advise(self, tensor: Tensor, advice: int) -> None:
        """madvise the pages of a mapped tensor: mmap.MADV_WILLNEED before use, MADV_DONTNEED to give them back. No-op without a map.

        Giving pages back keeps the neighbours' bytes: a page is only dropped from memory, and read again when touched.
        """
        where = tensor.source.map
        if where is None or tensor.nbytes == 0:
            return
        start = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
        where.madvise(advice, start, tensor.offset + tensor.nbytes - start)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise PyggmlError(f'{self.path}: tensor "{printable(name)}" is missing; the file has {len(self.tensors)} others')
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back now, not with the last reference to it. Arrays that were taken from it stay; nothing more can be taken."""
        for source in self.sources:
            source.close()

    def __repr__(self) -> str:
        return f"<{self.format} file {printable(self.path)}: {len(self.kv)} keys, {len(self.tensors)} tensors, {self.nbytes / 1e6:.1f} MB>"

    def _repr_html_(self) -> str:
        import html

        def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
            cells = "".join("<tr>" + "".join(f"<td>{html.escape(printable(c))}</td>" for c in row) + "</tr>" for row in rows)
            return "<table><tr>" + "".join(f"<th>{h}</th>" for h in head) + f"</tr>{cells}</table>"

        keys = [(k, self.kv.type(k), repr(self.kv[k])[:120]) for k in list(self.kv)[:100]]
        tensors = [(t.name, t.type, " x ".join(map(str, t.shape)), t.nbytes) for t in list(self.tensors.values())[:300]]
        parts = ((f"{len(self.kv)} keys", table(("key", "type", "value"), keys)),
                 (f"{len(self.tensors)} tensors", table(("tensor", "type", "shape", "bytes"), tensors)))
        return f"<b>{html.escape(repr(self))}</b>" + "".join(f"<details><summary>{head}</summary>{body}</details>" for head, body in parts)


def _reopened(sources: list[Source]) -> TensorFile:
    """A model file that was pickled."""
    from pyggml import formats

    return formats.open_source(sources[0]) if len(sources) == 1 else formats.open(sources[0].name, use_mmap=sources[0].map is not None)
