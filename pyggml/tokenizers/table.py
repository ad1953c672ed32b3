"""Long lists of texts as one buffer with offsets, and the table that finds an id by its text.

A vocabulary has up to a few hundred thousand texts. They stay in one buffer, so that building the native table needs no
Python object per token; without the native extension a dict does the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pyggml.errors import ModelError, PyggmlError
from pyggml.native import ffi, lib

MAX_BYTES = 1 << 30         # of all texts of one list: native positions are 32-bit


class Strings(Sequence[bytes]):
    """n texts: the i-th is `buffer[offsets[i] + prefix:offsets[i + 1]]`. buffer: bytes; offsets: int64 (n + 1,), rising.

    With a prefix of 8 (each text's length) this is an array of strings as it lies in a GGUF file.
    """

    def __init__(self, buffer: bytes, offsets: np.ndarray, prefix: int = 0) -> None:
        self.buffer, self.offsets, self.prefix = buffer, np.ascontiguousarray(offsets, np.int64), prefix
        if len(buffer) > MAX_BYTES:
            raise ModelError(f"{len(self)} texts of the vocabulary take {len(buffer)} bytes, more than {MAX_BYTES}; it is damaged")

    def sizes(self) -> np.ndarray:
        """Bytes of each text, int64 (n,)."""
        return np.diff(self.offsets) - self.prefix

    def native(self) -> tuple[Any, Any, int, int]:
        """The arguments (bytes, offsets, prefix, n) of a C function. They point into this object."""
        return ffi.from_buffer("char[]", self.buffer), ffi.cast("int64_t *", self.offsets.ctypes.data), self.prefix, len(self)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(f"no text {i} among {len(self)}")
        return self.buffer[self.offsets[i] + self.prefix:self.offsets[i + 1]]

    def tolist(self) -> list[bytes]:
        ends = self.offsets.tolist()
        return [self.buffer[a + self.prefix:b] for a, b in zip(ends, ends[1:], strict=False)]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.tolist())


def strings(texts: Any, name: str) -> Strings:
    """Any sequence of str (surrogateescape for bytes that are no UTF-8) or bytes as Strings; `name` is for the error."""
    if isinstance(texts, Strings):
        return texts
    if hasattr(texts, "encoded") and hasattr(texts, "starts"):          # a file's string array: its bytes serve as they are
        return Strings(texts.encoded(), texts.starts - texts.start, texts.prefix)
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
        raise ModelError(f"{name} is {type(texts).__name__}, not a list of texts; the vocabulary is damaged")
    texts = list(texts)
    try:
        joined = "".join(texts).encode("utf-8", "surrogateescape")
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        # Character i starts at the i-th byte that continues no other: true unless an escaped byte looks like a continuation.
        starts = np.append(np.flatnonzero((np.frombuffer(joined, np.uint8) & 0xC0) != 0x80), len(joined))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        if offsets[-1] == len(starts) - 1:
            return Strings(joined, starts[offsets])
    except (TypeError, UnicodeEncodeError):
        pass                                        # bytes among them, or something that is no text: one by one
    encoded = []
    for i, text in enumerate(texts):
        if isinstance(text, str):
            text = text.encode("utf-8", "surrogateescape")
        if not isinstance(text, bytes):
            raise ModelError(f"{name}: entry {i} is {type(text).__name__}, not a text; the vocabulary is damaged")
        encoded.append(text)
    return Strings(b"".join(encoded), np.concatenate([[0], np.cumsum([len(text) for text in encoded], dtype=np.int64)]))


class NativeTable:
    """text -> id in C. `pointer` is the pyg_table."""

    def __init__(self, texts: Strings, byte_level: bool = False) -> None:
        duplicate = ffi.new("int32_t *")
        self.pointer = ffi.gc(lib.pyg_table_new(*texts.native(), int(byte_level), duplicate), lib.pyg_table_free)
        if self.pointer == ffi.NULL:
            raise PyggmlError(f"no memory for a vocabulary of {len(texts)} tokens")
        self.duplicate = int(duplicate[0])

    def find(self, text: bytes) -> int:
        """The id, or -1."""
        return int(lib.pyg_table_find(self.pointer, text, len(text)))


class PythonTable:
    """The same with a dict."""

    def __init__(self, texts: Strings) -> None:
        self.ids: dict[bytes, int] = {}
        self.duplicate = -1
        for id, text in enumerate(texts):
            if self.ids.setdefault(text, id) != id and self.duplicate < 0:
                self.duplicate = id

    def find(self, text: bytes) -> int:
        return self.ids.get(text, -1)


Table = NativeTable | PythonTable


def make_table(texts: Strings) -> tuple[Table, int]:
    """A table of the texts, and the first id whose text an earlier one has (-1: none)."""
    table = NativeTable(texts) if lib else PythonTable(texts)
    return table, table.duplicate
