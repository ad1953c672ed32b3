"""MiniCPM (Hu et al. 2024): Granite's factors, with values of its own where the file has none."""

from pyggml.arch import granite
from pyggml.arch.blocks import Builder, transformer
from pyggml.graph import Tensor


def graph(b: Builder) -> Tensor:
    c = b.config
    return transformer(b, granite.style(b, embedding=12.0, residual=1.4 / c.n_layers**0.5, logits=256 / c.n_embd))
