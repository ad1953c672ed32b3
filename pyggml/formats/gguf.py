"""Reading GGUF, versions 1 to 3, both byte orders.

    header     "GGUF", u32 version, u64 tensor count, u64 key count
    keys       string key, u32 type, value                              string = u64 length, bytes
    tensors    string name, u32 n_dims, u64 dims[] (innermost first), u32 type, u64 offset in the data
    padding    to a multiple of general.alignment (32)
    data       each tensor at its offset

Version 1 has u32 for every count, length and dimension. The file is not trusted: every count and length is compared with the
bytes that are left by division, as Python integers, before anything is allocated or read. What passes is sound: offsets lie in
the file, rows divide into blocks, tensors do not overlap, names are unique text. Metadata values stay where they are until asked for.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np

from pyggml.errors import GGUFError, PyggmlError
from pyggml.formats.source import FIRST_READ, Memory, Source
from pyggml.formats.tensorfile import Metadata, OpaqueType, Tensor, TensorFile
from pyggml.formats.values import ARRAY, BOOL, MAX_KEY, STRING, VALUE_TYPES, StringArray, Typed, ValueType, printable, scan_strings
from pyggml.types import BY_ID

MAGIC = b"GGUF"
VERSIONS = (1, 2, 3)
DEFAULT_ALIGNMENT = 32
GROWTH = 8                     # how much more of a file is read when what was read is not all of its header, which is then gone through again
SHOWN_NAME = 160               # characters of a key in an error
MAX_WEIGHTS = 2 ** 60          # zero dimensions counted as one: numpy and C address arrays of this shape, of up to 8 bytes a weight


@dataclass(frozen=True)
class Limits:
    """What no sound file exceeds. They hold beside the size of the file: in a sparse file three gigabytes of text would fit.

    A file at any of them is shown or checked in one to four seconds and 256 MB. A million keys or tensors would take 15 to 24 seconds and up to
    800 MB, 64 MB of text with one character beyond the 16-bit ones 420 MB.
    """

    keys: int = 1 << 17
    tensors: int = 1 << 17
    elements: int = 64 << 20        # of one metadata array
    string: int = 32 << 20          # bytes of one metadata string
    key: int = MAX_KEY              # bytes of a key
    name: int = 64                  # bytes of a tensor name
    dims: int = 4
    nesting: int = 64               # depth of arrays within arrays
    nested: int = 1 << 16           # arrays within arrays, in all
    alignment: int = 64 << 10
    type_id: int = 65535            # of an unknown tensor type: above is damage, below it may be another program's
    header: int = 64 << 20          # bytes of everything before the tensor data


class Entry(NamedTuple):
    """Where a metadata value lies. `start` is its first byte after the type id (after the element type and count for an array)."""

    type: ValueType
    element: ValueType | None       # of an array
    length: int                     # of an array
    start: int
    end: int
    key_start: int                  # of the whole pair: key length, key, type id, value

    @property
    def kind(self) -> str:
        """The type as Typed names it."""
        return self.type.name if self.element is None else self.element.name + "[]"


class _NeedMore(Exception):
    """The part of the file at hand ends too early: `args[0]` more bytes from its start are needed."""


class _Cursor:
    """A checked walk over the start of a file. `where` says what is being read, for errors: a text, or kind and name of an entry, or its
    kind and number when it has no name yet (of `total`)."""

    def __init__(self, source: Source, buffer: Any, limits: Limits) -> None:
        self.name, self.size, self.buffer, self.limits = printable(source.name), source.size, buffer, limits
        self.have = len(buffer)
        self.sure = min(self.have, self.size, limits.header)        # what ends before needs no further look
        self.pos = 0
        self.where: str | tuple[str, str | int] = "header"
        self.total = 0
        self.nested = 0                     # arrays within arrays so far
        self.set_format("<", 3)

    def set_format(self, order: str, version: int) -> None:
        self.order, self.version = order, version
        self.prefix = 4 if version == 1 else 8              # bytes of a count or length
        self._u32 = struct.Struct(order + "I").unpack_from
        self._count = struct.Struct(order + ("I" if version == 1 else "Q")).unpack_from

    def fail(self, text: str, pos: int | None = None) -> NoReturn:
        where = self.where
        if not isinstance(where, str):
            kind, name = where
            where = f"{kind} {name} of {self.total}" if isinstance(name, int) else f'{kind} "{printable(name[:SHOWN_NAME])}"'
        raise GGUFError(f"{self.name}: offset 0x{self.pos if pos is None else pos:x}: {where}: {text}")

    def need(self, count: int, each: int, what: str) -> int:
        """The position after `count` items of `each` bytes; an error when the file is too short for them."""
        left = self.size - self.pos
        if count > left // each:
            self.fail(f"{what} needs {count * each} bytes, {left} are left in the file; it is cut short or damaged")
        end = self.pos + count * each
        if end > self.limits.header:
            self.fail(f"metadata and tensor table reach {end} bytes into the file (limit {self.limits.header})")
        if end > self.have:
            raise _NeedMore(end)
        return end

    def u32(self, what: str) -> int:
        end = self.pos + 4
        if end > self.sure:
            self.need(1, 4, what)
        value = self._u32(self.buffer, self.pos)[0]
        self.pos = end
        return value

    def count(self, what: str) -> int:
        end = self.pos + self.prefix
        if end > self.sure:
            self.need(1, self.prefix, what)
        value = self._count(self.buffer, self.pos)[0]
        self.pos = end
        return value

    def capped(self, what: str, limit: int, each: int) -> int:
        """A count of things that take at least `each` bytes: within its limit and within the file."""
        start, value = self.pos, self.count(what)
        if value > limit:
            self.fail(f"{what} is {value} (limit {limit})", start)
        if value > (self.size - self.pos) // each:
            left = self.size - self.pos
            self.fail(f"{what} is {value}, more than the {left} bytes left in the file can hold; it is cut short or damaged", start)
        return value

    def text(self, what: str, limit: int) -> str:
        """A key or a tensor name: not empty, UTF-8, without NUL."""
        start = self.pos
        text_at = start + self.prefix
        length = self._count(self.buffer, start)[0] if text_at <= self.sure else limit + 1
        end = text_at + length
        if length > limit or end > self.sure:               # name it, or ask for more of the file
            length = self.capped(f"length of the {what}", limit, 1)
            end = self.need(length, 1, what)
        try:
            value = str(self.buffer[text_at:end], "utf-8")
        except UnicodeDecodeError as error:
            value, wrong = "", error.start
        if not value or "\0" in value:
            data = bytes(self.buffer[text_at:end])
            if not data:
                self.fail(f"the {what} is empty", start)
            if 0 in data:
                self.fail(f"the {what} contains a NUL byte", text_at + data.index(0))
            self.fail(f"the {what} is not UTF-8 (byte 0x{data[wrong]:02x})", text_at + wrong)
        self.pos = end
        return value

    # ---- values ----

    def value_type(self, what: str) -> ValueType:
        start, number = self.pos, self.u32(what)
        if number >= len(VALUE_TYPES):
            self.fail(f"{what} is {number} (limit {len(VALUE_TYPES) - 1})", start)
        return VALUE_TYPES[number]

    def skip_value(self, key_start: int) -> Entry:
        """Check the value at `pos` and move past it."""
        t = self.value_type("value type")
        if t is ARRAY:
            return self.skip_array(key_start, 1)
        start = self.pos
        if t is STRING:
            self.pos = self.need(self.capped("length of the string", self.limits.string, 1), 1, "the string")
        else:
            end = start + t.size
            if end > self.sure:
                self.need(1, t.size, f"the {t.name} value")
            if t is BOOL and self.buffer[start] > 1:
                self.fail(f"bool is {self.buffer[start]} (limit 1)")
            self.pos = end
        return Entry(t, None, 1, start, self.pos, key_start)

    def skip_array(self, key_start: int, depth: int) -> Entry:
        if depth > self.limits.nesting:
            self.fail(f"arrays are nested {depth} deep (limit {self.limits.nesting})")
        element = self.value_type("element type of the array")
        smallest = {STRING: self.prefix, ARRAY: 4 + self.prefix}.get(element) or element.size
        count = self.capped("length of the array", self.limits.elements, smallest)
        start = self.pos
        if element is STRING:
            self.skip_strings(count)
        elif element is ARRAY:
            self.nested += count
            if self.nested > self.limits.nested:
                self.fail(f"arrays hold {self.nested} arrays (limit {self.limits.nested})", start - self.prefix)
            for _ in range(count):
                self.skip_array(key_start, depth + 1)
        else:
            end = self.need(count, element.size, "the array")
            if element is BOOL and count:
                values = np.frombuffer(self.buffer, np.uint8, count, start)
                if values.max() > 1:
                    first = int(np.argmax(values > 1))
                    self.fail(f"bool {first} of the array is {values[first]} (limit 1)", start + first)
            self.pos = end
        return Entry(ARRAY, element, count, start, self.pos, key_start)

    def skip_strings(self, count: int) -> None:
        end = scan_strings(self.buffer, self.pos, min(self.have, self.limits.header), count, self.order, self.prefix, self.limits.string)
        if end < 0:                         # name the string, or ask for more of the file
            self.pos = -end - 1
            self.need(self.capped("length of a string of the array", self.limits.string, 1), 1, "a string of the array")
            raise _NeedMore(min(self.size, self.have + 1))
        self.pos = end


class _Values:
    """Decodes entries of one file; kept by its Metadata."""

    def __init__(self, cursor: _Cursor) -> None:
        self.buffer, self.order, self.prefix = cursor.buffer, cursor.order, cursor.prefix

    def __call__(self, entry: Entry) -> Typed:
        if entry.element is not None:
            return self.array(entry.element, entry.length, entry.start, entry.end)[0]
        if entry.type is STRING:
            return Typed("str", bytes(self.buffer[entry.start + self.prefix:entry.end]).decode("utf-8", "surrogateescape"))
        return Typed(entry.type.name, struct.unpack_from(self.order + entry.type.code, self.buffer, entry.start)[0])

    def array(self, element: ValueType, count: int, start: int, end: int) -> tuple[Typed, int]:
        """The array of `count` elements at `start`, and the position after it."""
        if element is STRING:
            if end < 0:
                end = scan_strings(self.buffer, start, len(self.buffer), count, self.order, self.prefix, len(self.buffer))
            return Typed("str[]", StringArray(self.buffer, start, end, count, self.order, self.prefix)), end
        if element is ARRAY:
            items, pos = [], start
            for _ in range(count):
                kind, n = struct.unpack_from(self.order + ("II" if self.prefix == 4 else "IQ"), self.buffer, pos)
                item, pos = self.array(VALUE_TYPES[kind], n, pos + 4 + self.prefix, -1)
                items.append(item)
            return Typed("arr[]", items), pos
        values = np.frombuffer(self.buffer, element.dtype(self.order), count, start) if count else np.empty(0, element.dtype(self.order))
        return Typed(element.name + "[]", values), start + values.nbytes


def read(source: Source, limits: Limits | None = None) -> TensorFile:
    """The file behind `source`; GGUFError names the offset and the field of what is wrong with it."""
    limits, n = limits or Limits(), FIRST_READ
    while True:
        try:
            return _read(_Cursor(source, source.head(n), limits), source)
        except _NeedMore as more:
            n = max(min(GROWTH * n, limits.header), more.args[0])


def prove(head: bytes, size: int, name: str) -> None:
    """PyggmlError when a file of `size` bytes that begins with `head` (all before the tensor data) could not be read again."""
    source = Memory(head, name)
    source.size = size
    try:
        file = _read(_Cursor(source, head, Limits()), source)
    except GGUFError as error:
        raise PyggmlError(f"{error}; such a file could not be read again, so it is not written") from None
    if file.data_offset != len(head):
        raise PyggmlError(f"{printable(name)}: a header of {file.data_offset} bytes was made where {len(head)} are needed; nothing is written")


def _read(c: _Cursor, source: Source) -> TensorFile:
    n_tensors, n_kv = _read_header(c)
    entries: dict[str, Entry] = {}
    c.total = n_kv
    for i in range(n_kv):
        c.where, start = ("key", i), c.pos
        key = c.text("key", c.limits.key)
        c.where = "key", key
        if key in entries:
            c.fail("the key appears twice", start)
        entries[key] = c.skip_value(start)
    kv = Metadata(entries, _Values(c))
    warnings: list[str] = []
    alignment = _alignment(c, kv, warnings)
    infos = _read_infos(c, n_tensors)
    table_end = c.pos
    data = -(-table_end // alignment) * alignment
    tensors = _place(c, source, infos, data, alignment, warnings)
    return TensorFile([source], kv, tensors, format=f"GGUF v{c.version}", alignment=alignment, data_offset=data,
                      table_end=table_end, order=c.order, warnings=warnings)


def _read_header(c: _Cursor) -> tuple[int, int]:
    """Counts of tensors and keys; finds out version and byte order."""
    if c.size < len(MAGIC) + 4 or bytes(c.buffer[:4]) != MAGIC:
        magic = bytes(c.buffer[:4])
        c.fail(f"not a GGUF file, it starts with {magic!r}" if magic != MAGIC[:len(magic)] else f"not a GGUF file, it has {c.size} bytes")
    c.pos = 4
    version = c.u32("version")
    if version & 0xFFFF == 0:                   # no version is that high: the other byte order
        c.set_format(">", 3)
        c.pos = 4
        version = c.u32("version")
    if version not in VERSIONS:
        c.fail(f"version is {version}; versions {VERSIONS[0]} to {VERSIONS[-1]} are known", 4)
    c.set_format(c.order, version)
    p = c.prefix
    start, n_tensors = c.pos, c.count("tensor count")
    n_kv = c.capped("key count", c.limits.keys, p + 4 + 1)
    at, c.pos = c.pos, start
    c.capped("tensor count", c.limits.tensors, p + 4 + 4 + 8)
    c.pos = at
    return n_tensors, n_kv


def _alignment(c: _Cursor, kv: Metadata, warnings: list[str]) -> int:
    key = "general.alignment"
    if key not in kv:
        return DEFAULT_ALIGNMENT
    entry, c.where = kv.entry(key), ("key", key)
    if kv.type(key) != "u32":
        c.fail(f"the alignment is of type {kv.type(key)}; it must be u32", entry.start)
    a = kv[key]
    if a == 0 or a > c.limits.alignment or (a % 8 and a not in (1, 2, 4)):
        c.fail(f"alignment is {a}; it must be a power of two from 8 to {c.limits.alignment}", entry.start)
    if a < 8 or a & (a - 1):
        warnings.append(f"alignment is {a}, not a power of two from 8 upwards; other programs may refuse the file")
    return a


class _Info(NamedTuple):
    name: str
    dims: tuple[int, ...]       # innermost first
    type: int
    offset: int                 # in the data
    dims_at: int                # where these fields lie in the file
    offset_at: int


def _read_infos(c: _Cursor, n_tensors: int) -> dict[str, _Info]:
    infos: dict[str, _Info] = {}
    c.total = n_tensors
    # behind the number of dimensions: those, type and offset
    rests = [struct.Struct(f"{c.order}{n}{'I' if c.version == 1 else 'Q'}IQ") for n in range(c.limits.dims + 1)]
    most = c.limits.type_id
    for i in range(n_tensors):
        c.where, at = ("tensor", i), c.pos
        name = c.text("tensor name", c.limits.name)
        c.where = "tensor", name
        if name in infos:
            c.fail("the tensor appears twice", at)
        n_dims = c.u32("n_dims")
        dims_at = c.pos
        if n_dims >= len(rests):
            c.fail(f"n_dims is {n_dims} (limit {c.limits.dims})", dims_at - 4)
        rest = rests[n_dims]
        end = dims_at + rest.size
        if end > c.sure:                        # name the field that is cut, or ask for more of the file
            for k in range(n_dims):
                c.count(f"dimension {k}")
            c.u32("type")
            c.need(1, 8, "offset")
        *dims, kind, offset = rest.unpack_from(c.buffer, dims_at)
        elements = 1
        for n in dims:
            elements *= n or 1
        if elements >= MAX_WEIGHTS:
            c.fail(f"dimensions {dims} multiply to {elements} weights (limit 2^60)", dims_at)
        if kind > most and kind not in BY_ID:
            c.fail(f"type is {kind} (limit {most})", end - 12)
        infos[name] = _Info(name, tuple(dims), kind, offset, dims_at, end - 8)
        c.pos = end
    return infos


def _place(c: _Cursor, source: Source, infos: dict[str, _Info], data: int, alignment: int, warnings: list[str]) -> dict[str, Tensor]:
    """Tensors with their place in the file: aligned, inside it, apart from each other."""
    room = max(0, source.size - data)           # the data may start past the end of a file that has none
    sizes = [_bytes_of(c, info) for info in infos.values()]
    order = sorted(zip(infos.values(), sizes, strict=True), key=lambda entry: (entry[0].offset, entry[1] or 0))
    tensors: dict[str, Any] = dict.fromkeys(infos)          # in the order of the table
    covered, owner = 0, ""
    swapped = c.order == ">"
    for k, (info, size) in enumerate(order):
        name, dims, number, offset, _, offset_at = info
        type = BY_ID.get(number) or OpaqueType(number, offset_at - 4)
        c.where, c.pos = ("tensor", name), offset_at
        if size is None:                        # the bytes up to the next tensor; without knowing the type there is no better bound
            size = max(0, (order[k + 1][0].offset if k + 1 < len(order) else room) - offset)
            warnings.append(f'tensor "{printable(name)}": {OpaqueType(number).why()}')
        if offset % alignment:
            c.fail(f"offset {offset} is not a multiple of the alignment {alignment}")
        end = offset + size
        if end > (room if size else -(-room // alignment) * alignment):
            c.fail(f"offset {offset} with {size} bytes of data ends {data + end - source.size} bytes past the end "
                   "of the file; the download is incomplete, or the entry is damaged")
        if size and offset < covered:
            c.fail(f'offset {offset} overlaps tensor "{printable(owner)}", which ends at {covered}')
        if end > covered:
            covered, owner = end, name
        tensors[name] = Tensor(source, name, type, dims[::-1], data + offset, size, swapped)
    return tensors


def _bytes_of(c: _Cursor, info: _Info) -> int | None:
    """Bytes of a tensor's data; None when its type is unknown."""
    t = BY_ID.get(info.type)
    if t is None:
        return None
    row, *rest = info.dims or (1,)
    blocks, left = divmod(row, t.block)
    if left:
        c.where = "tensor", info.name
        c.fail(f"rows of {row} weights do not divide into {t.name} blocks of {t.block}", info.dims_at)
    return math.prod(rest, start=blocks * t.bytes)
