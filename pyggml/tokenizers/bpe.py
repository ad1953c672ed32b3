"""Byte-level BPE (`tokenizer.ggml.model` = "gpt2"): text is cut into words, and the bytes of a word merge by the rank of the merge."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from typing import Any

from pyggml.tokenizers.base import SPACE, Tokenizer
from pyggml.tokenizers.merge import CHAR_BYTES, bpe_merger
from pyggml.tokenizers.pretokenize import PreTokenizer, pre_tokenizer, words
from pyggml.tokenizers.table import NativeTable, strings
from pyggml.tokenizers.vocab import PREFIX

# A byte that is no UTF-8 counts as one U+FFFD, so that patterns can be matched
codecs.register_error("pyggml-per-byte", lambda error: ("\ufffd", error.start + 1))  # type: ignore[attr-defined]


class ByteBPE(Tokenizer):
    SPECIAL = {"bos": 11, "eos": 11}

    def _pre(self, kv: Mapping[str, Any]) -> PreTokenizer:
        return pre_tokenizer(kv.get(PREFIX + "pre"))

    def defaults(self, kv: Mapping[str, Any]) -> Mapping[str, bool]:
        self.pre = self._pre(kv)
        options = {"add_bos": False, "add_eos": False, "add_sep": False, "add_space_prefix": False, "clean_spaces": self.pre.clean_spaces}
        return options | dict.fromkeys(self.pre.adds, True)

    def _build(self) -> None:
        if self.pre.byte_level:                 # characters outside ASCII have no token of one byte to fall back to
            fallback = [self._id(bytes([byte])) if 0x21 <= byte <= 0x7E else -1 for byte in range(256)]
        else:
            fallback = [self._id(b"<0x%02X>" % byte) for byte in range(256)]
        merges = strings(self.vocab.array("merges", "byte-level BPE needs its merges"), PREFIX + "merges")
        self._merger = bpe_merger(self.vocab.tokens, merges, fallback, byte_level=self.pre.byte_level, whole_words=self.pre.whole_words,
                                  native=isinstance(self.vocab.table, NativeTable))

    def _id(self, text: bytes) -> int:
        id = self.vocab.find(text)
        return -1 if id is None else id

    def _encode_text(self, text: bytes, after_special: bool) -> list[int]:
        chars = text.decode("utf-8", "pyggml-per-byte")
        if self.pre.escape_spaces:
            chars = chars.replace(" ", SPACE.decode())
        return self._merger.encode(chars.encode(), words(chars, self.pre.patterns))

    def _spell(self, text: bytes) -> bytes:
        if self.pre.escape_spaces:
            return text.replace(SPACE, b" ")
        if not self.pre.byte_level:
            return text
        chars = text.decode("utf-8", "replace")
        return b"".join(bytes([CHAR_BYTES[ord(char)]]) if ord(char) in CHAR_BYTES else char.encode() for char in chars)


class GemmaBPE(ByteBPE):
    """Gemma 4's (`tokenizer.ggml.model` = "gemma4"): characters instead of bytes, U+2581 for a space, always a bos."""

    SPECIAL = {}

    def _pre(self, kv: Mapping[str, Any]) -> PreTokenizer:
        return pre_tokenizer("gemma4")

    def _first(self) -> list[int]:
        return [] if self.bos is None else [self.bos]
