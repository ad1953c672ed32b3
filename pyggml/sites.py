"""Where values meet weights: the inputs of a graph's matrix products, for whoever gathers statistics of them (see Context's `watch`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyggml.graph import Tensor, walk
from pyggml.ops import OPS


@dataclass(frozen=True)
class Site:
    """A place where values meet weights: `x` is the input that the matrices `weights` multiply; `ids` picks experts, where there are any."""

    weights: tuple[str, ...]
    x: Tensor
    ids: Tensor | None


def find_sites(output: Tensor) -> list[Site]:
    """Every input of a matrix product in a graph, each once."""
    found: dict[tuple[int, int], tuple[Any, Any, dict[str, None]]] = {}
    for node in walk([output]):
        if not node.is_leaf and node.op != "reshape" and OPS[node.op].matmul:
            weight, x, *ids = node.srcs
            names = found.setdefault((id(x), id(ids[0]) if ids else 0), (x, ids[0] if ids else None, {}))[2]
            names[weight.data.whole] = None  # type: ignore[union-attr]
    return [Site(tuple(names), x, ids) for x, ids, names in found.values()]
