"""The parts that architectures are put together from: a weight store that checks names and shapes, and the usual layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pyggml.arch.config import Config
from pyggml.errors import ModelError
from pyggml.formats.tensorfile import OpaqueType
from pyggml.graph import Graph, Tensor
from pyggml.shapes import OUTPUTS, TOKENS, Shape

if TYPE_CHECKING:
    from pyggml.cache import KVCache
    from pyggml.formats.tensorfile import TensorFile


class Builder(Graph):
    """A graph over one model file: `b.w("blk.0.attn_q.weight", (rows, cols))` is a checked weight; features are what the file has."""

    def __init__(self, file: TensorFile, config: Config, cache: KVCache, n_ctx: int) -> None:
        super().__init__()
        self.file, self.config, self.cache_tensors = file, config, cache
        self.entering: list[Tensor] = []        # what enters each layer, and last what enters the output: where a graph can be cut
        self.tokens = self.input("tokens", (TOKENS,), "I32")
        self.pos = self.input("pos", (TOKENS,), "I32")         # position of each token in its sequence
        self.cell = self.input("cell", (TOKENS,), "I32")       # where its key and value are stored
        self.first = self.input("first", (TOKENS,), "I32")     # the first cell it sees
        self.wanted = self.input("wanted", (OUTPUTS,), "I32")  # the tokens whose logits are asked for
        inv_freq, mscale = config.rope.frequencies(self._rope_factors(n_ctx))
        self.rope_angles = self.rope_table(self.pos, self.const(inv_freq, "inv_freq"), mscale=mscale)

    def _rope_factors(self, n_ctx: int) -> np.ndarray | None:
        name = "rope_freqs.weight"
        if self.config.rope.scaling == "longrope":
            name = f"rope_factors_{'long' if n_ctx > self.config.rope.n_ctx_orig else 'short'}.weight"
        if name not in self.file.tensors:
            return None
        factors = self.w(name, (self.config.rope.n_rot // 2,)).data.dequantize().reshape(-1)
        if not (np.isfinite(factors) & (factors > 0)).all():
            raise ModelError(f'{self.file.path}: the tensor "{name}" must hold positive numbers, which divide frequencies; the model is damaged')
        return factors

    def has(self, name: str) -> bool:
        return name in self.file.tensors

    def w(self, name: str, shape: Shape) -> Tensor:
        """The weight `name`, which must have this numpy shape."""
        if name not in self.file.tensors:
            raise ModelError(f'{self.file.path}: the tensor "{name}" is missing; the file is incomplete or not a {self.config.arch} model')
        tensor = self.file.tensors[name].computable
        if tuple(tensor.shape) != shape:
            raise ModelError(f'{self.file.path}: the tensor "{name}" has shape {list(tensor.shape)}; the keys of this model ask for {list(shape)}')
        if isinstance(tensor.type, OpaqueType):
            raise ModelError(f'{self.file.path}: the tensor "{name}" cannot be computed with: {tensor.type.why()}')
        if not tensor.type.activation:
            raise ModelError(f'{self.file.path}: the tensor "{name}" has type {tensor.type.name}, which cannot be computed with; '
                             "quantize the file to another type")
        return self.weight(tensor)

    def floats(self, name: str, shape: Shape) -> Tensor:
        """A small weight used number by number (a norm, a bias): as F32, whatever its type in the file."""
        weight = self.w(name, shape)
        return weight if weight.type == "F32" else self.const(weight.data.dequantize().reshape(shape), name)

    def linear(self, x: Tensor, name: str, n_out: int) -> Tensor:
        """x Wᵀ, with the bias and the scale that the file may have beside the weight."""
        scale = f"{name}.scale"
        factor = float(self.w(scale, (1,)).data.dequantize().reshape(-1)[0]) if self.has(scale) else 1.0
        y = self.matmul(self.w(f"{name}.weight", (n_out, x.shape[-1])), x, scale=factor)
        return self.add(y, self.floats(f"{name}.bias", (n_out,))) if self.has(f"{name}.bias") else y

    def norm(self, x: Tensor, name: str) -> Tensor:
        return self.rms_norm(x, self.floats(f"{name}.weight", (x.shape[-1],)), eps=self.config.eps)

    def enter(self, x: Tensor) -> Tensor:
        """Say that x is all that the next layer (or the output) takes from those before it, besides the graph's inputs. Returns x."""
        self.entering.append(x)
        return x

    def embedding(self) -> Tensor:
        """Rows of the token table -> (T, n_embd)"""
        return self.get_rows(self.token_table(), self.tokens)

    def token_table(self) -> Tensor:
        table = self.file.tensors.get("token_embd.weight")
        n_vocab = table.shape[0] if table is not None and len(table.shape) == 2 else 0
        return self.w("token_embd.weight", (n_vocab, self.config.n_embd))

    def self_attention(self, x: Tensor, layer: int, mode: str, window: int = 0) -> Tensor:
        """Attention of layer `layer` over normed x (T, n_embd) -> (T, n_head * head_dim_v), the output projection not yet applied."""
        c, p = self.config, f"blk.{layer}"
        n_head, n_kv = c.n_head[layer], c.n_kv[layer]
        q = self.reshape(self.linear(x, f"{p}.attn_q", n_head * c.head_dim), (TOKENS, n_head, c.head_dim))
        k = self.reshape(self.linear(x, f"{p}.attn_k", n_kv * c.head_dim), (TOKENS, n_kv, c.head_dim))
        v = self.reshape(self.linear(x, f"{p}.attn_v", n_kv * c.head_dim_v), (TOKENS, n_kv, c.head_dim_v))
        if self.has(f"{p}.attn_q_norm.weight"):
            q, k = self.norm(q, f"{p}.attn_q_norm"), self.norm(k, f"{p}.attn_k_norm")
        q, k = self.rope(q, self.rope_angles, mode=mode), self.rope(k, self.rope_angles, mode=mode)
        keys = self.store(self.cache(self.cache_tensors.keys[layer]), k, self.cell)
        values = self.store(self.cache(self.cache_tensors.values[layer]), v, self.cell)
        return self.attention(q, keys, values, self.cell, self.first, scale=c.head_dim**-0.5, window=window)

    def ffn(self, x: Tensor, layer: int, kind: str = "silu") -> Tensor:
        """The gated feed-forward of a layer over normed x: dense, or the experts that a router picks."""
        c, p = self.config, f"blk.{layer}"
        if c.n_expert == 0 or not self.has(f"{p}.ffn_gate_inp.weight"):
            h = self.glu(self.linear(x, f"{p}.ffn_gate", c.n_ff[layer]), self.linear(x, f"{p}.ffn_up", c.n_ff[layer]), kind=kind)
            return self.linear(h, f"{p}.ffn_down", c.n_embd)
        logits = self.linear(x, f"{p}.ffn_gate_inp", c.n_expert)
        ids = self.moe_ids(logits, n_used=c.n_expert_used)
        weights = self.moe_weights(logits, ids)
        gate = self.matmul_id(self.w(f"{p}.ffn_gate_exps.weight", (c.n_expert, c.n_ff[layer], c.n_embd)), x, ids)
        up = self.matmul_id(self.w(f"{p}.ffn_up_exps.weight", (c.n_expert, c.n_ff[layer], c.n_embd)), x, ids)
        down = self.w(f"{p}.ffn_down_exps.weight", (c.n_expert, c.n_embd, c.n_ff[layer]))
        return self.moe_sum(self.matmul_id(down, self.glu(gate, up, kind=kind), ids), weights)

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and the output matrix, which may be the token table again -> (O, n_vocab)"""
        x = self.norm(x, "output_norm")
        table = self.token_table()
        if not self.has("output.weight"):
            return self.matmul(table, x)
        return self.linear(x, "output", table.shape[0])  # type: ignore[arg-type]


def transformer(b: Builder, mode: str, window: Any = 0) -> Tensor:
    """The pre-norm decoder that most architectures share: embedding, layers of attention and feed-forward, logits.

    In the last layer only the rows whose logits are wanted go on past attention.
    """
    x = b.embedding()
    for layer in range(b.config.n_layers):
        p = f"blk.{layer}"
        x = b.enter(x)
        a = b.self_attention(b.norm(x, f"{p}.attn_norm"), layer, mode, window)
        if layer == b.config.n_layers - 1:
            a, x = b.get_rows(a, b.wanted), b.get_rows(x, b.wanted)
        x = b.add(b.linear(a, f"{p}.attn_output", b.config.n_embd), x)
        x = b.add(b.ffn(b.norm(x, f"{p}.ffn_norm"), layer), x)
    return b.logits(b.enter(x))
