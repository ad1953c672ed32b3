"""Answers as dicts: the shapes of the OpenAI completions and chat completions, from the parts of a completion."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pyggml.completion import Part, TokenLogprobs


def usage(n_prompt: int, n_generated: int) -> dict[str, int]:
    return {"prompt_tokens": n_prompt, "completion_tokens": n_generated, "total_tokens": n_prompt + n_generated}


def _head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """What a whole answer and all of its chunks have in common."""
    return {"id": f"{prefix}-{uuid.uuid4()}", "object": kind, "created": int(time.time()), "model": model}


class TextAnswer:
    """Dicts of the completions API."""

    def __init__(self, model: str, with_logprobs: bool) -> None:
        self._head, self._with_logprobs = _head("cmpl", "text_completion", model), with_logprobs

    def whole(self, part: Part, n_prompt: int) -> dict[str, Any]:
        return {**self._head, "choices": [self._choice(part, part.finish_reason)], "usage": usage(n_prompt, part.n_tokens)}

    def stream(self, parts: Iterable[Part]) -> Iterator[dict[str, Any]]:
        """A chunk for each part, and one without text that says why it ended."""
        for part in parts:
            if part.text:
                yield {**self._head, "choices": [self._choice(part, None)]}
            if part.finish_reason:
                yield {**self._head, "choices": [{"text": "", "index": 0, "logprobs": None, "finish_reason": part.finish_reason}]}

    def _choice(self, part: Part, finish_reason: str | None) -> dict[str, Any]:
        return {"text": part.text, "index": 0, "logprobs": self._logprobs(part.entries) if self._with_logprobs else None,
                "finish_reason": finish_reason}

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, list]:
        return {"tokens": [e.token for e in entries], "text_offset": [e.offset for e in entries],
                "token_logprobs": [e.logprob for e in entries], "top_logprobs": [e.top for e in entries]}


class ChatAnswer:
    """Dicts of the chat completions API. n_top: alternatives to name for each token, None for no log-probabilities."""

    def __init__(self, model: str, n_top: int | None) -> None:
        self._whole, self._n_top = _head("chatcmpl", "chat.completion", model), n_top
        self._chunk = {**self._whole, "object": "chat.completion.chunk"}

    def whole(self, part: Part, n_prompt: int) -> dict[str, Any]:
        choice = {"index": 0, "message": {"role": "assistant", "content": part.text}, "logprobs": self._logprobs(part.entries),
                  "finish_reason": part.finish_reason}
        return {**self._whole, "choices": [choice], "usage": usage(n_prompt, part.n_tokens)}

    def stream(self, parts: Iterable[Part]) -> Iterator[dict[str, Any]]:
        """A chunk that names the role, one for each part, and one without text that says why it ended."""
        yield self._delta({"role": "assistant"}, None, None)
        for part in parts:
            if part.text:
                yield self._delta({"content": part.text}, self._logprobs(part.entries), None)
            if part.finish_reason:
                yield self._delta({}, None, part.finish_reason)

    def _delta(self, delta: dict[str, str], logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
        return {**self._chunk, "choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}]}

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if self._n_top is None:
            return None
        return {"content": [{**_token(e.token, e.logprob), "top_logprobs": [_token(*other) for other in list((e.top or {}).items())[:self._n_top]]}
                            for e in entries], "refusal": None}


def _token(token: str, logprob: float | None) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": None}
