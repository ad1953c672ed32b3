"""What the user may set: the chain of steps, its order and its parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from pyggml.errors import ParameterError
from pyggml.native import lib
from pyggml.sampling.candidates import Candidates
from pyggml.sampling.steps import COLDEST, min_p, penalties, temperature, top_k, top_p, typical

RANDOM_SEED = 0xFFFFFFFF        # the seed that asks for a fresh one, as is -1

# llama.cpp's names, in llama.cpp's order: what a step makes of candidates, given the parameters and how often recent tokens were seen
SAMPLERS: dict[str, Callable[[Candidates, SamplingParams, Mapping[int, int]], Candidates]] = {
    "penalties": lambda c, p, counts: penalties(c, counts, p.repeat_penalty, p.frequency_penalty, p.presence_penalty),
    "top_k": lambda c, p, _: top_k(c, p.top_k),
    "typ_p": lambda c, p, _: typical(c, p.typical_p, p.min_keep),
    "top_p": lambda c, p, _: top_p(c, p.top_p, p.min_keep),
    "min_p": lambda c, p, _: min_p(c, p.min_p, p.min_keep),
    "temperature": lambda c, p, _: temperature(c, p.temp),
}

LARGEST = 1e30          # of a real parameter: arithmetic with float32 logits stays finite


def _within(low: float, high: float = math.inf, default: float | int = 0, *, integer: bool = False, help: str = "", above: bool = False):
    """A numeric parameter: its default, the closed range [low, high] (open at `low` with `above`), and a line for --help."""
    if not integer:
        low, high = max(low, -LARGEST), min(high, LARGEST)
    return field(default=default, metadata={"low": low, "high": high, "integer": integer, "help": help, "above": above})


@dataclass(frozen=True)
class SamplingParams:
    """What the user may set; names and defaults are llama.cpp's. A value outside its range raises ParameterError."""

    temp: float = _within(0, default=0.8, help="temperature; 0 always takes the likeliest token")
    top_k: int = _within(-1, default=40, integer=True, help="keep the k likeliest tokens (0: all)")
    top_p: float = _within(0, 1, 0.95, help="keep the likeliest tokens that together have this probability (1: all)")
    min_p: float = _within(0, 1, 0.05, help="keep tokens at least this many times as likely as the likeliest (0: all)")
    typical_p: float = _within(0, 1, 1.0, help="keep locally typical tokens of this total probability (1: all)")
    min_keep: int = _within(0, integer=True, help="tokens that top-p, min-p and typical keep at least")
    repeat_last_n: int = _within(-1, default=64, integer=True, help="recent tokens that penalties look at (0: none, -1: all)")
    repeat_penalty: float = _within(0, default=1.0, above=True, help="penalty on tokens seen lately (1: none)")
    frequency_penalty: float = _within(-math.inf, default=0.0, help="penalty for each time a token was seen lately (0: none)")
    presence_penalty: float = _within(-math.inf, default=0.0, help="penalty once for a token seen lately (0: none)")
    mirostat: int = _within(0, 2, 0, integer=True, help="2: mirostat 2.0 in place of the truncating samplers (0: off)")
    mirostat_tau: float = _within(0, default=5.0, help="mirostat's target surprise in bits")
    mirostat_eta: float = _within(0, default=0.1, help="mirostat's learning rate")
    seed: int | None = None                                     # None, -1 and RANDOM_SEED: a fresh one
    logit_bias: Mapping[int, float] = field(default_factory=dict)    # token -> added to its logit; -inf forbids it
    samplers: tuple[str, ...] = tuple(SAMPLERS)

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.metadata:
                object.__setattr__(self, f.name, _checked(f.name, getattr(self, f.name), **f.metadata))
        if self.mirostat == 1:
            raise ParameterError("mirostat=1 is not supported; use 2, its simpler successor, or 0")
        if self.seed is not None:
            if isinstance(self.seed, bool) or not isinstance(self.seed, Integral) or self.seed < -1:
                raise ParameterError(f"seed={self.seed!r} is not a whole number; use one from 0 up, or -1 for a fresh one")
            object.__setattr__(self, "seed", int(self.seed))
        unknown = [name for name in self.samplers if name not in SAMPLERS]
        if unknown:
            raise ParameterError(f"sampler {unknown[0]!r} is unknown; known are {', '.join(SAMPLERS)}")
        for token, bias in self.logit_bias.items():
            if math.isnan(bias) or bias == math.inf:
                raise ParameterError(f"logit_bias of token {token} is {bias}; use a finite number, or -inf to forbid the token")

    @property
    def plain(self) -> bool:
        """Whether the next token is always the one with the largest logit."""
        return self.temp == 0.0 and self.unmoved

    @property
    def unmoved(self) -> bool:
        """Whether logits stay what the model made of them."""
        return not self.logit_bias and (self.repeat_penalty, self.frequency_penalty, self.presence_penalty) == (1.0, 0.0, 0.0)

    @property
    def usual(self) -> bool:
        """Whether pyg_draw (native/draw.c) draws what the chain would, once logits were moved."""
        return (lib is not None and self.temp >= COLDEST and not self.mirostat and self.typical_p >= 1.0 and self.samplers == tuple(SAMPLERS)
                and 0 < self.top_k <= lib.PYG_MOST_TOP_K)


def _checked(name: str, value: Any, *, low: float, high: float, integer: bool, help: str, above: bool) -> int | float:
    """The value as Python's own number: numpy's are taken too."""
    number = isinstance(value, Integral if integer else Real) and not isinstance(value, bool)
    if number and math.isfinite(value) and low <= value <= high and not (above and value == low):
        return int(value) if isinstance(value, Integral) else float(value)
    kind = "a whole number" if integer else "a number"
    bounds = f" above {low:g}" if above else f" from {low:g}"
    raise ParameterError(f"{name}={value!r} is out of range; use {kind}{bounds}{f' to {high:g}' if math.isfinite(high) else ''}")
