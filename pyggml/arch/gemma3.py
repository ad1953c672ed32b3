"""Gemma 3 (Gemma team 2025): Gemma 2 with norms of queries and keys in place of the cap on scores, and five layers with a window for one without.

Layers with a window turn at a base of their own, which no factor for long contexts slows. Files without a window have none anywhere.
"""

from dataclasses import replace

from pyggml.arch import gemma
from pyggml.arch.blocks import Attending, Builder, transformer
from pyggml.graph import Tensor

LAYERS_OF_27B = 62


def graph(b: Builder) -> Tensor:
    c, keys = b.config, b.keys
    everywhere = Attending(gemma.query_scale(c, LAYERS_OF_27B), c.rope)
    attending = [everywhere] * c.n_layers
    if window := keys.integer("attention.sliding_window", 0, low=0):
        local = replace(c.rope, base=keys.number("rope.freq_base_swa", 10000.0, above=1), factor=1.0)
        nearby = replace(everywhere, rope=local, window=window)
        attending = b.by_window(nearby, everywhere, period=6)
    softcap = keys.number("final_logit_softcapping", 0.0, low=0)
    return transformer(b, replace(gemma.style(b), head_norms=True, post_norms=True, softcap=softcap, attending=attending))
