"""Which layers a GPU computes, and what that takes of its memory, told before anything is uploaded.

As in llama.cpp, -ngl N puts the last N layers on the GPU, where the output (final norm and logits) counts as the one behind the last
layer. The graph is cut once, in front of the first of them: the CPU computes what comes before, and the hidden state goes over. The
token table is on the GPU when all layers are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyggml.backends.base import Weights
from pyggml.errors import ParameterError, PyggmlError, UnsupportedStep
from pyggml.graph import Tensor, replace, walk
from pyggml.lower import SMALL
from pyggml.plan import Plan
from pyggml.shapes import OUTPUTS, TOKENS, Symbol

if TYPE_CHECKING:
    from pyggml.backends.cuda.plan import Store
    from pyggml.backends.cuda.store import DeviceWeights

log = logging.getLogger("pyggml")
ALL = 1 << 20               # more layers than any model has
MARGIN = 256 << 20          # bytes that `auto` leaves free: kernels, recordings, what the desktop draws
BATCHES = (1, SMALL, 64)    # batches up to these sizes, and full ones, have plans of their own on a GPU


def count(n_gpu_layers: int | str) -> int | None:
    """`-ngl`'s number of layers: None for "auto", ALL for "all" and for -1. ParameterError for anything else."""
    text = str(n_gpu_layers).lower()
    if text == "auto":
        return None
    if text in ("all", "-1"):
        return ALL
    if not text.isdecimal():
        raise ParameterError(f"n_gpu_layers is {n_gpu_layers!r}; it must be a number of layers, all or auto")
    return int(text)


def sizes(n_tokens: int, n_outputs: int, n_ubatch: int) -> tuple[int, int]:
    """Largest (tokens, rows of logits) of the plan that a GPU computes such a batch with."""
    tokens = next((n for n in BATCHES if n_tokens <= n), n_ubatch)
    return tokens, min(tokens, SMALL) if n_outputs <= SMALL else tokens


# ---- cutting ------------------------------------------------------------------------------------------------------------------

class Part(NamedTuple):
    """A piece of a graph: what it computes, and the captured nodes in it by their place in the whole list."""

    output: Tensor
    capture: dict[int, Tensor]


def cut(output: Tensor, entering: Tensor, capture: Sequence[Tensor] = ()) -> tuple[Part, Part]:
    """The graph up to `entering`, and the rest, which takes that value as the input "hidden"."""
    before = {id(t) for t in walk([entering])}
    first = {i: t for i, t in enumerate(capture) if id(t) in before}
    later = [i for i in range(len(capture)) if i not in first]
    hidden = Tensor("input", (), entering.shape, name="hidden")
    rest, *nodes = replace([output, *(capture[i] for i in later)], {id(entering): hidden})
    return Part(entering, first), Part(rest, dict(zip(later, nodes, strict=True)))


def chain(output: Tensor, entering: Tensor, capture: Sequence[Tensor], stores: tuple[Weights, Weights], limits: dict[Symbol, int],
          timing: bool) -> Chain:
    """Plan both parts, each over its own store."""
    parts = cut(output, entering, capture)
    first, second = (Plan(part.output, store, limits, timing, list(part.capture.values())) for part, store in zip(parts, stores, strict=True))
    found = {i: values for part, plan in zip(parts, (first, second), strict=True) for i, values in zip(part.capture, plan.captured, strict=True)}
    boundary = entering.shape[0]
    assert isinstance(boundary, Symbol)
    return Chain(first, second, boundary, [found[i] for i in sorted(found)])


class Chain:
    """The plans of the two parts as one plan."""

    def __init__(self, first: Plan, second: Plan, boundary: Symbol, captured: list[np.ndarray]) -> None:
        self.plans, self._boundary, self.captured = (first, second), boundary, captured
        self.output, self.steps = second.output, [*first.steps, *second.steps]

    def fill(self, given: dict[str, Any], counts: dict[str, int]) -> None:
        for plan in self.plans:
            plan.fill(given, counts)

    def run(self, pool: Any, values: dict[Symbol, int], alone: bool = False) -> bool:
        first, second = self.plans
        if not first.run(pool, values, alone):
            return False
        n = values[self._boundary]
        second.inputs["hidden"][:n] = first.output[:n]
        return second.run(pool, values, alone)

    def abort(self, value: bool) -> None:
        for plan in self.plans:
            plan.abort(value)

    def op_times(self) -> list[Any]:
        return [row for plan in self.plans for row in plan.op_times()]

    def row(self, token: int, position: int) -> None:
        """Not without the host: a part of the model is on it."""

    def stop(self) -> None:
        """Nothing is computed ahead."""


# ---- what goes where ----------------------------------------------------------------------------------------------------------

class Forecast(NamedTuple):
    """Bytes of GPU memory for so many layers. `peak` counts what uploading needs beside the weights, which is free again when the rest
    is taken."""

    layers: int
    weights: int
    cache: int
    compute: int
    peak: int

    def __str__(self) -> str:
        from pyggml.backends.cuda.device import gib

        return f"{gib(self.peak)} (weights {gib(self.weights)}, cache {gib(self.cache)}, computing {gib(self.compute)})"


@dataclass
class Graph:
    """A context's graph, as its share of a GPU is decided on: `entering` are the places where it can be cut (Builder.entering), `cache` has
    the tensors of every layer, keys first."""

    output: Tensor
    entering: list[Tensor]
    keys: list[Any]
    values: list[Any]
    n_ubatch: int

    @property
    def most(self) -> int:
        """Layers that can go to a GPU, the output among them."""
        return len(self.entering)

    def first(self, layers: int) -> int:
        """The first layer on the GPU."""
        return self.most - layers

    def part(self, layers: int) -> Tensor:
        """What the GPU computes."""
        first = self.first(layers)
        return self.output if first <= 0 else cut(self.output, self.entering[first])[1].output


def forecast(graph: Graph, layers: int, weights: DeviceWeights) -> Forecast:
    """What `layers` layers take beside what the GPU holds of this model already."""
    from pyggml.backends.cuda.store import cache_bytes

    output, first = graph.part(layers), graph.first(layers)
    stays, staged = weights.missing_bytes([output])
    cache = cache_bytes([*graph.keys[first:], *graph.values[first:]])
    compute = workspace_bytes(output, weights, graph.n_ubatch)
    together = compute + constant_bytes(output)
    return Forecast(layers, stays, cache, together, stays + max(staged, cache + together))


def workspace_bytes(output: Tensor, weights: DeviceWeights, n_ubatch: int) -> int:
    """Memory of the plan that needs most, logits of every token of a full batch left aside."""
    from pyggml.backends.cuda.plan import Store

    wanted = {sizes(n, m, n_ubatch) for n in (*BATCHES, n_ubatch) if n <= max(n_ubatch, SMALL) for m in (1, n) if m <= BATCHES[-1]}
    plans = (Plan(output, Store(weights, None), {TOKENS: tokens, OUTPUTS: rows}) for tokens, rows in wanted)
    return max(plan.program.nbytes for plan in plans)       # type: ignore[attr-defined]


def constant_bytes(output: Tensor) -> int:
    from pyggml.backends.cuda.device import round_up

    return sum(round_up(t.data.nbytes) for t in walk([output]) if t.op == "const")


class Share:
    """The layers of one context that are on a GPU."""

    def __init__(self, weights: DeviceWeights, graph: Graph, plan: Forecast) -> None:
        from pyggml.backends.cuda.store import cache_arena

        self.weights, self.device, self.forecast = weights, weights.device, plan
        self.first = graph.first(plan.layers)               # the first layer on the GPU; 0 also when the token table is there
        output = graph.part(plan.layers)
        with self.device.active():
            weights.load([output])
        self._cache = cache_arena(self.device, plan.cache) if plan.cache else None
        self._compute = plan.compute - constant_bytes(output)
        self._store: Store | None = None

    @property
    def whole(self) -> bool:
        """Whether the CPU has nothing to do."""
        return self.first == 0

    def cache_tensor(self, layer: int, name: str, type: Any, shape: tuple[int, int, int]) -> Any:
        """A new tensor of the cache, where its layer is computed."""
        from pyggml.backends.cuda.store import DeviceCacheTensor
        from pyggml.cache import host_tensor

        if layer < self.first:
            return host_tensor(layer, name, type, shape)
        assert self._cache is not None
        return DeviceCacheTensor(name, type, shape, self._cache)

    @property
    def store(self) -> Store:
        """What plans on the GPU are made over."""
        from pyggml.backends.cuda.plan import Store

        if self._store is None:
            self._store = Store(self.weights, self.device, self._compute)
        return self._store


def choose(n_gpu_layers: int | str, device: str | None, main_gpu: int, build: Callable[[], Graph],
           weights_of: Callable[[int], DeviceWeights]) -> Share | None:
    """The share of a GPU that these options ask for; None where the CPU computes everything.

    PyggmlError says why layers cannot go where they were sent; "auto" takes as many as fit, and the CPU where there is no GPU to use, or
    none of the model's steps for it.
    """
    wanted = count(n_gpu_layers)
    if wanted == 0:
        return None
    from pyggml.backends.cuda import device as devices

    index = devices.named(device, main_gpu)
    if index is None:
        return None
    explicit = wanted is not None or device is not None
    if reason := devices.why_not(index):
        if explicit:
            raise PyggmlError(f"layers cannot go to a GPU: {reason}; use -ngl 0 (n_gpu_layers=0) to compute on the CPU")
        log.debug("everything on the CPU: %s", reason)
        return None
    if not explicit and devices.simulated():        # a simulator is for those who ask for it
        return None
    graph, weights = build(), weights_of(index)
    free = weights.device.free
    if wanted is not None:
        found = forecast(graph, min(wanted, graph.most), weights)
        if found.peak > free:
            fits = most_that_fits(graph, weights, free)
            raise PyggmlError(f"{found.layers} layers need {found} on cuda{index}, where {devices.gib(free)} are free; "
                              f"use -ngl {fits}, which fit, or a smaller context (-c)")
    else:
        try:
            layers = most_that_fits(graph, weights, free - MARGIN)
        except UnsupportedStep as error:
            log.info("everything on the CPU: %s", error)
            return None
        if not layers:
            log.info("everything on the CPU: cuda%d has %s free, too little for a layer", index, devices.gib(free))
            return None
        found = forecast(graph, layers, weights)
    return Share(weights, graph, found)


def most_that_fits(graph: Graph, weights: DeviceWeights, free: float) -> int:
    """The largest number of layers whose forecast is at most `free` bytes."""
    if forecast(graph, graph.most, weights).peak <= free:       # as a rule; planning costs some milliseconds each time
        return graph.most
    low, high = 0, graph.most - 1
    while low < high:
        middle = (low + high + 1) // 2
        if forecast(graph, middle, weights).peak <= free:
            low = middle
        else:
            high = middle - 1
    return low
