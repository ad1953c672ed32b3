"""Many variants of one model over the same text: how far each is from the reference, at the price of what comes after the change.

    waists     nodes of the graph through which everything flows, such as the values between two layers
    Yardstick  runs the reference once and keeps its probabilities and the values at its waists; a variant, the reference with some
               tensors replaced, is computed from the last waist before them

Weights are multiplied exactly (decoded, with float activations), so that nothing is seen but the error of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pyggml.arch.blocks import Builder
from pyggml.context import Context
from pyggml.formats.source import Memory
from pyggml.formats.tensorfile import Tensor as FileTensor
from pyggml.formats.tensorfile import TensorFile
from pyggml.graph import Tensor, walk
from pyggml.measure.chunks import first_scored, with_bos
from pyggml.measure.scores import Scores, Tokens, divergence, log_softmax
from pyggml.model import Model
from pyggml.shapes import OUTPUTS, TOKENS
from pyggml.types import TensorType

WAIST = "waist"          # the input that stands for the values at a waist


def computed(output: Tensor) -> list[Tensor]:
    """The nodes of a graph that depend on weights, sources before users; leaves are left out."""
    depends: dict[int, bool] = {}
    found = []
    for node in walk([output]):
        depends[id(node)] = node.op == "weight" or any(depends[id(s)] for s in node.srcs if s is not None)
        if depends[id(node)] and not node.is_leaf:
            found.append(node)
    return found


def waists(order: list[Tensor]) -> list[int]:
    """Places in `order` (see `computed`) of the nodes after which nothing before them is read; the last node is left out."""
    place = {id(node): i for i, node in enumerate(order)}
    last = list(range(len(order)))
    for i, node in enumerate(order):
        for s in node.srcs:
            if s is not None and id(s) in place:
                last[place[id(s)]] = i
    found, latest = [], 0
    for i in range(len(order) - 1):
        if latest <= i and order[i].op != "reshape":
            found.append(i)
        latest = max(latest, last[i])
    return found


def reads(node: Tensor, names: Mapping[str, Any]) -> bool:
    """Whether a node reads one of these tensors of a file, or rows of one."""
    return any(s is not None and (s.data.whole if s.op == "weight" else s.name) in names for s in node.srcs)


def cut(output: Tensor, at: Tensor) -> Tensor:
    """The graph with the node `at` replaced by an input."""
    new = {id(at): Tensor("input", (), at.shape, at.type, name=WAIST)}
    for node in walk([output]):
        if id(node) not in new:
            srcs = tuple(None if s is None else new[id(s)] for s in node.srcs)
            new[id(node)] = node if all(a is b for a, b in zip(srcs, node.srcs, strict=True)) else replace(node, srcs=srcs)
    return new[id(output)]


class Yardstick:
    """A reference over chunks of tokens (chunks, n_ctx), against which variants of it are measured.

    first: the first token of a chunk whose logits are scored; by default as the perplexity tools do.
    Memory: the log-probabilities of all scored tokens, and the values at each waist.
    """

    def __init__(self, reference: Model, chunks: np.ndarray, *, first: int | None = None, n_ubatch: int = 512,
                 n_threads: int | None = None) -> None:
        self.reference = reference
        n_ctx = chunks.shape[1]
        self.first, self.at_once = first_scored(n_ctx) if first is None else first, max(1, n_ubatch // n_ctx)
        size = self.at_once * n_ctx
        self.context = Context(reference, n_ctx=size, n_batch=size, n_ubatch=size, n_threads=n_threads, exact=True)
        self.groups = [chunks[i:i + self.at_once] for i in range(0, len(chunks), self.at_once)]
        order = computed(self.context.output)
        self._waists = waists(order)
        self._runner = self._prepare(self.context.output, [order[i] for i in self._waists])
        self._expected: list[list[np.ndarray]] = []
        self._values: list[list[np.ndarray]] = []           # of each group, at each waist
        for group in self.groups:
            logits, *values = self._runner(group, None)
            self._expected.append([log_softmax(x) for x in logits.reshape(len(group), -1, reference.n_vocab)])
            self._values.append([v.copy() for v in values])

    @property
    def n_chunks(self) -> int:
        return sum(len(group) for group in self.groups)

    def with_tensors(self, tensors: Mapping[str, Any]) -> Tokens:
        """The scores of the reference with some of its tensors replaced by others of the same shape."""
        builder = Builder(overlay(self.reference.file, tensors), self.reference.config, self.context.cache, self.context.n_ctx)
        output = self.reference.graph(builder)
        order = computed(output)
        changed = next((i for i, node in enumerate(order) if reads(node, tensors)), 0)
        before = [n for n, i in enumerate(self._waists) if i < changed]
        run = self._prepare(cut(output, order[self._waists[before[-1]]]) if before else output)
        scores = Scores(self.n_chunks)
        for group, expected, values in zip(self.groups, self._expected, self._values, strict=True):
            logits = run(group, values[before[-1]] if before else None)[0].reshape(len(group), -1, self.reference.n_vocab)
            for i, target in enumerate(group[:, self.first + 1:]):
                scores.add(divergence(expected[i], logits[i], target))
        return scores.so_far

    def _prepare(self, output: Tensor, capture: list[Tensor] | None = None) -> Any:
        """A function (group of chunks, values at the waist) -> [logits, captured values ...], which the next call overwrites."""
        capture, n_ctx = capture or [], self.groups[0].shape[1]
        rows = n_ctx - 1 - self.first
        limits = {TOKENS: self.context.n_ctx, OUTPUTS: self.at_once * rows}
        if self.context.pool is None:
            from pyggml.backends.reference import ReferencePlan

            reference_plan = ReferencePlan([output, *capture])
        else:
            from pyggml.plan import Plan

            plan = Plan(output, self.reference.weights(repack=False, exact=True), limits, capture=capture)

        def run(group: np.ndarray, waist: np.ndarray | None) -> list[np.ndarray]:
            given = self._inputs(group) | ({} if waist is None else {WAIST: waist})
            sizes: dict[Any, int] = {TOKENS: group.size, OUTPUTS: len(group) * rows}
            if self.context.pool is None:
                return reference_plan.run(given)
            for name, array in plan.inputs.items():
                array[:len(given[name])] = given[name]
            plan.run(self.context.pool, sizes)
            return [x[:sizes[t.shape[0]]] for x, t in zip((plan.output, *plan.captured), (output, *capture), strict=True)]

        return run

    def _inputs(self, group: np.ndarray) -> dict[str, np.ndarray]:
        """The inputs of a graph (see Builder) for chunks side by side, each in its own share of the cache."""
        count, n = group.shape
        pos, first = np.tile(np.arange(n, dtype=np.int32), count), np.repeat(np.arange(count, dtype=np.int32) * n, n)
        wanted = (np.arange(count)[:, None] * n + np.arange(self.first, n - 1)).reshape(-1).astype(np.int32)
        tokens = with_bos(self.reference, group).reshape(-1)
        return {"tokens": tokens, "pos": pos, "cell": first + pos, "first": first, "wanted": wanted}


def overlay(file: TensorFile, tensors: Mapping[str, Any]) -> TensorFile:
    """`file` with some tensors replaced by others of the same shape."""
    return TensorFile(file.sources, file.kv, {**file.tensors, **tensors}, format=file.format, alignment=file.alignment,
                      data_offset=file.data_offset, order=file.order)


def in_memory(name: str, kind: TensorType, shape: tuple[int, ...], blocks: np.ndarray) -> FileTensor:
    """A tensor whose blocks (uint8) are in memory."""
    return FileTensor(Memory(np.ascontiguousarray(blocks), name), name, kind, shape, 0, blocks.nbytes)
