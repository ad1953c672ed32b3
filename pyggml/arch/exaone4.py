"""EXAONE 4 (LG AI Research 2025): norms after attention and feed-forward and of each head.

In the larger model, known by its layers, three of four layers see a window, and the others know no positions.
"""

from dataclasses import replace

from pyggml.arch.blocks import Builder, Style, transformer
from pyggml.graph import Tensor

LAYERS_OF_32B = 64


def graph(b: Builder) -> Tensor:
    c, keys = b.config, b.keys
    attending = [b.attending] * c.n_layers
    if c.n_layers == LAYERS_OF_32B:
        nearby = replace(b.attending, window=keys.integer("attention.sliding_window", 4096))
        everywhere = replace(b.attending, rope=c.rope.still)
        attending = b.by_window(nearby, everywhere, period=4)
    return transformer(b, Style(rope="neox", head_norms=True, pre_norms=False, post_norms=True, attending=attending))
