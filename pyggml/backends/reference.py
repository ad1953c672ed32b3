"""The reference backend: every op by its numpy definition, weights decoded to float32. Slow, and the oracle of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyggml.graph import Tensor, walk
from pyggml.ops import OPS


class ReferencePlan:
    """Evaluates graph outputs with numpy. Decoded weights are kept, so that only the first run pays for them."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        self.outputs = list(outputs)
        self.order = list(walk(self.outputs))
        self._weights: dict[int, np.ndarray] = {}

    def run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs for these inputs; the symbols take their values from the inputs' shapes."""
        values: dict[int, Any] = {}
        for node in self.order:
            values[id(node)] = self._leaf(node, inputs) if node.is_leaf else self._compute(node, values)
        return [values[id(t)] for t in self.outputs]

    def _leaf(self, node: Tensor, inputs: dict[str, np.ndarray]) -> Any:
        if node.op == "input":
            return inputs[node.name]
        if node.op != "weight":
            return node.data
        if id(node) not in self._weights:
            self._weights[id(node)] = node.data.dequantize()
        return self._weights[id(node)]

    def _compute(self, node: Tensor, values: dict[int, Any]) -> Any:
        srcs: list[Any] = [None if s is None else values[id(s)] for s in node.srcs]
        if node.op == "reshape":
            return srcs[0].reshape(len(srcs[0]), *node.shape[1:])
        return OPS[node.op].reference(*srcs, **node.attrs)
