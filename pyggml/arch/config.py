"""A model's sizes and constants, read once from GGUF keys and frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pyggml.errors import ModelError
from pyggml.formats.show import quoted

REQUIRED = object()
_FACTORS = 1e-6, 1e9          # of rope scaling: beyond, the angles of a position are no numbers
_TURNS = 1e-6, 1e9            # in the trained context, that YaRN tells pairs apart by
_SHARES = 1e6                 # of YaRN's mixture and of attention, either sign: beyond, cosines overflow


class Keys:
    """Typed reading of `<architecture>.*` keys; a missing or unusable one is a ModelError that names file, key and value."""

    def __init__(self, path: Any, kv: Mapping[str, Any], arch: str) -> None:
        self.path, self.kv, self.arch = path, kv, arch

    def has(self, key: str) -> bool:
        return f"{self.arch}.{key}" in self.kv

    def _get(self, key: str, default: Any) -> Any:
        name = f"{self.arch}.{key}"
        if name in self.kv:
            return self.kv[name]
        if default is REQUIRED:
            raise ModelError(f'{self.path}: the key "{name}" is missing; convert the model again, or add it with `pyggml edit`')
        return default

    def _bad(self, key: str, value: Any, wanted: str) -> ModelError:
        return ModelError(f'{self.path}: the key "{self.arch}.{key}" is {quoted(value)}; it must be {wanted}')

    def integer(self, key: str, default: Any = REQUIRED, *, low: int = 1, high: int = 1 << 24) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
            raise self._bad(key, value, f"a whole number from {low} to {high}")
        return int(value)

    def number(self, key: str, default: Any = REQUIRED, *, low: float = -math.inf, above: float = -math.inf, high: float = math.inf) -> float:
        """A finite number, at least `low`, more than `above` and at most `high`."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not (
                math.isfinite(value) and low <= value <= high and value > above):
            end = f" to {high:g}" if high < math.inf else " on"
            wanted = f" from {low:g}{end}" if low > -math.inf else f" above {above:g}" if above > -math.inf else ""
            raise self._bad(key, value, f"a finite number{wanted}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, (bool, np.bool_)):
            raise self._bad(key, value, "true or false")
        return bool(value)

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._bad(key, value, "a string")
        return value

    def sliding(self, n_layers: int, period: int) -> tuple[bool, ...]:
        """Which layers see a sliding window only: flags, or a period n that makes every n-th layer see everything (0: none does)."""
        key = "attention.sliding_window_pattern"
        value = self._get(key, period)
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            n = self.integer(key, period, low=0)
            return tuple(n == 0 or layer % n < n - 1 for layer in range(n_layers))
        flags = np.asarray(value)
        if flags.shape != (n_layers,) or flags.dtype.kind not in "biu":
            raise self._bad(key, value, f"a whole number, or true or false for each of {n_layers} layers")
        return tuple(flags.astype(bool).tolist())

    def per_layer(self, key: str, n_layers: int, default: Any = REQUIRED) -> tuple[int, ...]:
        """A number for all layers, or an array with one for each."""
        value = self._get(key, default)
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            return (self.integer(key, default),) * n_layers
        values = np.asarray(value)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise self._bad(key, value, "a whole number, or one for each layer")
        if len(values) != n_layers or values.min() < 1:
            raise self._bad(key, values.tolist(), f"{n_layers} positive numbers, one for each layer")
        return tuple(values.tolist())


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: which values turn, how fast, and how the speed is scaled for long contexts."""

    n_rot: int
    base: float
    scaling: str              # none, linear, yarn, longrope
    factor: float
    n_ctx_orig: int
    attn_factor: float
    ext_factor: float
    beta_fast: float
    beta_slow: float

    @property
    def still(self) -> RopeConfig:
        """The same, slowed without end: every position turns by nothing, as layers without rotary embedding want it."""
        return replace(self, scaling="linear", factor=math.inf, attn_factor=1.0)

    def frequencies(self, factors: np.ndarray | None = None) -> tuple[np.ndarray, float]:
        """Angle per position for each pair, float32 (n_rot / 2), and the factor on cos and sin.

        All scalings are linear in the position, so they fold into the frequencies. `factors` divides them (llama 3, longrope).
        YaRN: Peng et al. 2023, section 3: pairs that turn often keep their speed, slow ones are interpolated, with a ramp between.
        """
        pair = np.arange(self.n_rot // 2, dtype=np.float64)
        plain = self.base ** (-2 * pair / self.n_rot)
        if factors is not None:
            plain = plain / factors
        if self.scaling == "none":
            return plain.astype(np.float32), self.attn_factor
        slowed = plain / self.factor
        if self.scaling != "yarn" or self.ext_factor == 0:
            return slowed.astype(np.float32), self.attn_factor

        def pair_that_turns(turns: float) -> float:      # how far along the pairs one makes `turns` turns in the trained context
            return self.n_rot * math.log(self.n_ctx_orig / (turns * 2 * math.pi)) / (2 * math.log(self.base))

        low = max(0, math.floor(pair_that_turns(self.beta_fast)))
        high = min(self.n_rot - 1, math.ceil(pair_that_turns(self.beta_slow)))
        keep = (1 - np.clip((pair - low) / max(0.001, high - low), 0, 1)) * self.ext_factor
        return (slowed * (1 - keep) + plain * keep).astype(np.float32), self.attn_factor * (1 + 0.1 * math.log(self.factor))


@dataclass(frozen=True)
class Config:
    """What the keys say about a model. Per-layer numbers are tuples."""

    arch: str
    n_layers: int
    n_ctx_train: int
    n_embd: int
    n_head: tuple[int, ...]
    n_kv: tuple[int, ...]
    head_dim: int             # of queries and keys
    head_dim_v: int
    n_ff: tuple[int, ...]
    eps: float
    rope: RopeConfig
    n_expert: int
    n_expert_used: int
    n_ff_expert: tuple[int, ...]        # empty: the file does not say
    n_ff_shared: int                    # of the expert that every token takes

    @staticmethod
    def read(path: Any, kv: Mapping[str, Any], arch: str) -> Config:
        keys = Keys(path, kv, arch)
        n_layers = keys.integer("block_count", high=4096)
        n_embd = keys.integer("embedding_length")
        n_head = keys.per_layer("attention.head_count", n_layers)
        n_kv = keys.per_layer("attention.head_count_kv", n_layers, n_head)
        for q, kv_heads in zip(n_head, n_kv, strict=True):
            if q % kv_heads:
                raise ModelError(f'{path}: the key "{arch}.attention.head_count_kv" is {kv_heads}; it must divide the {q} heads')
        head_dim = keys.integer("attention.key_length", n_embd // n_head[0])
        n_ff_expert = keys.per_layer("expert_feed_forward_length", n_layers) if keys.has("expert_feed_forward_length") else ()
        n_ff = keys.per_layer("feed_forward_length", n_layers, n_ff_expert or REQUIRED)
        n_ctx = keys.integer("context_length", high=1 << 31)
        n_expert = keys.integer("expert_count", 0, low=0, high=4096)
        n_rot = keys.integer("rope.dimension_count", head_dim)
        if n_rot % 2 or n_rot > head_dim:
            raise ModelError(f'{path}: the key "{arch}.rope.dimension_count" is {n_rot}; it must be even and at most the head size {head_dim}')
        scaling = keys.text("rope.scaling.type", "linear")
        if scaling not in ("none", "linear", "yarn", "longrope"):
            raise ModelError(f'{path}: the key "{arch}.rope.scaling.type" is {quoted(scaling)}; known are none, linear, yarn, longrope')
        factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0), low=0) or 1.0
        if not _FACTORS[0] <= factor <= _FACTORS[1]:
            raise keys._bad("rope.scaling.factor", factor, f"0 or a number from {_FACTORS[0]:g} to {_FACTORS[1]:g}")
        return Config(
            arch=arch, n_layers=n_layers, n_ctx_train=n_ctx, n_embd=n_embd, n_head=n_head, n_kv=n_kv, head_dim=head_dim,
            head_dim_v=keys.integer("attention.value_length", head_dim),
            n_ff=n_ff,
            eps=keys.number("attention.layer_norm_rms_epsilon", low=0),
            rope=RopeConfig(
                n_rot=n_rot, base=keys.number("rope.freq_base", 10000.0, above=1), scaling=scaling, factor=factor,
                n_ctx_orig=keys.integer("rope.scaling.original_context_length", n_ctx, high=1 << 31),
                attn_factor=keys.number("rope.scaling.attn_factor", 1.0, low=-_SHARES, high=_SHARES),
                ext_factor=keys.number("rope.scaling.yarn_ext_factor", 1.0, low=-_SHARES, high=_SHARES),
                beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0, low=_TURNS[0], high=_TURNS[1]),
                beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0, low=_TURNS[0], high=_TURNS[1])),
            n_expert=n_expert, n_expert_used=keys.integer("expert_used_count", low=1, high=n_expert) if n_expert else 0,
            n_ff_expert=n_ff_expert,
            n_ff_shared=keys.integer("expert_shared_feed_forward_length", n_ff[0]))
