"""Tokenizers built from a GGUF file's metadata: `load(kv)`, then `encode` and `decode`; a row of MODELS per kind of vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyggml.errors import ModelError
from pyggml.tokenizers.base import StreamDecoder, Tokenizer
from pyggml.tokenizers.bpe import ByteBPE, GemmaBPE
from pyggml.tokenizers.spm import SentencePiece
from pyggml.tokenizers.unigram import Unigram
from pyggml.tokenizers.wordpiece import WordPiece

__all__ = ["MODELS", "StreamDecoder", "Tokenizer", "load"]

MODELS: dict[str, type[Tokenizer]] = {"llama": SentencePiece, "gpt2": ByteBPE, "gemma4": GemmaBPE, "bert": WordPiece, "t5": Unigram}


def load(kv: Mapping[str, Any], path: str = "") -> Tokenizer:
    """The tokenizer of a file with this metadata; `path` names the file in errors."""
    try:
        return _load(kv)
    except ModelError as error:
        raise ModelError(f"{path}: {error}" if path else str(error)) from None


def _load(kv: Mapping[str, Any]) -> Tokenizer:
    model = kv.get("tokenizer.ggml.model")
    if model is None:
        raise ModelError("tokenizer.ggml.model is missing: the file has no tokenizer; convert the model again, or use a file that has one")
    kind = MODELS.get(model) if isinstance(model, str) else None
    if kind is None:
        raise ModelError(f"tokenizer.ggml.model is {model!r}, a kind of tokenizer that pyggml does not know; it knows {', '.join(MODELS)}")
    return kind(kv)
