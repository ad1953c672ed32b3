"""gpt-oss (OpenAI 2025): experts with biases and a clamped gate, heads with sinks, a window in every second layer."""

from dataclasses import replace

from pyggml.arch.blocks import Builder, Style, transformer
from pyggml.graph import Tensor


def graph(b: Builder) -> Tensor:
    c, keys = b.config, b.keys
    nearby = replace(b.attending, rope=replace(c.rope, base=keys.number("rope.freq_base_swa", c.rope.base, above=1)),
                     window=keys.integer("attention.sliding_window"))
    return transformer(b, Style(rope="neox", activation="clamped", ffn_norm="post_attention_norm", sinks=True,
                                attending=b.by_window(nearby, b.attending, period=2)))
