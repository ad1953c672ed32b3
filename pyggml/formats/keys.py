"""Metadata keys that every GGUF program knows: their types and the values that make sense. `*.` stands for the architecture's name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyggml.errors import PyggmlError
from pyggml.formats.values import Typed, printable

INT = ("u32",)
COUNT = ("u32", "i32[]", "u32[]")       # one number, or one for each layer
FLOAT = ("f32",)


@dataclass(frozen=True)
class Known:
    """A known key: the types it may have (the first is what to write) and the range of its numbers."""

    types: tuple[str, ...]
    low: float = -math.inf
    high: float = math.inf

    def problem(self, value: Typed) -> str:
        """What is wrong with a value, or ""."""
        if value.type not in self.types:
            return f"its type is {value.type}; it must be {' or '.join(self.types)}"
        if not value.type.startswith(("u", "i", "f")):
            return ""
        numbers = np.atleast_1d(value.value)
        out = np.flatnonzero(~((numbers >= self.low) & (numbers <= self.high)))
        if not len(out):
            return ""
        bounds = f"from {self.low:.10g} to {self.high:.10g}" if math.isfinite(self.high) else "a number"
        return f"{f'element {out[0]}' if value.type.endswith('[]') else 'it'} is {numbers[out[0]].item()}; it must be {bounds}"


TEXT, FLAG, TOKEN = Known(("str",)), Known(("bool",)), Known(INT, 0, 2 ** 31 - 1)
POSITIVE = Known(INT, 1, 2 ** 24)

KNOWN: dict[str, Known] = {
    **dict.fromkeys((f"general.{name}" for name in (
        "architecture", "type", "name", "author", "version", "organization", "finetune", "basename", "description", "quantized_by",
        "size_label", "license", "license.name", "license.link", "url", "doi", "uuid", "repo_url", "source.url")), TEXT),
    "general.alignment": Known(INT, 8, 64 << 10),
    "general.quantization_version": Known(INT, 0, 1000),
    "general.file_type": Known(INT, 0, 10_000),
    "general.tags": Known(("str[]",)),
    "general.languages": Known(("str[]",)),
    "split.no": Known(("u16",)),
    "split.count": Known(("u16",)),
    "split.tensors.count": Known(("i32",), 0),
    "tokenizer.ggml.model": TEXT,
    "tokenizer.ggml.pre": TEXT,
    "tokenizer.ggml.tokens": Known(("str[]",)),
    "tokenizer.ggml.merges": Known(("str[]",)),
    "tokenizer.ggml.scores": Known(("f32[]", "i32[]")),
    "tokenizer.ggml.token_type": Known(("i32[]", "u32[]"), 0, 6),
    "tokenizer.ggml.token_type_count": Known(INT, 0, 2 ** 20),
    **dict.fromkeys((f"tokenizer.ggml.{name}_token_id" for name in (
        "bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask", "cls")), TOKEN),
    **dict.fromkeys((f"tokenizer.ggml.{name}" for name in (
        "add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces")), FLAG),
    "tokenizer.chat_template": TEXT,
    "*.vocab_size": POSITIVE,
    "*.context_length": Known(INT, 1, 2 ** 31 - 1),
    "*.embedding_length": POSITIVE,
    "*.block_count": Known(INT, 1, 4096),
    "*.feed_forward_length": Known(COUNT, 0, 2 ** 24),
    "*.expert_feed_forward_length": Known(INT, 0, 2 ** 24),
    "*.expert_count": Known(INT, 0, 2 ** 16),
    "*.expert_used_count": Known(COUNT, 0, 2 ** 16),
    "*.attention.head_count": Known(COUNT, 0, 2 ** 16),
    "*.attention.head_count_kv": Known(COUNT, 0, 2 ** 16),
    "*.attention.key_length": POSITIVE,
    "*.attention.value_length": POSITIVE,
    "*.attention.layer_norm_rms_epsilon": Known(FLOAT, 0, 1),
    "*.attention.layer_norm_epsilon": Known(FLOAT, 0, 1),
    "*.attention.sliding_window": Known(INT, 0, 2 ** 31 - 1),
    "*.rope.dimension_count": Known(INT, 0, 2 ** 16),
    "*.rope.freq_base": Known(FLOAT, 1e-6, 1e15),
    "*.rope.scaling.type": TEXT,
    "*.rope.scaling.factor": Known(FLOAT, 0, 1e9),
    "*.rope.scaling.original_context_length": Known(INT, 0, 2 ** 31 - 1),
}


def missing(path: str, key: str, there: Iterable[str]) -> PyggmlError:
    """The error of a key that is not there, with the one that was perhaps meant."""
    near = difflib.get_close_matches(key, list(there), 1)
    hint = f"; did you mean {printable(near[0])}?" if near else ""
    return PyggmlError(f'{printable(path)}: key "{printable(key)}" is missing{hint}')


def known(key: str) -> Known | None:
    """The row of a key, whatever architecture it names."""
    return KNOWN.get(key) or KNOWN.get("*." + key.partition(".")[2])


def meant(key: str) -> str:
    """The known key that a key nobody knows is perhaps a slip of, or ""."""
    names = [name.replace("*", key.partition(".")[0]) for name in KNOWN]
    return "" if known(key) else next(iter(difflib.get_close_matches(key, names, 1, cutoff=0.9)), "")


def problem(key: str, value: Any) -> str:
    """What is wrong with a typed value for `key`, as a sentence, or ""."""
    row = known(key)
    text = row.problem(value) if row else ""
    return f'key "{printable(key)}": {text}' if text else ""
