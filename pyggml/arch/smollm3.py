"""SmolLM 3: every fourth layer knows no positions."""

from dataclasses import replace

from pyggml.arch.blocks import Builder, Style, transformer
from pyggml.graph import Tensor

PERIOD = 4


def graph(b: Builder) -> Tensor:
    placeless = replace(b.attending, rope=b.config.rope.still)
    attending = [b.attending if (layer + 1) % PERIOD else placeless for layer in range(b.config.n_layers)]
    return transformer(b, Style(rope="norm", attending=attending))
