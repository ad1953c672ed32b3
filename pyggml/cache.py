"""The KV cache: per layer one tensor of keys and one of values, (n_kv, n_ctx, head_dim), of any type a row can take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyggml.errors import PyggmlError
from pyggml.native import huge_zeros
from pyggml.types import TensorType, tensor_type


@dataclass(eq=False)
class CacheTensor:
    """Keys or values of one layer. `raw` holds the rows as bytes: (n_kv, n_ctx, bytes of a row)."""

    name: str
    type: TensorType
    shape: tuple[int, int, int]
    raw: np.ndarray

    def write(self, cell: np.ndarray, x: np.ndarray) -> None:
        """Encode x (T, n_kv, head_dim) into the cells `cell` (T)."""
        from pyggml.quants import quantize

        rows = quantize(np.ascontiguousarray(x.transpose(1, 0, 2), dtype=np.float32), self.type.name)
        self.raw[:, cell] = rows.reshape(x.shape[1], x.shape[0], -1)

    def cells(self, n: int) -> np.ndarray:
        """A copy of the first `n` cells, uint8 (n_kv, n, bytes of a row)."""
        return self.raw[:, :n].copy()

    def put(self, cells: np.ndarray) -> None:
        """Write what `cells` gave into the first cells."""
        self.raw[:, :cells.shape[1]] = cells

    def read(self) -> np.ndarray:
        """All cells as float32 (n_kv, n_ctx, head_dim)."""
        from pyggml.quants import dequantize

        return dequantize(self.raw.reshape(-1, self.raw.shape[-1]), self.type.name).reshape(self.shape)


def host_tensor(layer: int, name: str, type: TensorType, shape: tuple[int, int, int]) -> CacheTensor:
    """A cache tensor in this machine's memory."""
    return CacheTensor(name, type, shape, huge_zeros(shape[0] * shape[1] * type.row_bytes(shape[2])).reshape(*shape[:2], -1))


class KVCache:
    """Keys and values of every layer for `n_ctx` cells. Which cell holds what is the context's business.

    new: makes the tensor of a layer, from the layer, a name, a type and a shape: where its memory is, is its maker's business.
    """

    def __init__(self, n_layers: int, n_kv: list[int], dim_k: int, dim_v: int, n_ctx: int, type_k: str = "F16", type_v: str = "F16",
                 new: Callable[..., Any] = host_tensor) -> None:
        self.n_ctx = n_ctx

        def tensor(letter: str, layer: int, kind: str, dim: int) -> Any:
            row = tensor_type(kind)
            if dim % row.block:
                raise PyggmlError(f"a {kind} cache needs a head size that is a multiple of {row.block}, not {dim}; use F16")
            return new(layer, f"cache_{letter}.{layer}", row, (n_kv[layer], n_ctx, dim))

        self.keys = [tensor("k", i, type_k, dim_k) for i in range(n_layers)]
        self.values = [tensor("v", i, type_v, dim_v) for i in range(n_layers)]

    @property
    def nbytes(self) -> int:
        return sum(t.raw.nbytes for t in self.tensors)

    @property
    def tensors(self) -> list[Any]:
        return [*self.keys, *self.values]

    def copy(self, n: int) -> list[np.ndarray]:
        """The first `n` cells of every tensor, uint8 (n_kv, n, bytes of a row)."""
        return [t.cells(n) for t in self.tensors]

    def put(self, cells: list[np.ndarray]) -> None:
        """Write what `copy` gave back into the first cells; PyggmlError when it came from a cache of another shape or type."""
        shapes = [(rows.shape[0], rows.shape[2]) for rows in cells]
        if shapes != [(t.shape[0], t.type.row_bytes(t.shape[2])) for t in self.tensors]:
            raise PyggmlError("the saved cache is of another model or type; restore it where type_k, type_v and the model are the same")
        for t, rows in zip(self.tensors, cells, strict=True):
            t.put(rows)
