"""Llama 1 to 3, Mistral, Mixtral and everything else that is stored under the name `llama`."""

from pyggml.arch.blocks import Builder, Style, transformer
from pyggml.graph import Tensor


def graph(b: Builder) -> Tensor:
    """Pre-norm decoder; rope turns neighbouring values, because GGUF stores the rows of q and k permuted for it.

    `attention.sliding_window` is not applied: llama.cpp ignores it for this architecture, and files rely on that.
    """
    return transformer(b, Style(rope="norm"))
