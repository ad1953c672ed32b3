"""Gemma (Gemma team 2024): embeddings grow with the width, the gate is a GELU, the token table is the output too."""

from pyggml.arch.blocks import Builder, Style, transformer
from pyggml.arch.config import Config
from pyggml.graph import Tensor


def graph(b: Builder) -> Tensor:
    return transformer(b, style(b))


def style(b: Builder) -> Style:
    """What every Gemma has. GGUF stores the weights of its norms with the 1 that they are kept without."""
    return Style(rope="neox", activation="gelu", embedding_scale=b.config.n_embd**0.5)


def query_scale(c: Config, layers_of_27b: int) -> float:
    """What Gemma 2 and 3 multiply scores with. The file does not say; the largest model, known by its layers, divides by another root."""
    return (c.n_embd // c.n_head[0] if c.n_layers == layers_of_27b else c.head_dim)**-0.5
