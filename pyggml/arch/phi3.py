"""Phi 3 and 4 (Abdin et al. 2024): q, k and v in one matrix, gate and up in another.

`attention.sliding_window` is not applied: llama.cpp ignores it for this architecture, as files do not say which layers it is for.
"""

from pyggml.arch.blocks import Builder, Style, transformer
from pyggml.graph import Tensor


def graph(b: Builder) -> Tensor:
    return transformer(b, Style(rope="neox", gate_in_up=True))
