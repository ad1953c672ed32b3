"""Qwen 1.5 and 2 with experts: besides those that a token's router picks, one that every token takes in part."""

from pyggml.arch.blocks import Builder, Style, transformer
from pyggml.graph import Tensor


def graph(b: Builder) -> Tensor:
    return transformer(b, Style(rope="neox", normalize_experts=False, ff_of_used_experts=True))
