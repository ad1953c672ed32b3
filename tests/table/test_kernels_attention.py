"""attention and attention_step against attention in double, over instruction sets, cache types, batches and head shapes."""

from copy import copy

import numpy as np
import pytest
from attention_reference import Batch, attention, random_cache, sequences
from kernel_case import ISAS, ROPE_NEOX, ROPE_NORM, THREADS, nmse, run
from rope_reference import rope, rope_table

CACHES = ["F32", "F16", "BF16", "Q8_0", "Q4_0"]
CACHES_AND_COARSE = [*[(cache, 0) for cache in CACHES], ("F16", 1), ("Q8_0", 1)]
EXACT, BF16_DOT = 2e-12, 4e-5           # NMSE of float arithmetic; of operands rounded to bf16

PREFILL = [
    sequences("one", (0, 0, 1)),
    sequences("prompt", (0, 0, 150)),
    sequences("deep", (0, 300, 40)),
    sequences("offset", (37, 37, 70)),
    sequences("two sequences", (0, 20, 33), (100, 100, 50)),
    sequences("interleaved lengths", *[(100 * i, 100 * i + 7 * i, 1 + i) for i in range(9)]),
    Batch("gaps", [0] * 5, [0, 2, 3, 9, 8]),
    Batch("blind token", [0, 5, 0], [6, 3, 7]),
]
STEPS = [
    sequences("first", (0, 0, 1)),
    *[sequences(f"{n} tokens", (0, 130, n)) for n in range(1, 9)],
    sequences("long", (0, 1100, 1)),
    sequences("long draft", (3, 900, 5)),
    sequences("parallel", *[(200 * i, 200 * i + 31 * i, 1) for i in range(8)]),
    sequences("parallel drafts", (0, 70, 3), (600, 900, 4)),
]
HEADS = [(1, 1, 64), (8, 1, 64), (4, 4, 32), (6, 2, 80), (14, 2, 64), (8, 2, 96), (2, 1, 128), (3, 1, 48), (2, 2, 256), (34, 2, 40)]


def bound(isa: str, cache_type: str, coarse: int) -> float:
    return BF16_DOT if isa in ("avx512bf16", "amx") and cache_type != "F32" and (coarse or cache_type == "BF16") else EXACT


class Case:
    """Operands of one attention step, and what it must give."""

    def __init__(self, batch: Batch, heads, cache_type="F32", window=0, softcap=0.0, roped=None, seed=3, spread=1.3, sinks=False):
        H, Hk, D = heads
        T, rng = len(batch.cell), np.random.default_rng(seed)
        self.batch, self.scale, self.window, self.softcap = batch, 1.3 / np.sqrt(D), window, softcap
        mask, written = batch.mask(window), batch.mask().any(0)
        shape = (Hk, batch.cells, D)
        self.k, k = random_cache(rng, cache_type, shape, written)
        self.v, v = random_cache(rng, cache_type, shape, written)
        # sources are columns of one wider matrix, as a joint q/k/v product leaves them
        joint = rng.standard_normal((T, H + 2 * Hk, D)).astype(np.float32)
        joint[:, H + Hk:] *= 0.7
        self.q, self.new_k, self.new_v = (joint[:, a:b] for a, b in ((0, H), (H, H + Hk), (H + Hk, H + 2 * Hk)))
        self.cache_view = {"type": cache_type, "shape": shape}
        q = self.q
        if roped is not None:
            inv_freq = 10000.0 ** -(np.arange(0, roped[1], 2) / roped[1])
            self.table = rope_table(batch.own_cells - batch.first_cells, inv_freq).astype(np.float32)
            q, key = rope(q, self.table, roped[0]), rope(self.new_k, self.table, roped[0])
            k[:, batch.own_cells], v[:, batch.own_cells] = key.transpose(1, 0, 2), self.new_v.transpose(1, 0, 2)
        self.sinks = 3 * rng.standard_normal(H).astype(np.float32) if sinks else None
        self.want = attention(q, k, v, mask, self.scale, softcap, self.sinks)
        self.dst = np.full((T, H * D), np.nan, np.float32)

    def common(self):
        return [(self.q, {"strides": self.q.strides[:-1]}), (self.k, self.cache_view), (self.v, self.cache_view),
                self.batch.own_cells, self.batch.first_cells]

    def attention(self, isa, threads=2, coarse=0, fixed=0) -> np.ndarray:
        run("attention", isa, self.dst, [*self.common(), self.sinks], i=[self.window, coarse, fixed], f=[self.scale, self.softcap], threads=threads)
        return self.dst

    def step(self, isa, roped, threads=2, coarse=0) -> np.ndarray:
        new = [(x, {"strides": x.strides[:-1]}) for x in (self.new_k, self.new_v)]
        run("attention_step", isa, self.dst, [*self.common(), *new, self.table, self.sinks], i=[self.window, *roped, coarse],
            f=[self.scale, self.softcap], threads=threads)
        return self.dst


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("batch", PREFILL, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention(isa, batch, heads):
    case = Case(batch, heads)
    assert nmse(case.attention(isa), case.want) < EXACT


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_type, coarse", CACHES_AND_COARSE)
@pytest.mark.parametrize("batch", PREFILL, ids=str)
@pytest.mark.parametrize("window, softcap, sinks", [(0, 0.0, False), (16, 0.0, True), (100, 30.0, False)])
def test_attention_caches(isa, cache_type, batch, window, softcap, sinks, coarse):
    case = Case(batch, (8, 2, 64), cache_type, window, softcap, sinks=sinks)
    assert nmse(case.attention(isa, coarse=coarse), case.want) < bound(isa, cache_type, coarse)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_coarse_attention_at_any_head_size(isa, heads):
    case = Case(PREFILL[4], heads, "F16")
    assert nmse(case.attention(isa, coarse=1), case.want) < bound(isa, "F16", 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("batch", [
    sequences("2 tokens", (0, 70, 2)), sequences("3 tokens", (5, 5, 3)), sequences("many", (0, 0, 300)),
    sequences("ragged", (0, 150, 70), (300, 301, 3), (340, 340, 270))], ids=str)
@pytest.mark.parametrize("heads, cache_type", [((2, 2, 64), "F16"), ((4, 1, 80), "F16"), ((8, 2, 128), "BF16"), ((8, 1, 64), "Q8_0")], ids=str)
@pytest.mark.parametrize("window", [0, 90])
def test_coarse_attention_of_few_and_many(isa, batch, heads, cache_type, window):
    case = Case(batch, heads, cache_type, window)
    assert nmse(case.attention(isa, coarse=1), case.want) < bound(isa, cache_type, 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("coarse", [0, 1])
def test_attention_where_the_maximum_rises(isa, coarse):
    """Scores so far apart that a later tile's maximum makes little of what came before; errors grow with them."""
    case = Case(PREFILL[1], (8, 2, 64), "F16", spread=6.0)
    assert nmse(case.attention(isa, coarse=coarse), case.want) < (6.0 / 1.3) ** 2 * bound(isa, "F16", coarse)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_type, coarse", [("F32", 0), ("F16", 0), ("F16", 1)])
def test_attention_is_the_same_with_any_threads(isa, cache_type, coarse):
    case = Case(PREFILL[4], (8, 2, 64), cache_type)
    first = case.attention(isa, threads=1, coarse=coarse).copy()
    for threads in THREADS[1:]:
        assert np.array_equal(case.attention(isa, threads, coarse), first)


def cut(case, at: int, end: int):
    """The tokens `at` .. `end` of a case as a case of their own, on the same cache."""
    part = copy(case)
    part.batch = Batch("part", case.batch.first[at:end], case.batch.cell[at:end])
    part.q, part.new_k, part.new_v, part.dst = case.q[at:end], case.new_k[at:end], case.new_v[at:end], case.dst[at:end].copy()
    part.table = None
    return part


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_type, coarse", CACHES_AND_COARSE)
@pytest.mark.parametrize("heads", [(8, 2, 64), (4, 4, 32), (34, 2, 96)], ids=str)
@pytest.mark.parametrize("window", [0, 21])
def test_fixed_attention_is_the_same_in_any_batch(isa, cache_type, heads, window, coarse):
    case = Case(sequences("two", (0, 20, 33), (100, 115, 50)), heads, cache_type, window)
    whole = case.attention(isa, coarse=coarse, fixed=1)
    assert nmse(whole, case.want) < bound(isa, cache_type, coarse)
    for at, end in ((0, 1), (0, 5), (4, 33), (30, 60), (70, 83), (82, 83)):
        assert np.array_equal(cut(case, at, end).attention(isa, coarse=coarse, fixed=1), whole[at:end])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_type", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("window", [0, 75, 300])
@pytest.mark.parametrize("start", [60, 253, 765])
def test_a_step_is_the_same_in_any_batch_of_its_sequence(isa, cache_type, heads, window, start):
    case = Case(sequences("draft", (5, start, 8)), heads, cache_type, window)
    case.table = None
    whole = case.step(isa, (ROPE_NORM, 0)).copy()
    for at, end in ((0, 1), (0, 3), (2, 8), (7, 8)):
        assert np.array_equal(cut(case, at, end).step(isa, (ROPE_NORM, 0)), whole[at:end])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("batch", STEPS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("kind", [ROPE_NORM, ROPE_NEOX])
def test_step(isa, batch, heads, kind):
    roped = (kind, heads[2] // 2 if kind == ROPE_NORM else heads[2])
    case = Case(batch, heads, roped=roped)
    assert nmse(case.step(isa, roped), case.want) < EXACT


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_type, coarse", CACHES_AND_COARSE)
@pytest.mark.parametrize("batch", STEPS, ids=str)
@pytest.mark.parametrize("window, softcap, sinks", [(0, 0.0, False), (70, 20.0, True)])
def test_step_caches(isa, cache_type, batch, window, softcap, sinks, coarse):
    roped = (ROPE_NORM, 64)
    case = Case(batch, (8, 2, 64), cache_type, window, softcap, roped, sinks=sinks)
    own = case.k[:, batch.own_cells].copy()
    got = case.step(isa, roped, coarse=coarse)
    assert not np.array_equal(case.k[:, batch.own_cells], own)
    # the reference keeps the new tokens in double; what the cache type loses of them is a part of the difference
    lost = {"F32": 0, "F16": 1e-7, "BF16": 1e-5, "Q8_0": 5e-5, "Q4_0": 3e-2}[cache_type]
    assert nmse(got, case.want) < bound(isa, cache_type, coarse) + lost


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("batch", [STEPS[9], STEPS[12]], ids=str)
def test_step_is_the_same_with_any_threads(isa, batch):
    roped = (ROPE_NEOX, 64)
    results = [Case(batch, (8, 2, 64), "F16", roped=roped).step(isa, roped, threads, coarse=1) for threads in THREADS]
    assert all(np.array_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("isa", ISAS)
def test_step_without_positions(isa):
    case = Case(STEPS[5], (8, 2, 64), roped=(ROPE_NORM, 64))
    case.k[:, case.batch.own_cells] = case.new_k.transpose(1, 0, 2)
    case.v[:, case.batch.own_cells] = case.new_v.transpose(1, 0, 2)
    want = attention(case.q, case.k.astype(np.float64), case.v.astype(np.float64), case.batch.mask(), case.scale)
    case.table = None
    case.k[:, case.batch.own_cells] = case.v[:, case.batch.own_cells] = np.nan
    assert nmse(case.step(isa, (ROPE_NORM, 0)), want) < EXACT
