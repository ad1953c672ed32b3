"""SentencePiece's unigram model (`tokenizer.ggml.model` = "t5"): the sequence of pieces with the highest sum of scores.

Text is first normalized by the file's own table of replacements (`precompiled_charsmap`), a double-array trie from byte strings to
strings. The best pieces are found by dynamic programming over the characters (Viterbi), one word at a time where no piece
spans words.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from pyggml.errors import ModelError
from pyggml.tokenizers.base import SPACE, Tokenizer
from pyggml.tokenizers.merge import char_size
from pyggml.tokenizers.vocab import PREFIX, Attr, Vocab

UNKNOWN_PENALTY = np.float32(10)        # an unknown character costs this much more than the rarest piece
_MARK = SPACE.decode()


class Unigram(Tokenizer):
    SPECIAL = {"eos": 1, "unk": 2, "pad": 0}
    OPTIONS = {"add_bos": False, "add_eos": True, "add_space_prefix": False, "remove_extra_whitespaces": False}

    def _build(self) -> None:
        vocab = self.vocab
        self._replacements = CharsMap(vocab)
        ids = vocab.ids_with(Attr.NORMAL | Attr.USER_DEFINED | Attr.UNUSED)
        self._scores: dict[str, tuple[float, int]] = {}
        self._prefixes: set[str] = set()
        for id in ids:
            text = vocab.tokens[id].decode("utf-8", "surrogateescape")
            self._scores[text] = (0.0 if vocab.attrs[id] & Attr.USER_DEFINED else float(vocab.scores[id]), id)
            self._prefixes.update(text[:n] for n in range(1, len(text) + 1))
        normal = vocab.scores[vocab.ids_with(Attr.NORMAL)]
        self._unknown_score = float((normal.min() if len(normal) else np.float32(0)) - UNKNOWN_PENALTY)
        self._word_by_word = not any(_MARK in text[1:] for text in self._scores)
        self._best = lru_cache(maxsize=1 << 16)(self._best_pieces)

    def _encode_text(self, text: bytes, after_special: bool) -> list[int]:
        chars = self._spaced(self._replacements.normalize(text)).decode("utf-8", "surrogateescape")
        ids: list[int] = []
        for word in self._split(chars):
            for id in self._best(word):
                if not (id == self.unk and ids and ids[-1] == id):     # unknown characters in a row are one unknown token
                    ids.append(id)
        return ids

    def _spaced(self, text: bytes) -> bytes:
        if self.options["remove_extra_whitespaces"]:
            return b"".join(SPACE + word for word in text.split(b" ") if word)
        rest = text.lstrip(b" ")
        prefix = SPACE if self.options["add_space_prefix"] and rest else b""
        return text[:len(text) - len(rest)].replace(b" ", SPACE) + prefix + rest.replace(b" ", SPACE)

    def _split(self, chars: str) -> list[str]:
        if not self._word_by_word or not chars:
            return [chars] if chars else []
        first, *others = chars.split(_MARK)
        return [*([first] if first else []), *(_MARK + word for word in others)]

    def _best_pieces(self, word: str) -> tuple[int, ...]:
        n = len(word)
        unknown = -1 if self.unk is None else self.unk
        best: list[tuple[float, int, int]] = [(float("-inf"), 0, unknown)] * (n + 1)      # per end: score, start, id of the last piece
        best[0] = (0.0, 0, unknown)
        for start in range(n):
            score = best[start][0]
            alone = False               # whether the character at start is a piece by itself
            for end in range(start + 1, n + 1):
                piece = word[start:end]
                if piece not in self._prefixes:
                    break
                if piece in self._scores:
                    alone |= end == start + 1
                    gain, id = self._scores[piece]
                    if score + gain > best[end][0]:
                        best[end] = (score + gain, start, id)
            if not alone and score + self._unknown_score > best[start + 1][0]:
                best[start + 1] = (score + self._unknown_score, start, unknown)
        ids, end = [], n
        while end:
            _, end, id = best[end]
            if id >= 0:
                ids.append(id)
        return tuple(reversed(ids))

    def _spell(self, text: bytes) -> bytes:
        return text.replace(SPACE, b" ")


class CharsMap:
    """SentencePiece's precompiled normalization: the longest prefix of the text that the table has is replaced.

    The blob is the byte length of the trie (uint32), the trie (uint32 entries), and zero-terminated replacements. The trie is
    darts-clone's double array: an entry has its label in bits 0-7 and bit 31, a has-value flag in bit 8, and an offset in bits 10-30
    that bit 9 scales by 256; the child by byte c of node i is at (i ^ offset(i)) ^ c, a value at (i ^ offset(i)).
    """

    def __init__(self, vocab: Vocab) -> None:
        self._units: list[int] = []
        self._strings = b""
        value: Any = vocab.kv.get(PREFIX + "precompiled_charsmap")
        if value is None:
            return
        array = np.asarray(value)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ModelError(f"{PREFIX}precompiled_charsmap holds {array.dtype} values, not bytes; the vocabulary is damaged")
        blob = array.astype(np.uint8).tobytes()
        size = int.from_bytes(blob[:4], "little")
        if len(blob) < 4 or size % 4 or size + 4 >= len(blob):
            raise ModelError(f"{PREFIX}precompiled_charsmap says its trie has {size} bytes, but is {len(blob)} bytes long; "
                             "the vocabulary is damaged")
        self._units = np.frombuffer(blob, "<u4", size // 4, 4).tolist()
        self._strings = blob[4 + size:]

    def normalize(self, text: bytes) -> bytes:
        """The text with every replacement made, and U+FFFD for each byte that is no UTF-8."""
        out, at = bytearray(), 0
        while at < len(text):
            size, replacement = self._match(text, at) if self._units else (0, b"")
            if not size:
                size = char_size(text, at)
                replacement = text[at:at + size]
                try:
                    replacement.decode()
                except UnicodeDecodeError:
                    size, replacement = 1, "\ufffd".encode()
            out += replacement
            at += size
        return bytes(out)

    def _match(self, text: bytes, at: int) -> tuple[int, bytes]:
        """(bytes matched, replacement) of the longest entry that the text has at this place; 0 bytes: none."""
        found: tuple[int, bytes] = (0, b"")
        node = self._offset(self._unit(0))
        for end in range(at, len(text)):
            byte = text[end]
            unit = self._unit(node ^ byte) if byte else 0
            if not byte or unit & 0x800000FF != byte:
                break
            node ^= byte ^ self._offset(unit)
            if unit >> 8 & 1:
                start = self._unit(node) & 0x7FFFFFFF
                stop = self._strings.find(b"\0", start)
                if stop < 0:
                    raise ModelError(f"{PREFIX}precompiled_charsmap points to a replacement at {start}, where none is; "
                                     "the vocabulary is damaged")
                found = (end + 1 - at, self._strings[start:stop])
        return found

    def _unit(self, i: int) -> int:
        if i >= len(self._units):
            raise ModelError(f"{PREFIX}precompiled_charsmap points to entry {i} of {len(self._units)}; the vocabulary is damaged")
        return self._units[i]

    @staticmethod
    def _offset(unit: int) -> int:
        return (unit >> 10) << ((unit & 1 << 9) >> 6)
