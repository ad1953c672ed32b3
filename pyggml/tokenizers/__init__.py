"""Tokenizers built from a GGUF file's metadata: `load(kv)`, then `encode` and `decode`; a row of MODELS per kind of vocabulary."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from pyggml.errors import ModelError
from pyggml.formats import show
from pyggml.tokenizers.base import StreamDecoder, Tokenizer

__all__ = ["MODELS", "StreamDecoder", "Tokenizer", "load"]

# tokenizer.ggml.model -> module and class; imported when asked for, as some bring large packages with them
MODELS = {"llama": "spm SentencePiece", "gpt2": "bpe ByteBPE", "gemma4": "bpe GemmaBPE", "bert": "wordpiece WordPiece", "t5": "unigram Unigram"}


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
    if not isinstance(model, str) or model not in MODELS:
        raise ModelError(f"tokenizer.ggml.model is {show.quoted(model)}, a kind of tokenizer that pyggml does not know; it knows {', '.join(MODELS)}")
    module, kind = MODELS[model].split()
    return getattr(importlib.import_module(f"pyggml.tokenizers.{module}"), kind)(kv)
