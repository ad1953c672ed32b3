"""The parts that architectures are put together from: a weight store that checks names and shapes, and the usual layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pyggml.arch.config import Config, Keys, RopeConfig
from pyggml.errors import ModelError
from pyggml.formats.tensorfile import OpaqueType
from pyggml.graph import Graph, Tensor
from pyggml.shapes import OUTPUTS, TOKENS, Shape

if TYPE_CHECKING:
    from pyggml.cache import KVCache
    from pyggml.formats.tensorfile import TensorFile


@dataclass(frozen=True)
class Attending:
    """How a layer attends."""

    scale: float                      # of the product of query and key
    rope: RopeConfig
    window: int = 0                   # cells that a token sees, its own among them; 0: all before it
    softcap: float = 0.0              # of the scaled products; 0: none


@dataclass(frozen=True)
class Style:
    """What decoders do differently beyond what their sizes and their tensors say."""

    rope: str                         # which values of a head turn together (MODES of ops/rope.py)
    activation: str = "silu"          # of the gate
    gate_in_up: bool = False          # one matrix has the rows of the gate and then those of up
    embedding_scale: float = 1.0
    normalize_experts: bool = True    # the weights of a token's experts add up to 1
    ff_of_used_experts: bool = False  # where the file has no size of an expert's feed-forward: it is that of all that a token takes, together
    head_norms: bool = False          # every layer norms the heads of its queries and keys; without it, those that have such norms do
    wide_norms: bool = False          # it norms all heads together
    pre_norms: bool = True            # what enters attention and feed-forward is normed
    ffn_norm: str = "ffn_norm"        # the tensor of the latter's
    sinks: bool = False               # heads have scores that take a share of the weights and have no value
    post_norms: bool = False          # what they return is normed before it is added
    residual_scale: float = 1.0       # of what they return
    logit_scale: float = 1.0
    softcap: float = 0.0              # of the logits; 0: none
    attending: Sequence[Attending] = ()        # of each layer; empty: as `Builder.attending` says


class Builder(Graph):
    """A graph over one model file: `b.w("blk.0.attn_q.weight", (rows, cols))` is a checked weight; features are what the file has."""

    def __init__(self, file: TensorFile, config: Config, cache: KVCache, n_ctx: int) -> None:
        super().__init__()
        self.file, self.config, self.cache_tensors, self.n_ctx = file, config, cache, n_ctx
        self.keys = Keys(file.path, file.kv, config.arch)       # for what one architecture alone has
        self.entering: list[Tensor] = []        # what enters each layer, and last what enters the output: where a graph can be cut
        self.tokens = self.input("tokens", (TOKENS,), "I32")
        self.pos = self.input("pos", (TOKENS,), "I32")         # position of each token in its sequence
        self.cell = self.input("cell", (TOKENS,), "I32")       # where its key and value are stored
        self.first = self.input("first", (TOKENS,), "I32")     # the first cell it sees
        self.wanted = self.input("wanted", (OUTPUTS,), "I32")  # the tokens whose logits are asked for
        self._angles: dict[RopeConfig, Tensor] = {}

    def angles(self, rope: RopeConfig) -> Tensor:
        """The rope table of these frequencies; asked for twice it is one. The file's factors are for those of its own keys."""
        if rope not in self._angles:
            inv_freq, mscale = rope.frequencies(self._rope_factors() if rope == self.config.rope else None)
            self._angles[rope] = self.rope_table(self.pos, self.const(inv_freq, "inv_freq"), mscale=mscale)
        return self._angles[rope]

    def _rope_factors(self) -> np.ndarray | None:
        by_length = f"rope_factors_{'long' if self.n_ctx > self.config.rope.n_ctx_orig else 'short'}.weight"
        name = next((name for name in ("rope_freqs.weight", by_length) if self.has(name)), None)
        if name is None:
            return None
        factors = self.w(name, (self.config.rope.n_rot // 2,)).data.dequantize().reshape(-1)
        if not (np.isfinite(factors) & (factors > 0)).all():
            raise ModelError(f'{self.file.path}: the tensor "{name}" must hold positive numbers, which divide frequencies; the model is damaged')
        return factors

    def has(self, name: str) -> bool:
        return name in self.file.tensors

    def w(self, name: str, shape: Shape, rows: tuple[int, int] | None = None) -> Tensor:
        """The weight `name`, which must have this numpy shape; with `rows` those from the first up to the second number."""
        if name not in self.file.tensors:
            raise ModelError(f'{self.file.path}: the tensor "{name}" is missing; the file is incomplete or not a {self.config.arch} model')
        stored = self.file.tensors[name]
        tensor = stored.computable
        if tuple(tensor.shape) != shape:
            raise ModelError(f'{self.file.path}: the tensor "{name}" has shape {list(tensor.shape)}; the keys of this model ask for {list(shape)}')
        if isinstance(tensor.type, OpaqueType):
            raise ModelError(f'{self.file.path}: the tensor "{name}" cannot be computed with: {tensor.type.why()}')
        if not tensor.type.activation:
            raise ModelError(f'{self.file.path}: the tensor "{name}" has type {tensor.type.name}, which cannot be computed with; '
                             "quantize the file to another type")
        return self.weight(tensor if rows is None else stored.rows(*rows).computable)

    def floats(self, name: str, shape: Shape, rows: tuple[int, int] | None = None) -> Tensor:
        """A small weight used number by number (a norm, a bias): as F32, whatever its type in the file."""
        weight = self.w(name, shape, rows)
        return weight if weight.type == "F32" else self.const(weight.data.dequantize().reshape(weight.shape), name)

    def linear(self, x: Tensor, name: str, n_out: int, rows: tuple[int, int] | None = None) -> Tensor:
        """x Wᵀ, with the bias and the scale that the file may have beside the weight of n_out rows; with `rows` of those only (see w)."""
        scale = f"{name}.scale"
        factor = float(self.w(scale, (1,)).data.dequantize().reshape(-1)[0]) if self.has(scale) else 1.0
        y = self.matmul(self.w(f"{name}.weight", (n_out, x.shape[-1]), rows), x, scale=factor)
        return self.add(y, self.floats(f"{name}.bias", (n_out,), rows)) if self.has(f"{name}.bias") else y

    def split(self, x: Tensor, name: str, *sizes: int) -> list[Tensor]:
        """x Wᵀ of each of the matrices that the file keeps as one, of so many rows."""
        ends = np.cumsum(sizes).tolist()
        return [self.linear(x, name, ends[-1], (end - size, end)) for end, size in zip(ends, sizes, strict=True)]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return self.rms_norm(x, self.floats(f"{name}.weight", (x.shape[-1],)), eps=self.config.eps)

    def enter(self, x: Tensor) -> Tensor:
        """Say that x is all that the next layer (or the output) takes from those before it, besides the graph's inputs. Returns x."""
        self.entering.append(x)
        return x

    @property
    def attending(self) -> Attending:
        """How a layer attends where nothing else is said."""
        return Attending(self.config.head_dim**-0.5, self.config.rope)

    def by_window(self, nearby: Attending, everywhere: Attending, period: int) -> list[Attending]:
        """Of each layer: `nearby` where it sees a sliding window (see Keys.sliding)."""
        return [nearby if slides else everywhere for slides in self.keys.sliding(self.config.n_layers, period)]

    def embedding(self, scale: float = 1.0) -> Tensor:
        """Rows of the token table, times `scale` -> (T, n_embd)"""
        return self.get_rows(self.token_table(), self.tokens, scale=scale)

    def token_table(self) -> Tensor:
        table = self.file.tensors.get("token_embd.weight")
        n_vocab = table.shape[0] if table is not None and len(table.shape) == 2 else 0
        return self.w("token_embd.weight", (n_vocab, self.config.n_embd))

    def self_attention(self, x: Tensor, layer: int, style: Style) -> Tensor:
        """Attention of layer `layer` over normed x (T, n_embd) -> (T, n_head * head_dim_v), the output projection not yet applied."""
        c, p = self.config, f"blk.{layer}"
        how = style.attending[layer] if style.attending else self.attending
        n_head, n_kv = c.n_head[layer], c.n_kv[layer]
        heads = {"q": (n_head, c.head_dim), "k": (n_kv, c.head_dim), "v": (n_kv, c.head_dim_v)}
        sizes = [n * dim for n, dim in heads.values()]
        projected = (self.split(x, f"{p}.attn_qkv", *sizes) if self.has(f"{p}.attn_qkv.weight") else
                     [self.linear(x, f"{p}.attn_{name}", size) for name, size in zip(heads, sizes, strict=True)])
        if style.wide_norms:
            projected[:2] = [self.norm(y, f"{p}.attn_{name}_norm") for y, name in zip(projected, "qk", strict=False)]
        q, k, v = (self.reshape(y, (TOKENS, *shape)) for y, shape in zip(projected, heads.values(), strict=True))
        if style.head_norms or not style.wide_norms and self.has(f"{p}.attn_q_norm.weight"):
            q, k = self.norm(q, f"{p}.attn_q_norm"), self.norm(k, f"{p}.attn_k_norm")
        q, k = (self.rope(x, self.angles(how.rope), mode=style.rope) for x in (q, k))
        keys = self.store(self.cache(self.cache_tensors.keys[layer]), k, self.cell)
        values = self.store(self.cache(self.cache_tensors.values[layer]), v, self.cell)
        sinks = [self.floats(f"{p}.attn_sinks.weight", (n_head,))] if style.sinks else []
        return self.attention(q, keys, values, self.cell, self.first, *sinks, scale=how.scale, softcap=how.softcap, window=how.window)

    def ffn(self, x: Tensor, layer: int, style: Style) -> Tensor:
        """The gated feed-forward of a layer over normed x: dense, or the experts that a router picks."""
        c, p = self.config, f"blk.{layer}"
        if c.n_expert == 0 or not self.has(f"{p}.ffn_gate_inp.weight"):
            return self.dense(x, p, "", c.n_ff[layer], style)
        y = self.experts(x, layer, style)
        return self.add(y, self.shared_expert(x, p, style)) if self.has(f"{p}.ffn_up_shexp.weight") else y

    def dense(self, x: Tensor, p: str, suffix: str, n: int, style: Style) -> Tensor:
        """act(gate) * up of n values, and down again; the matrices are `{p}.ffn_gate{suffix}` and so on."""
        gate, up = (self.split(x, f"{p}.ffn_up{suffix}", n, n) if style.gate_in_up else
                    (self.linear(x, f"{p}.ffn_{name}{suffix}", n) for name in ("gate", "up")))
        return self.linear(self.glu(gate, up, kind=style.activation), f"{p}.ffn_down{suffix}", self.config.n_embd)

    def experts(self, x: Tensor, layer: int, style: Style) -> Tensor:
        """The weighted sum of what the experts of each token return -> (T, n_embd)"""
        c, p = self.config, f"blk.{layer}"
        n = c.n_ff_expert[layer] if c.n_ff_expert else c.n_ff[layer] // (c.n_expert_used if style.ff_of_used_experts else 1)
        logits = self.linear(x, f"{p}.ffn_gate_inp", c.n_expert)
        ids = self.moe_ids(logits, n_used=c.n_expert_used)
        weights = self.moe_weights(logits, ids, normalize=style.normalize_experts)

        def linear(x: Tensor, name: str, rows: int) -> Tensor:
            name = f"{p}.ffn_{name}_exps"
            bias = [self.floats(f"{name}.bias", (c.n_expert, rows))] if self.has(f"{name}.bias") else []
            return self.matmul_id(self.w(f"{name}.weight", (c.n_expert, rows, x.shape[-1])), x, ids, *bias)

        y = linear(self.glu(linear(x, "gate", n), linear(x, "up", n), kind=style.activation), "down", c.n_embd)
        return self.moe_sum(y, weights)

    def shared_expert(self, x: Tensor, p: str, style: Style) -> Tensor:
        """The expert of every token; where it has a gate times the sigmoid of that, as one expert of one -> (T, n_embd)"""
        y = self.dense(x, p, "_shexp", self.config.n_ff_shared, style)
        if not self.has(f"{p}.ffn_gate_inp_shexp.weight"):
            return y
        gate = self.w(f"{p}.ffn_gate_inp_shexp.weight", (x.shape[-1],)).data.as_row()
        logits = self.matmul(self.weight(gate), x)
        weights = self.moe_weights(logits, self.moe_ids(logits), gating="sigmoid", normalize=False)
        return self.moe_sum(self.reshape(y, (y.shape[0], 1, y.shape[-1])), weights)

    def logits(self, x: Tensor, style: Style) -> Tensor:
        """Final norm and the output matrix, which may be the token table again -> (O, n_vocab)"""
        x = self.norm(x, "output_norm")
        table = self.token_table()
        y = self.linear(x, "output", table.shape[0]) if self.has("output.weight") else self.matmul(table, x)  # type: ignore[arg-type]
        y = self.scale(y, factor=style.logit_scale) if style.logit_scale != 1 else y
        return self.softcap(y, cap=style.softcap) if style.softcap else y


def transformer(b: Builder, style: Style) -> Tensor:
    """The decoder that most architectures share: embedding, layers of attention and feed-forward, logits.

    In the last layer only the rows whose logits are wanted go on past attention.
    """
    def entering(x: Tensor, norm: str) -> Tensor:
        return b.norm(x, norm) if style.pre_norms else x

    def returned(y: Tensor, norm: str) -> Tensor:
        y = b.norm(y, norm) if style.post_norms else y
        return b.scale(y, factor=style.residual_scale) if style.residual_scale != 1 else y

    x = b.embedding(style.embedding_scale)
    for layer in range(b.config.n_layers):
        p = f"blk.{layer}"
        x = b.enter(x)
        a = b.self_attention(entering(x, f"{p}.attn_norm"), layer, style)
        if layer == b.config.n_layers - 1:
            a, x = b.get_rows(a, b.wanted), b.get_rows(x, b.wanted)
        x = b.add(returned(b.linear(a, f"{p}.attn_output", b.config.n_embd), f"{p}.post_attention_norm"), x)
        x = b.add(returned(b.ffn(entering(x, f"{p}.{style.ffn_norm}"), layer, style), f"{p}.post_ffw_norm"), x)
    return b.logits(b.enter(x), style)
