"""Gemma 2 (Gemma team 2024): every second layer sees a window, a tanh caps scores and logits, and norms also follow attention and feed-forward."""

from dataclasses import replace

from pyggml.arch import gemma
from pyggml.arch.blocks import Attending, Builder, transformer
from pyggml.graph import Tensor

LAYERS_OF_27B = 46


def graph(b: Builder) -> Tensor:
    c, keys = b.config, b.keys
    everywhere = Attending(gemma.query_scale(c, LAYERS_OF_27B), c.rope, softcap=keys.number("attn_logit_softcapping", 50.0, above=0))
    nearby = replace(everywhere, rope=replace(c.rope, base=keys.number("rope.freq_base_swa", c.rope.base, above=1)),
                     window=keys.integer("attention.sliding_window", 4096))
    softcap = keys.number("final_logit_softcapping", 30.0, above=0)
    return transformer(b, replace(gemma.style(b), post_norms=True, softcap=softcap, attending=b.by_window(nearby, everywhere, period=2)))
