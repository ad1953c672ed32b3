"""Granite 3 and 4 (IBM), dense or with experts: Llama with factors on embeddings, scores, residuals and logits."""

from dataclasses import replace
from typing import Any

from pyggml.arch.blocks import Builder, Style, transformer
from pyggml.arch.config import REQUIRED
from pyggml.graph import Tensor


def graph(b: Builder) -> Tensor:
    c, keys = b.config, b.keys
    attending = replace(b.attending, rope=c.rope if keys.flag("rope.scaling.finetuned", True) else c.rope.still,
                        scale=keys.number("attention.scale", 0.0, low=0) or b.attending.scale)
    return transformer(b, replace(style(b), attending=[attending] * c.n_layers))


def style(b: Builder, embedding: float = 1.0, residual: float = 1.0, logits: Any = REQUIRED) -> Style:
    """The file's factors, 0 for none; the arguments stand in for those that it has not. Logits are divided by theirs."""
    keys = b.keys
    return Style(rope="norm", embedding_scale=keys.number("embedding_scale", embedding) or 1.0,
                 residual_scale=keys.number("residual_scale", residual) or 1.0, logit_scale=1 / keys.number("logit_scale", logits, above=0))
