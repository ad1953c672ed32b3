"""Merging adjacent symbols into tokens, which SentencePiece's BPE and byte-level BPE share: native, and its twin in Python.

A word starts as one symbol per character (or byte). The best pair of neighbours is merged until none is left: the one whose
token has the highest score (SPM) or whose merge has the lowest rank (BPE), the leftmost among equals. Symbols that are no
token fall back to one token per byte. native/tokenize.c is the fast one; both give the same ids.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np

from pyggml.errors import PyggmlError
from pyggml.native import ffi, lib
from pyggml.tokenizers.table import NativeTable, Strings, Table

MAX_BYTES = 2**31 - 1024        # of one text: positions are 32-bit
WHOLE_WORDS = ("never", "always", "newlines")       # which words that are tokens are those tokens; the order is native/api.h's


def _byte_alphabet() -> dict[int, int]:
    """GPT-2's alphabet, byte -> code point: printable bytes stand for themselves, the others are U+0100 on, in order."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {byte: byte if byte in shown else next(others) for byte in range(256)}


BYTE_CHARS = _byte_alphabet()
CHAR_BYTES = {char: byte for byte, char in BYTE_CHARS.items()}


def from_byte_alphabet(text: bytes) -> bytes | None:
    """The bytes that a text in GPT-2's alphabet stands for, or None if it has another character."""
    try:
        return bytes(CHAR_BYTES[ord(char)] for char in text.decode())
    except (KeyError, UnicodeDecodeError):
        return None


def char_size(text: bytes, at: int) -> int:
    """Bytes of the UTF-8 character at text[at]: fewer than its first byte promises where it is cut short."""
    promised = 1 if text[at] < 0xC0 else 2 if text[at] < 0xE0 else 3 if text[at] < 0xF0 else 4
    size = 1
    while size < promised and at + size < len(text) and text[at + size] & 0xC0 == 0x80:
        size += 1
    return size


class NativeMerger:
    """Merging in C. Made by `spm_merger` or `bpe_merger`."""

    def __init__(self, pointer: object, table: NativeTable) -> None:
        if pointer == ffi.NULL:
            raise PyggmlError("no memory for the tokenizer's tables")
        self._pointer, self._table = ffi.gc(pointer, lib.pyg_merger_free), table

    def encode(self, text: bytes, words: np.ndarray | None = None) -> list[int]:
        """The ids of `text`. words: lengths in characters, int32 (n,), in order; None: the merger finds the words (SPM)."""
        _check_size(text)
        words = np.zeros(0, np.int32) if words is None else words
        ids = np.empty(len(text) + 1, np.int32)
        n = lib.pyg_merge(self._pointer, text, len(text), ffi.cast("int32_t *", words.ctypes.data), len(words),
                          ffi.cast("int32_t *", ids.ctypes.data))
        if n < 0:
            raise PyggmlError(f"no memory to tokenize {len(text)} bytes at once")
        return ids[:n].tolist()


class PythonMerger:
    """The same in Python.

    scores: SPM, the score of each token. merges: BPE, (left id, right id) -> (rank, merged id); ids from n_vocab on are texts
    that occur in merges and are no token. symbols: text -> id.
    """

    def __init__(self, symbols: dict[bytes, int], n_vocab: int, fallback: Sequence[int], *, by_char: bool, whole_words: str = "never",
                 scores: np.ndarray | None = None, merges: dict[tuple[int, int], tuple[int, int]] | None = None) -> None:
        self.symbols, self.n_vocab, self.fallback = symbols, n_vocab, fallback
        self.by_char, self.whole_words, self.scores, self.merges = by_char, whole_words, scores, merges

    def encode(self, text: bytes, words: np.ndarray | None = None) -> list[int]:
        _check_size(text)
        ids: list[int] = []
        for word in [text] if words is None else _cut(text, words.tolist()):
            ids += self._word(word)
        return ids

    def _best(self, text: bytes, left: int, right: int) -> tuple[float, int] | None:
        """(how good, merged id) of merging two ids whose texts join to `text`, or None. Smaller is better."""
        if self.merges is not None:
            return self.merges.get((left, right))
        assert self.scores is not None
        id = self.symbols.get(text)
        return None if id is None else (-float(self.scores[id]), id)

    def _word(self, word: bytes) -> Iterable[int]:
        whole = self.whole_words == "always" or self.whole_words == "newlines" and not word.strip(b"\n")
        if whole and -1 < self.symbols.get(word, -1) < self.n_vocab:
            return [self.symbols[word]]
        parts: list[bytes | None] = []             # None: merged into its left neighbour
        at = 0
        while at < len(word):
            size = char_size(word, at) if self.by_char else 1
            parts.append(word[at:at + size])
            at += size
        ids = [self.symbols.get(part, -1) for part in parts if part is not None]
        before, after = [i - 1 for i in range(len(parts))], [i + 1 for i in range(len(parts))]
        heap: list[tuple[float, int, int, bytes, int]] = []     # how good, left, right, text, merged id

        def consider(left: int, right: int) -> None:
            if left < 0 or right >= len(parts):
                return
            text = (parts[left] or b"") + (parts[right] or b"")
            best = self._best(text, ids[left], ids[right])
            if best is not None:
                heapq.heappush(heap, (best[0], left, right, text, best[1]))

        for i in range(1, len(parts)):
            consider(i - 1, i)
        while heap:
            _, left, right, text, merged = heapq.heappop(heap)
            if parts[left] is None or parts[right] is None or len(parts[left] or b"") + len(parts[right] or b"") != len(text):
                continue
            parts[left], ids[left], parts[right] = text, merged, None
            after[left] = after[right]
            if after[right] < len(parts):
                before[after[right]] = left
            consider(before[left], left)
            consider(left, after[left])
        out: list[int] = []
        for part, id in zip(parts, ids, strict=True):
            if part is None:
                continue
            if 0 <= id < self.n_vocab:
                out.append(id)
            else:
                out += [self.fallback[byte] for byte in part if self.fallback[byte] >= 0]
        return out


Merger = NativeMerger | PythonMerger


def spm_merger(table: Table, scores: np.ndarray, fallback: Sequence[int]) -> Merger:
    """Merging by score. table: text -> id; scores float32 (n,); fallback: the token of each byte, or -1."""
    if isinstance(table, NativeTable):
        pointer = lib.pyg_merger_spm(table.pointer, ffi.cast("float *", scores.ctypes.data), ffi.new("int32_t[256]", fallback))
        return NativeMerger(pointer, table)
    return PythonMerger(table.ids, len(table.ids), fallback, by_char=True, scores=scores)


def bpe_merger(tokens: Strings, merges: Strings, fallback: Sequence[int], *, byte_level: bool, whole_words: str, native: bool) -> Merger:
    """Merging by rank. merges: `left right`, the best first; byte_level: tokens and merges are in GPT-2's byte alphabet.

    whole_words: which words that are tokens are those tokens, whatever the merges say: one of WHOLE_WORDS.
    """
    if native:
        table = NativeTable(tokens, byte_level)
        pointer = lib.pyg_merger_bpe(table.pointer, *merges.native(), int(byte_level), WHOLE_WORDS.index(whole_words),
                                     ffi.new("int32_t[256]", fallback))
        return NativeMerger(pointer, table)
    spell = from_byte_alphabet if byte_level else bytes
    symbols: dict[bytes, int] = {}
    for id, token in enumerate(tokens):
        if text := spell(token):
            symbols.setdefault(text, id)
    n_vocab = next_id = len(tokens)
    ranks: dict[tuple[int, int], tuple[int, int]] = {}
    for rank, merge in enumerate(merges):
        space = merge.find(b" ", 1)
        if space < 0:
            continue
        left, right = spell(merge[:space]), spell(merge[space + 1:])
        if not left or not right:
            continue
        for text in (left, right, left + right):
            if symbols.setdefault(text, next_id) == next_id:
                next_id += 1
        ranks.setdefault((symbols[left], symbols[right]), (rank, symbols[left + right]))
    return PythonMerger(symbols, n_vocab, fallback, by_char=not byte_level, whole_words=whole_words, merges=ranks)


def _cut(text: bytes, lengths: Iterable[int]) -> Iterable[bytes]:
    """The words of UTF-8 `text`, given their lengths in characters."""
    chars = text.decode("utf-8", "surrogatepass")
    at = 0
    for length in lengths:
        yield chars[at:at + length].encode("utf-8", "surrogatepass")
        at += length


def _check_size(text: bytes) -> None:
    if len(text) > MAX_BYTES:
        raise PyggmlError(f"a text of {len(text)} bytes is too long to tokenize at once; the limit is {MAX_BYTES}: cut it")
