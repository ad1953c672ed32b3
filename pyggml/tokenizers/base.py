"""What every tokenizer does alike: cutting special tokens out of text, adding them, and turning ids back into bytes and text."""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from pyggml.errors import PyggmlError
from pyggml.tokenizers.vocab import Attr, Vocab

_SPACE_BYTES = b" \t\n\v\f\r"
_HIDDEN = Attr.UNKNOWN | Attr.CONTROL             # left out of text unless asked for
SPACE = "\u2581".encode()                         # SentencePiece's visible space


class Tokenizer(ABC):
    """Text to ids and back, for one file's vocabulary. Subclasses say how plain text is encoded and how a token is spelled.

    bos, eos, eot, eom, unk, sep, pad, mask, nl, fim_*: ids or None; eog: the ids that end a generation.
    """

    SPECIAL: ClassVar[Mapping[str, int]] = {}     # ids that hold where the file names none
    OPTIONS: ClassVar[Mapping[str, bool]] = {}    # likewise for add_bos and its like

    bos: int | None
    eos: int | None
    eot: int | None
    eom: int | None
    unk: int | None
    sep: int | None
    pad: int | None
    mask: int | None
    fim_pre: int | None
    fim_suf: int | None
    fim_mid: int | None

    def __init__(self, kv: Mapping[str, Any]) -> None:
        self.vocab = Vocab(kv, self.SPECIAL, self.defaults(kv))
        for name, id in self.vocab.special.items():
            setattr(self, name, id)
        self.options = self.vocab.options
        self.n_vocab, self.eog = len(self.vocab), self.vocab.eog
        for id in self.vocab.ids_with(Attr.BYTE):
            self.vocab.byte_value(id)             # damaged byte tokens are found here, not in the middle of a text
        self._cutters = {parse: SpecialCutter(self.vocab, parse) for parse in (False, True)}
        self._spelled: dict[int, bytes] = {}        # not an lru_cache: one of a method holds its object, and so the file, until garbage is collected
        self._build()
        self.nl = self._newline()

    def defaults(self, kv: Mapping[str, Any]) -> Mapping[str, bool]:
        """The options' defaults for this file."""
        return self.OPTIONS

    @abstractmethod
    def _build(self) -> None:
        """Make what `_encode_text` needs."""

    @abstractmethod
    def _encode_text(self, text: bytes, after_special: bool) -> list[int]:
        """The ids of plain text. after_special: nothing, or a special token, stands before it."""

    @abstractmethod
    def _spell(self, text: bytes) -> bytes:
        """The bytes that a normal token of this stored text stands for."""

    # ---- encoding ------------------------------------------------------------------------------------------------------------
    def encode(self, text: str | bytes, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of `text`.

        add_special: with the tokens that the vocabulary wants before and after a text. parse_special: texts of control
        tokens become those tokens; otherwise they are plain text. A byte that is no UTF-8 is taken as it is by vocabularies
        that have byte tokens, as U+FFFD by byte-level BPE.
        """
        if isinstance(text, str):
            text = text.encode("utf-8", "surrogatepass")
        ids = self._first() if add_special else []
        after_special = True
        for part in self._cutters[parse_special].cut(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encode_text(part, after_special)
            after_special = isinstance(part, int)
        if add_special:
            ids += self._last()
        return ids

    def _first(self) -> list[int]:
        return [self.bos] if self.options.get("add_bos") and self.bos is not None else []

    def _last(self) -> list[int]:
        return [self.eos] if self.options.get("add_eos") and self.eos is not None else []

    def _newline(self) -> int | None:
        ids = self._encode_text(b"\n", False)
        return ids[0] if ids else self.pad

    # ---- decoding ------------------------------------------------------------------------------------------------------------
    def piece(self, id: int) -> bytes:
        """The bytes of a token."""
        known = self._spelled.get(id)
        if known is None:
            known = self._spelled[id] = self._piece(id)
        return known

    def _piece(self, id: int) -> bytes:
        attr = self._attr(id)
        if attr & (_HIDDEN | Attr.USER_DEFINED):
            return self.vocab.tokens[id]
        if attr & Attr.NORMAL:
            return self._spell(self.vocab.tokens[id])
        return bytes([self.vocab.byte_value(id)]) if attr & Attr.BYTE else b""

    def decode(self, ids: Sequence[int], *, remove_special: bool = False, unparse_special: bool = True) -> bytes:
        """The bytes of a whole text. remove_special: without the bos and eos that `encode` added; unparse_special: control
        tokens as their texts. A space that `encode` put before the text is removed."""
        ids = list(ids)
        strip = self.options.get("add_space_prefix", False)
        if remove_special and self.options.get("add_bos") and ids[:1] == [self.bos]:
            strip, ids = False, ids[1:]
        if remove_special and self.options.get("add_eos") and ids[-1:] == [self.eos]:
            ids = ids[:-1]
        pieces = [self.piece(id) if unparse_special or not self.is_control(id) else b"" for id in ids]
        if strip and pieces and pieces[0][:1] == b" ":
            pieces[0] = pieces[0][1:]
        text = b"".join(pieces)
        return clean_spaces(text) if self.options.get("clean_spaces") else text

    def is_control(self, id: int) -> bool:
        """Whether the token is no text of its own: control tokens and the unknown token."""
        return bool(self._attr(id) & _HIDDEN)

    def _attr(self, id: int) -> int:
        if not 0 <= id < self.n_vocab:
            raise PyggmlError(f"token {id} is outside the vocabulary of {self.n_vocab}")
        return int(self.vocab.attrs[id])


class SpecialCutter:
    """Cuts the texts of special tokens out of a text: the longest token first, everywhere, then the next one in what is left.

    User-defined tokens are always cut out; control tokens and the unknown token only when `parse` is set.
    """

    def __init__(self, vocab: Vocab, parse: bool) -> None:
        ids = vocab.ids_with(Attr.USER_DEFINED | (_HIDDEN if parse else 0))
        if not parse:
            ids = [id for id in ids if not vocab.attrs[id] & _HIDDEN]
        tokens = [(vocab.tokens[id], id) for id in ids]
        self.attrs = vocab.attrs
        self.tokens = dict(sorted(tokens, key=lambda token: -len(token[0])))
        self.rank = {text: i for i, text in enumerate(self.tokens)}
        self.lengths: dict[int, list[int]] = {}    # first byte -> lengths of the tokens that start with it
        for text in self.tokens:
            lengths = self.lengths.setdefault(text[0], [])
            if len(text) not in lengths:
                lengths.append(len(text))
        first = b"".join(b"\\x%02x" % byte for byte in sorted(self.lengths))
        self.starts = re.compile(b"[" + first + b"]") if first else None

    def cut(self, text: bytes) -> Iterator[bytes | int]:
        """The parts of `text` in order: plain text as bytes (never empty), special tokens as ids."""
        parts: list[bytes | int] = [text] if text else []
        for token in sorted(self._present(text), key=self.rank.__getitem__):
            parts = [part for old in parts for part in (self._cut_one(old, token) if isinstance(old, bytes) else [old])]
        return iter(parts)

    def _present(self, text: bytes) -> set[bytes]:
        """The special tokens that occur in the text: one pass, however many special tokens there are."""
        if self.starts is None:
            return set()
        found: set[bytes] = set()
        for match in self.starts.finditer(text):
            at = match.start()
            for length in self.lengths[text[at]]:
                if (candidate := text[at:at + length]) in self.tokens:
                    found.add(candidate)
        return found

    def _cut_one(self, text: bytes, token: bytes) -> list[bytes | int]:
        id = self.tokens[token]
        attr = self.attrs[id]
        parts: list[bytes | int] = []
        between = text.split(token)
        last = len(between) - 1
        for i, part in enumerate(between):
            if attr & Attr.LSTRIP and i < last:
                part = part.rstrip(_SPACE_BYTES)
            if attr & Attr.RSTRIP and i > 0:
                part = part.lstrip(_SPACE_BYTES)
            if part:
                parts.append(part)
            if i < last:
                parts.append(id)
        return parts


_CLEAN = ((re.compile(rb" ([?!.,])"), rb"\1"), (re.compile(rb" ' "), b"'"), (re.compile(rb" ('(?:[sm]|re|ve))"), rb"\1"))


def clean_spaces(text: bytes) -> bytes:
    """Close up the spaces before punctuation and English contractions, as tokenizers with `clean_up_tokenization_spaces` do."""
    for pattern, replacement in _CLEAN:
        text = pattern.sub(replacement, text)
    return text


class StreamDecoder:
    """Text of a stream of ids. A character whose bytes come in several tokens is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer, *, unparse_special: bool = False, strip_space: bool = False) -> None:
        """unparse_special: control tokens as their texts. strip_space: the text starts here, so that the space which a
        vocabulary puts before a text is left out."""
        self._tokenizer, self._show = tokenizer, unparse_special
        self._strip = strip_space and tokenizer.options.get("add_space_prefix", False)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """The text that has become certain with this id; "" while a character is incomplete."""
        if not self._show and self._tokenizer.is_control(id):
            return ""
        piece = self._tokenizer.piece(id)
        if self._strip:
            piece = piece[1:] if piece[:1] == b" " else piece
            self._strip = False
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """The text still held back: U+FFFD if a character never became whole. The decoder is then at a start again."""
        return self._utf8.decode(b"", final=True)
