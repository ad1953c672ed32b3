"""The planner: random graphs computed by the native plan and by the numpy reference agree; what a plan promises about itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml import native, quants
from pyggml.cache import KVCache
from pyggml.graph import Graph, Tensor
from pyggml.shapes import OUTPUTS, TOKENS
from pyggml.types import TensorType, tensor_type

pytestmark = pytest.mark.skipif(native.lib is None, reason="plans run on the native backend")
DIM, HEADS, KV_HEADS, HEAD_DIM, CELLS = 64, 4, 2, 16, 32


@dataclass
class Weight:
    """What a graph needs of a tensor of a file."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    raw: np.ndarray
    mapped = False

    def dequantize(self) -> np.ndarray:
        return quants.dequantize(self.raw, self.type.name).reshape(self.shape)


def weight(rng: np.random.Generator, name: str, shape: tuple[int, ...], kind: str = "F32") -> Weight:
    values = rng.standard_normal(shape, dtype=np.float32) / np.sqrt(shape[-1]) + (len(shape) == 1)
    return Weight(name, tensor_type(kind), shape, quants.quantize(np.ascontiguousarray(values), kind))


class RandomGraph:
    """A graph put together by drawing ops; every value is (T, DIM). Where activations are rounded every expert is used, as a rounded tie
    would choose another one."""

    KINDS = ("linear", "add", "mul", "norm", "ffn", "attention", "scale", "softcap", "experts")

    def __init__(self, draw, seed: int, exact: bool) -> None:
        self.draw, self.rng, self.g = draw, np.random.default_rng(seed), Graph()
        self.n_used = 2 if exact else 4
        self.tokens = self.g.input("tokens", (TOKENS,), "I32")
        self.cell = self.g.input("cell", (TOKENS,), "I32")
        self.first = self.g.input("first", (TOKENS,), "I32")
        self.wanted = self.g.input("wanted", (OUTPUTS,), "I32")
        self.cache = KVCache(8, [KV_HEADS] * 8, HEAD_DIM, HEAD_DIM, CELLS, "F32", "F32")
        self.layer = 0
        self.pool = [self.g.get_rows(self.g.weight(self.new((20, DIM))), self.tokens)]
        for _ in range(draw(st.integers(1, 9))):
            self.pool.append(getattr(self, draw(st.sampled_from(self.KINDS)))())
        self.output = self.linear() if draw(st.booleans()) else self.g.get_rows(self.pool[-1], self.wanted)

    def new(self, shape, kind="F32") -> Weight:
        return weight(self.rng, f"w{self.rng.integers(1 << 40)}", shape, kind)

    def pick(self) -> Tensor:
        return self.draw(st.sampled_from(self.pool[-4:]))

    def matrix(self, out: int = DIM, k: int = DIM) -> Tensor:
        return self.g.weight(self.new((out, k), self.draw(st.sampled_from(["F32", "F16", "Q8_0", "Q4_0"]))))

    def linear(self) -> Tensor:
        y = self.g.matmul(self.matrix(), self.pick(), scale=self.draw(st.sampled_from([1.0, 0.5])))
        return self.g.add(y, self.g.weight(self.new((DIM,)))) if self.draw(st.booleans()) else y

    def add(self) -> Tensor:
        return self.g.add(self.pick(), self.pick())

    def mul(self) -> Tensor:
        return self.g.mul(self.norm(), self.norm())

    def scale(self) -> Tensor:
        return self.g.scale(self.pick(), factor=0.7)

    def softcap(self) -> Tensor:
        return self.g.softcap(self.pick(), cap=2.0)

    def norm(self) -> Tensor:
        return self.g.rms_norm(self.pick(), self.g.weight(self.new((DIM,))), eps=1e-5)

    def ffn(self) -> Tensor:
        x = self.norm()
        kind = self.draw(st.sampled_from(["silu", "gelu", "relu", "clamped"]))
        h = self.g.glu(self.g.matmul(self.matrix(96), x), self.g.matmul(self.matrix(96), x), kind=kind)
        return self.g.add(self.g.matmul(self.matrix(DIM, 96), h), self.pick())

    def experts(self) -> Tensor:
        x = self.norm()
        logits = self.g.matmul(self.matrix(4), x)
        ids = self.g.moe_ids(logits, n_used=self.n_used)
        gate, up, down = (self.g.weight(self.new(s)) for s in ((4, 32, DIM), (4, 32, DIM), (4, DIM, 32)))
        biases = [[self.g.weight(self.new((4, n)))] if self.draw(st.booleans()) else [] for n in (32, 32, DIM)]
        h = self.g.glu(self.g.matmul_id(gate, x, ids, *biases[0]), self.g.matmul_id(up, x, ids, *biases[1]), kind="silu")
        return self.g.add(self.g.moe_sum(self.g.matmul_id(down, h, ids, *biases[2]), self.g.moe_weights(logits, ids)), self.pick())

    def attention(self) -> Tensor:
        if self.layer == 8:
            return self.add()
        x, layer = self.norm(), self.layer
        self.layer += 1
        table = self.g.rope_table(self.cell, self.g.const(np.float32([1, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4])))
        mode = self.draw(st.sampled_from(["norm", "neox"]))
        q = self.g.rope(self.g.reshape(self.g.matmul(self.matrix(HEADS * HEAD_DIM), x), (TOKENS, HEADS, HEAD_DIM)), table, mode=mode)
        k = self.g.rope(self.g.reshape(self.g.matmul(self.matrix(KV_HEADS * HEAD_DIM), x), (TOKENS, KV_HEADS, HEAD_DIM)), table, mode=mode)
        v = self.g.reshape(self.g.matmul(self.matrix(KV_HEADS * HEAD_DIM), x), (TOKENS, KV_HEADS, HEAD_DIM))
        keys = self.g.store(self.g.cache(self.cache.keys[layer]), k, self.cell)
        values = self.g.store(self.g.cache(self.cache.values[layer]), v, self.cell)
        sinks = [self.g.weight(self.new((HEADS,)))] if self.draw(st.booleans()) else []
        a = self.g.attention(q, keys, values, self.cell, self.first, *sinks, scale=HEAD_DIM**-0.5, window=self.draw(st.sampled_from([0, 3])))
        return self.g.add(self.g.matmul(self.matrix(), a), self.pick())


@settings(max_examples=60)
@given(st.data(), st.integers(1, 20), st.integers(0, 1 << 30), st.sampled_from([1, 2, 3]), st.booleans())
def test_random_graphs_agree_with_the_reference(data, n_tokens, seed, n_threads, exact):
    from pyggml.backends.cpu import Pool, WeightStore
    from pyggml.backends.reference import ReferencePlan
    from pyggml.plan import SMALL, Plan

    built = RandomGraph(data.draw, seed, exact)
    limit = SMALL if n_tokens <= SMALL else 24
    plan = Plan(built.output, WeightStore(exact=exact), {TOKENS: limit, OUTPUTS: limit})
    n_out = data.draw(st.integers(1, n_tokens))
    inputs = {"tokens": data.draw(st.lists(st.integers(0, 19), min_size=n_tokens, max_size=n_tokens)), "cell": range(n_tokens),
              "first": [0] * n_tokens, "wanted": sorted(data.draw(st.sets(st.integers(0, n_tokens - 1), min_size=n_out, max_size=n_out)))}
    inputs = {k: np.asarray(v, np.int32) for k, v in inputs.items()}
    for name, values in inputs.items():
        if name in plan.inputs:
            plan.inputs[name][:len(values)] = values
    pool = Pool(n_threads)
    rows = n_out if built.output.shape[0] is OUTPUTS else n_tokens
    for _ in range(2):                                     # the second run finds weights packed and buffers used
        assert plan.run(pool, {TOKENS: n_tokens, OUTPUTS: n_out})
    mine = plan.output[:rows].copy()
    expected = ReferencePlan([built.output]).run(inputs)[0]
    error = np.linalg.norm(mine - expected) / max(1e-9, np.linalg.norm(expected))
    assert error < (1e-4 if exact else 0.05)
