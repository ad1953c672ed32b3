"""Qwen 1.5, 2 and 2.5: biases on q, k and v (found in the file), rope over the two halves of a head."""

from pyggml.arch.blocks import Builder, Style, transformer
from pyggml.graph import Tensor


def graph(b: Builder) -> Tensor:
    return transformer(b, Style(rope="neox"))
