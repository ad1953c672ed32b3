"""From generated tokens to text: stop strings, whole characters, log-probabilities per token."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyggml.errors import ParameterError
from pyggml.sampling import top_logprobs


class TextBuffer:
    """Bytes in, text out as soon as it is certain: neither a part of a character nor what may yet become a stop string gets out."""

    def __init__(self, stops: Sequence[bytes] = ()) -> None:
        self.stops = [stop for stop in stops if stop]
        self.stopped = False
        self._held = b""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, piece: bytes) -> str:
        """The text that `piece` makes certain; the text before a stop string once one is complete (`stopped` is then set)."""
        self._held += piece
        found = [at for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = self._held[:min(found)]
            return self.flush()
        certain = len(self._held) - max((self._begun(stop) for stop in self.stops), default=0)
        ready, self._held = self._held[:certain], self._held[certain:]
        return self._utf8.decode(ready)

    def flush(self) -> str:
        """What is still held back; a character that never became whole is U+FFFD."""
        ready, self._held = self._held, b""
        return self._utf8.decode(ready, final=True)

    def _begun(self, stop: bytes) -> int:
        """How many bytes at the end may be the beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


def stop_strings(stop: str | Iterable[str] | None) -> list[bytes]:
    """The user's `stop`, a string or several, as bytes."""
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    for s in stops:
        if not isinstance(s, str):
            raise ParameterError(f"stop holds {s!r}; use strings")
    return [s.encode() for s in stops]


# ---- log-probabilities ----

@dataclass
class TokenLogprobs:
    """One token of a `logprobs` answer. `logprob` and `top` are None for the first token of all, which nothing predicts."""

    token: str
    offset: int                         # characters of the text, prompt included, before it
    logprob: float | None = None
    top: dict[str, float] | None = None

    @classmethod
    def of(cls, pieces: Pieces, token: int, offset: int, logits: np.ndarray | None, n: int) -> TokenLogprobs:
        """logits: float32 (n_vocab) that predicted `token`; n: how many alternatives to name (the token itself is always there)."""
        if logits is None:
            return cls(pieces.text(token), offset)
        logprob, best = top_logprobs(logits, token, n)
        top = {pieces.text(other): value for other, value in best}
        return cls(pieces.text(token), offset, logprob, {**top, pieces.text(token): logprob})


class Pieces:
    """The bytes and readable texts of a tokenizer's tokens; control tokens have no bytes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def bytes(self, token: int) -> bytes:
        return b"" if self._tokenizer.is_control(token) else self._tokenizer.piece(token)

    def text(self, token: int) -> str:
        """A name for the token: bytes that are no text of their own are written as \\xNN."""
        return self._tokenizer.piece(token).decode("utf-8", "backslashreplace")


def prompt_logprobs(pieces: Pieces, tokens: Sequence[int], rows: Iterable[np.ndarray], n: int, end: int) -> list[TokenLogprobs]:
    """Entries for a prompt of `end` characters. rows: float32 (n_vocab) logits after each token, each read before the next is asked for.

    Offsets are counted from the end, as the first token may begin with a space that is not in the text.
    """
    entries: list[TokenLogprobs] = []
    lengths = [len(pieces.bytes(token).decode("utf-8", "ignore")) for token in tokens]
    offset, before = end - sum(lengths), None
    for token, length, row in zip(tokens, lengths, rows, strict=True):
        if pieces.bytes(token):             # bos and its like are no part of the text
            entries.append(TokenLogprobs.of(pieces, token, max(0, offset), before, n))
        offset += length
        before = row.copy()
    return entries


# ---- a completion under way ----

@dataclass
class Part:
    """Text that became certain, with the tokens it is made of; the last one has a finish reason and maybe no text."""

    text: str = ""
    entries: list[TokenLogprobs] = field(default_factory=list)
    n_tokens: int = 0
    finish_reason: str | None = None


def parts(generated: Iterable[tuple[int, np.ndarray]], pieces: Pieces, eog: Iterable[int], stops: Sequence[bytes], max_tokens: int,
          n_logprobs: int | None, start: int) -> Iterator[Part]:
    """Cut generated (token, logits that predicted it) into parts, up to a stop string, an end token or `max_tokens`.

    n_logprobs: alternatives to name for each token, None for no log-probabilities at all. start: characters of the prompt.
    """
    buffer, ends = TextBuffer(stops), frozenset(eog)
    characters = codecs.getincrementaldecoder("utf-8")("replace")       # counts where a token starts, held back or not
    offset = shown = start
    part, finish = Part(), "stop"
    for n_tokens, (token, logits) in enumerate(generated, 1):
        if token in ends:
            break
        part.n_tokens += 1
        piece = pieces.bytes(token)
        if n_logprobs is not None:
            part.entries.append(TokenLogprobs.of(pieces, token, offset, logits, n_logprobs))
            offset += len(characters.decode(piece))
        part.text += buffer.push(piece)
        if buffer.stopped:
            break
        if n_tokens >= max_tokens:
            finish = "length"
            break
        if part.text:
            shown += len(part.text)
            yield part
            part = Part()
    part.text += buffer.flush()
    part.entries = [e for e in part.entries if e.offset < shown + len(part.text)]      # not those behind a stop string
    part.finish_reason = finish
    yield part


def join(parts: Iterable[Part]) -> Part:
    """All parts as one."""
    whole = Part()
    for part in parts:
        whole.text += part.text
        whole.entries += part.entries
        whole.n_tokens += part.n_tokens
        whole.finish_reason = part.finish_reason
    return whole
