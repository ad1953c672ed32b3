"""OLMo 2 and 3 (OLMo team 2025): norms only after attention and feed-forward, and over all heads of queries and keys together.

In OLMo 3 three of four layers see a window, and turn as if contexts were never lengthened.
"""

from dataclasses import replace

from pyggml.arch.blocks import Builder, Style, transformer
from pyggml.graph import Tensor


def graph(b: Builder) -> Tensor:
    c, keys = b.config, b.keys
    attending = [b.attending] * c.n_layers
    if window := keys.integer("attention.sliding_window", 0, low=0):
        nearby = replace(b.attending, rope=replace(c.rope, scaling="none", attn_factor=1.0), window=window)
        attending = b.by_window(nearby, b.attending, period=4)
    return transformer(b, Style(rope="neox", wide_norms=True, pre_norms=False, post_norms=True, attending=attending))
