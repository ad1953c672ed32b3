"""WordPiece (`tokenizer.ggml.model` = "bert"): words are cut into the longest pieces of the vocabulary; U+2581 marks a word's start."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import regex

from pyggml.tokenizers.base import SPACE, Tokenizer
from pyggml.tokenizers.vocab import OPTION_KEYS, PREFIX

# The blocks that BERT's tokenizer takes for Chinese: every character is a word
_CHINESE = (r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf"
            r"\U0002f800-\U0002fa1f")
_ALONE = rf"\p{{P}}!-/:-@\[-`{{-~{_CHINESE}"
_WORDS = regex.compile(rf"[{_ALONE}]|[^\s{_ALONE}]+")
_ACCENTS = regex.compile(r"\p{M}+")
_DROPPED = regex.compile(r"[[\p{Cc}\p{Cf}\p{Cs}\p{Co}\x00\ufffd]--\s]+", regex.V1)


class WordPiece(Tokenizer):
    SPECIAL = {"bos": 101, "unk": 100, "sep": 102, "pad": 0, "mask": 103}
    OPTIONS = {"add_bos": True, "add_eos": False, "add_sep": True, "add_space_prefix": False, "clean_spaces": True, "lowercase": True}

    def defaults(self, kv: Mapping[str, Any]) -> Mapping[str, bool]:
        return {**self.OPTIONS, "strip_accents": kv.get(PREFIX + OPTION_KEYS["lowercase"], True)}

    def _build(self) -> None:
        self._longest = int(self.vocab.tokens.sizes().max())
        self._pieces = lru_cache(maxsize=1 << 16)(self._cut_word)

    def _first(self) -> list[int]:
        return [] if self.bos is None else [self.bos]

    def _last(self) -> list[int]:
        return [] if self.sep is None else [self.sep]

    def _encode_text(self, text: bytes, after_special: bool) -> list[int]:
        chars = _DROPPED.sub("", text.decode("utf-8", "replace"))
        if self.options["strip_accents"]:
            chars = _ACCENTS.sub("", unicodedata.normalize("NFD", chars))
        if self.options["lowercase"]:
            chars = "".join(map(str.lower, chars)) if "Σ" in chars else chars.lower()       # a final sigma is none of ours
        return [id for word in _WORDS.findall(chars) for id in self._pieces(word)]

    def _cut_word(self, word: str) -> tuple[int, ...]:
        """The longest pieces from left to right; the unknown token for a word that cannot be cut so."""
        text, ids, at = SPACE + word.encode("utf-8", "replace"), [], 0
        while at < len(text):
            for end in range(min(len(text), at + self._longest), at, -1):
                if (id := self.vocab.find(text[at:end])) is not None:
                    ids.append(id)
                    at = end
                    break
            else:
                return () if self.unk is None else (self.unk,)
        return tuple(ids)

    def _spell(self, text: bytes) -> bytes:
        return text.replace(SPACE, b" ")

    def _newline(self) -> int | None:
        return self.pad
