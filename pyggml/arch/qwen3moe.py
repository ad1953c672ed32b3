"""Qwen 3 with experts: norms of queries and keys, and weights of experts that add up to 1."""

from pyggml.arch.blocks import Builder, Style, transformer
from pyggml.graph import Tensor


def graph(b: Builder) -> Tensor:
    return transformer(b, Style(rope="neox", head_norms=True, ff_of_used_experts=True))
