"""GGUF metadata values: the table of value types, typed values for writing, and their bytes.

A type is written as users of llama.cpp write it: `u32`, `f32`, `bool`, `str`, ...; `u32[]` is an array of u32, and
`arr[]` an array whose elements are arrays, each with a type of its own.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np

from pyggml.errors import PyggmlError
from pyggml.native import ffi, lib


@dataclass(frozen=True)
class ValueType:
    """One GGUF value type. `code` is its struct and numpy code; strings and arrays have none."""

    id: int
    name: str
    code: str = ""

    @cached_property
    def size(self) -> int:
        """Bytes of a value; 0 for strings and arrays."""
        return struct.calcsize("<" + self.code) if self.code else 0

    @property
    def range(self) -> str:
        """What it can hold, for errors."""
        if self.code in "fd":
            return "numbers" if self.code == "d" else "numbers up to 3.4e38"
        bits = 8 * self.size
        low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if self.code.islower() else (0, (1 << bits) - 1)
        return "true or false" if self.code == "?" else f"whole numbers from {low} to {high}"

    def dtype(self, order: str) -> np.dtype:
        return np.dtype("?" if self.code == "?" else order + self.code)


VALUE_TYPES = (
    ValueType(0, "u8", "B"), ValueType(1, "i8", "b"), ValueType(2, "u16", "H"), ValueType(3, "i16", "h"),
    ValueType(4, "u32", "I"), ValueType(5, "i32", "i"), ValueType(6, "f32", "f"), ValueType(7, "bool", "?"),
    ValueType(8, "str"), ValueType(9, "arr"), ValueType(10, "u64", "Q"), ValueType(11, "i64", "q"), ValueType(12, "f64", "d"),
)
VALUE_TYPE = {t.name: t for t in VALUE_TYPES}
STRING, ARRAY, BOOL = VALUE_TYPE["str"], VALUE_TYPE["arr"], VALUE_TYPE["bool"]

MAX_KEY = 65535         # bytes of a key

# Characters that would move a terminal's cursor, change its colours or reorder what is read, and half surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:              # a byte that is not UTF-8, as surrogateescape keeps it
        return f"\\x{code - 0xDC00:02x}"
    return {9: "\\t", 10: "\\n", 13: "\\r"}.get(code) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def printable(text: object) -> str:
    """`text` with control, bidirectional and undecodable characters escaped: safe to show on a terminal, on one line."""
    text = str(text)
    return text if text.isprintable() else _UNPRINTABLE.sub(_escape, text)      # most texts are, which is soon seen


@dataclass(frozen=True)
class Typed:
    """A metadata value with its GGUF type, for writing: `Typed("u64", 5)`, `Typed("str[]", ["a", "b"])`."""

    type: str
    value: Any


class StringArray(Sequence[str]):
    """The strings of a metadata array, decoded when asked for. Bytes that are not UTF-8 survive as lone surrogates.

    `buffer[starts[i] + prefix : starts[i + 1]]` are the bytes of string i; `starts` is int64 of length n + 1.
    """

    def __init__(self, buffer: Any, start: int, end: int, count: int, order: str, prefix: int) -> None:
        self.buffer, self.start, self.end, self.order, self.prefix = buffer, start, end, order, prefix
        self._count = count
        self._starts: np.ndarray | None = None

    @property
    def starts(self) -> np.ndarray:
        if self._starts is None:
            starts = np.empty(self._count + 1, np.int64)
            scan_strings(self.buffer, self.start, self.end, self._count, self.order, self.prefix, self.end, starts)
            self._starts = starts
        return self._starts

    def encoded(self) -> bytes:
        """The strings as they lie in the file, length fields included."""
        return bytes(self.buffer[self.start:self.end])

    def bytes_at(self, i: int) -> bytes:
        return bytes(self.buffer[int(self.starts[i]) + self.prefix:int(self.starts[i + 1])])

    def tolist(self) -> list[str]:
        return self._list(0, self._count)

    def runs(self, n: int = 1 << 16) -> Iterator[list[str]]:
        """All strings, `n` at a time."""
        return (self._list(i, min(self._count, i + n)) for i in range(0, self._count, n))

    def _list(self, first: int, last: int) -> list[str]:
        edges, prefix = self.starts[first:last + 1].tolist(), self.prefix
        start = edges[0]
        data = bytes(self.buffer[start:edges[-1]])
        return [data[a - start + prefix:b - start].decode("utf-8", "surrogateescape") for a, b in zip(edges, edges[1:], strict=False)]

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(self._count))]
        k = i + self._count if i < 0 else i
        if not 0 <= k < self._count:
            raise IndexError(f"string {i} of {self._count}")
        return self.bytes_at(k).decode("utf-8", "surrogateescape")

    def __iter__(self):
        return iter(self.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and self.tolist() == list(other)

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return list, (self.tolist(),)           # what is pickled or copied is a list

    def __repr__(self) -> str:
        shown = ", ".join(repr(s) for s in self[:3])
        return f"[{shown}{', ...' if self._count > 3 else ''}] ({self._count} strings)"


def scan_strings(buffer: Any, pos: int, end: int, count: int, order: str, prefix: int, limit: int, starts: np.ndarray | None = None) -> int:
    """Walk `count` strings from buffer[pos], none reaching past `end`; fill `starts` (count + 1 positions of length fields).

    Returns the position after the last, or -1 - position of the first string that is longer than `limit` or does not fit.
    """
    if lib is not None:
        into = ffi.cast("int64_t *", starts.ctypes.data) if starts is not None else ffi.NULL
        return lib.pyg_scan_strings(ffi.from_buffer("uint8_t[]", buffer), pos, end, count, prefix == 8, order == ">", limit, into)
    length_at = struct.Struct(order + ("Q" if prefix == 8 else "I")).unpack_from
    for i in range(count):
        if end - pos < prefix:
            return -pos - 1
        length = length_at(buffer, pos)[0]
        if length > limit or length > end - pos - prefix:
            return -pos - 1
        if starts is not None:
            starts[i] = pos
        pos += prefix + length
    if starts is not None:
        starts[count] = pos
    return pos


# ---- writing ----------------------------------------------------------------------------------------------------------------

def typed(value: Any) -> Typed:
    """`value` with its natural GGUF type: bool, u32 (i32, i64, u64 where it does not fit), f32, str, and arrays of one of them.

    Arrays of integers are i32 where they fit, as llama.cpp writes token types. numpy arrays keep their dtype.
    """
    if isinstance(value, Typed):
        return value
    if isinstance(value, bool | np.bool_):
        return Typed("bool", bool(value))
    if isinstance(value, np.generic):
        return Typed(_name_of_dtype(value.dtype), value.item())
    if isinstance(value, int):
        return Typed(_integer_type([value], ("u32", "i32", "i64", "u64")), value)
    if isinstance(value, float):
        return Typed("f32", value)
    if isinstance(value, str | bytes):
        return Typed("str", value)
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return Typed(_name_of_dtype(value.dtype) + "[]", value)
    if isinstance(value, StringArray):
        return Typed("str[]", value)
    if isinstance(value, Sequence | np.ndarray):
        return _typed_list(list(value))
    raise PyggmlError(f"a metadata value cannot be a {type(value).__name__}; use a number, text, or a list of one of them")


def typed_values(kv: Mapping[str, Any]) -> dict[str, Typed]:
    """Every value with its type; one that has none is named by its key."""
    values = {}
    for key, value in kv.items():
        try:
            values[key] = typed(value)
        except PyggmlError as error:
            raise PyggmlError(f'key "{printable(key)}": {error}') from None
    return values


# Python classes of array elements; bool stands first because it is an int too
_KINDS = ((bool, (bool, np.bool_)), (int, (int, np.integer)), (float, (float, np.floating)), (str, (str, bytes)))


def _typed_list(values: list[Any]) -> Typed:
    kinds = {next((kind for kind, classes in _KINDS if isinstance(v, classes)), list) for v in values}
    if kinds <= {int, float} and float in kinds:
        return Typed("f32[]", values)
    if kinds == {int}:
        return Typed(_integer_type(values, ("i32", "u32", "i64", "u64")) + "[]", values)
    if len(kinds) > 1:
        raise PyggmlError(f"a metadata array holds one kind of value, not {' and '.join(sorted(k.__name__ for k in kinds))}")
    if kinds == {list}:
        return Typed("arr[]", [typed(v) for v in values])
    return Typed(("bool" if kinds == {bool} else "str") + "[]", values)


def _integer_type(values: list[int], candidates: Iterable[str]) -> str:
    low, high = min(values), max(values)
    for name in candidates:
        limits = np.iinfo(VALUE_TYPE[name].dtype("<"))
        if limits.min <= low and high <= limits.max:
            return name
    raise PyggmlError(f"metadata integers have at most 64 bits; {high if high > 2 ** 64 - 1 else low} does not fit")


def _name_of_dtype(dtype: np.dtype) -> str:
    for t in VALUE_TYPES:
        if t.code and t.dtype("<") == dtype.newbyteorder("<"):
            return t.name
    raise PyggmlError(f"numpy type {dtype} has no GGUF value type; use one of {', '.join(t.name for t in VALUE_TYPES if t.code)}")


def value_type(name: str) -> ValueType:
    """The row of a scalar type or of an array's element type. PyggmlError names the known ones."""
    if name not in VALUE_TYPE:
        raise PyggmlError(f"value type {printable(name)!r} is unknown; known are {', '.join(VALUE_TYPE)} and arrays of them, such as u32[]")
    return VALUE_TYPE[name]


def encode_string(text: str | bytes, order: str) -> bytes:
    try:
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise PyggmlError(f"{printable(text[:80])!r} has half of a character (a lone surrogate); it cannot be written as UTF-8") from None
    return struct.pack(order + "Q", len(data)) + data


def encode_key(key: str, order: str) -> bytes:
    """A key as it stands before its value."""
    try:
        data = key.encode()
    except UnicodeEncodeError:
        data = b""
    if not 0 < len(data) <= MAX_KEY or 0 in data:
        raise PyggmlError(f'key "{printable(key[:80])}": a key is UTF-8 text of 1 to {MAX_KEY} bytes without NUL')
    return encode_string(data, order)


def encode(value: Typed, order: str = "<") -> bytes:
    """Type id and value as they stand in a GGUF v2 or v3 file."""
    if not value.type.endswith("[]"):
        t = value_type(value.type)
        if t is ARRAY:
            raise PyggmlError('an array is written as its element type with "[]", such as u32[]')
        return struct.pack(order + "I", t.id) + _encode_scalar(t, value.value, order)
    return struct.pack(order + "I", ARRAY.id) + _encode_array(value, order)


def _encode_scalar(t: ValueType, value: Any, order: str) -> bytes:
    if t is STRING:
        if not isinstance(value, str | bytes):
            raise PyggmlError(f"{value!r} is not text")
        return encode_string(value, order)
    if isinstance(value, bool | np.bool_) == (t is BOOL):           # Python packs anything as a bool, and a bool as a number
        try:
            return struct.pack(order + t.code, value)
        except (struct.error, OverflowError, TypeError):
            pass
    raise PyggmlError(f"{printable(json.dumps(value, default=repr))} does not fit type {t.name}; it takes {t.range}")


def _encode_array(array: Typed, order: str) -> bytes:
    t, values = value_type(array.type.removesuffix("[]")), array.value
    if not array.type.endswith("[]") or isinstance(values, str | bytes) or not isinstance(values, Sequence | np.ndarray):
        raise PyggmlError(f"{printable(repr(values))} is not a list")
    head = struct.pack(order + "IQ", t.id, len(values))
    if isinstance(values, StringArray) and t is STRING and values.order == order and values.prefix == 8:
        return head + values.encoded()
    if t is STRING:
        return head + b"".join(_encode_scalar(t, v, order) for v in values)
    if t is ARRAY:
        return head + b"".join(_encode_array(typed(v), order) for v in values)
    if isinstance(values, np.ndarray):
        with np.errstate(all="ignore"):
            exact = values.astype(t.dtype(order))
        lost = exact != values if exact.dtype.kind in "iu" else np.isinf(exact) & np.isfinite(values) if exact.dtype.kind == "f" else False
        if (values.dtype.kind == "b") != (t is BOOL) or np.any(lost):
            raise PyggmlError(f"the array's values do not fit type {t.name}; it takes {t.range}")
        return head + exact.tobytes()
    return head + b"".join(_encode_scalar(t, v, order) for v in values)


def encode_metadata(kv: Mapping[str, Typed], order: str = "<") -> bytes:
    """Every key with its value; a value that cannot be written is named by its key."""
    parts = []
    for key, value in kv.items():
        parts.append(encode_key(key, order))
        try:
            parts.append(encode(value, order))
        except PyggmlError as error:
            raise PyggmlError(f'key "{printable(key)}": {error}') from None
    return b"".join(parts)
