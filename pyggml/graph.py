"""What a computation is: nodes over tensors of known shape, built by functions that the op table generates.

A graph is built once per kind of batch and then planned. Sizes that change between runs (how many tokens, how many rows of
logits) are symbols, not numbers, so that one graph serves every batch.

    g = Graph()
    x = g.get_rows(g.weight(embedding), g.input("tokens", (TOKENS,), "I32"))
    y = g.matmul(g.weight(w), g.rms_norm(x, g.weight(norm), eps=1e-5))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyggml.ops import OPS
from pyggml.shapes import Shape, Symbol


@dataclass(eq=False)
class Tensor:
    """A node: the value that `op` makes of `srcs`. Shapes are in numpy order, the contiguous dimension last.

    Leaves have the ops "weight" (data: a tensor of a model file), "const" (data: a numpy array), "input" (name) and
    "cache" (data: a cache tensor, see cache.py).
    """

    op: str
    srcs: tuple[Tensor | None, ...]
    shape: Shape
    type: str = "F32"
    attrs: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    data: Any = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of a node that has no symbols in its shape: a weight, a constant, a cache."""
        numbers = tuple(d for d in self.shape if not isinstance(d, Symbol))
        if len(numbers) < len(self.shape):
            raise TypeError(f"{self} has sizes that are known only when the graph runs")
        return numbers

    @property
    def is_leaf(self) -> bool:
        return self.op in LEAVES

    def __repr__(self) -> str:
        return f"{self.name or self.op}{list(self.shape)}:{self.type}"


LEAVES = ("weight", "const", "input", "cache")


class Graph:
    """Builds nodes. Every op of the op table is a method: `g.rope(x, table, mode=...)`."""

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}
        self._scope = ""

    def weight(self, tensor: Any) -> Tensor:
        """A tensor of a model file; asked for twice it is one node."""
        if tensor.name not in self._weights:
            self._weights[tensor.name] = Tensor("weight", (), tuple(tensor.shape), tensor.type.name, name=tensor.name, data=tensor)
        return self._weights[tensor.name]

    def const(self, array: np.ndarray, name: str = "") -> Tensor:
        kind = {np.dtype(np.float32): "F32", np.dtype(np.int32): "I32"}[array.dtype]
        return Tensor("const", (), array.shape, kind, name=name, data=np.ascontiguousarray(array))

    def input(self, name: str, shape: Shape, type: str = "F32") -> Tensor:
        return Tensor("input", (), shape, type, name=name)

    def cache(self, tensor: Any) -> Tensor:
        return Tensor("cache", (), tuple(tensor.shape), tensor.type.name, name=tensor.name, data=tensor)

    def reshape(self, x: Tensor, shape: Shape) -> Tensor:
        """The same elements under another shape."""
        return Tensor("reshape", (x,), shape, x.type)

    def __getattr__(self, op: str) -> Callable[..., Tensor]:
        if op not in OPS:
            raise AttributeError(f"no op {op!r} in the op table")
        row = OPS[op]

        def build(*srcs: Tensor | None, name: str = "", **attrs: Any) -> Tensor:
            given = {**row.defaults, **attrs}
            unknown = set(given) - set(row.defaults)
            if unknown:
                raise TypeError(f"op {op} has no attribute {unknown.pop()!r}")
            return Tensor(op, srcs, row.shape(*srcs, **given), row.type or srcs[0].type, given, name)  # type: ignore[union-attr]

        return build


def walk(outputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """Every node that the outputs need, sources before users; leaves included."""
    done: set[int] = set()
    stack: list[tuple[Tensor, bool]] = [(t, False) for t in reversed(outputs)]
    while stack:
        node, expanded = stack.pop()
        if id(node) in done:
            continue
        if expanded:
            done.add(id(node))
            yield node
        else:
            stack.append((node, True))
            stack.extend((s, False) for s in reversed(node.srcs) if s is not None and id(s) not in done)


def replace(outputs: Sequence[Tensor], new: dict[int, Tensor]) -> list[Tensor]:
    """The outputs of the same graph with other nodes in the place of those whose id is in `new`; what does not depend on them is shared."""
    made = dict(new)
    for node in walk(outputs):
        if id(node) not in made:
            srcs = tuple(None if s is None else made[id(s)] for s in node.srcs)
            same = all(a is b for a, b in zip(srcs, node.srcs, strict=True))
            made[id(node)] = node if same else Tensor(node.op, srcs, node.shape, node.type, node.attrs, node.name, node.data)
    return [made[id(t)] for t in outputs]
