"""Sampling: every step against its definition written out plainly, drawn frequencies against exact probabilities, bad input."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyggml import native, sampling
from pyggml.errors import ParameterError, PyggmlError
from pyggml.sampling import Candidates, Sampler, SamplingParams, steps

logit_lists = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=300)
seeds = st.integers(0, 2**31)


def candidates(values) -> Candidates:
    return Candidates(np.array(values, np.float32))


def ids(c: Candidates) -> list[int]:
    return list(range(c.logits.size)) if c.ids is None else c.ids.tolist()


def falling(values) -> list[int]:
    """Indices from the largest value to the smallest."""
    return sorted(range(len(values)), key=lambda i: -values[i])


def exact(values) -> np.ndarray:
    p = np.exp(np.array(values, np.float64) - max(values))
    return p / p.sum()


# ---- definitions, without any cleverness ----

def define_top_k(values, k):
    return set(falling(values)[:k])


def define_top_p(values, p):
    total, kept = 0.0, []
    for i in falling(values):
        kept.append(i)
        total += exact(values)[i]
        if total >= p:
            break
    return kept


def define_typical(values, p):
    probability = exact(values)
    entropy = -sum(q * math.log(q) for q in probability if q > 0)
    distance = [abs(-math.log(q) - entropy) if q > 0 else math.inf for q in probability]
    total, kept = 0.0, []
    for i in sorted(range(len(values)), key=lambda i: distance[i]):
        kept.append(i)
        total += probability[i]
        if total > p:
            break
    return kept


@pytest.mark.parametrize("n", [1, 7, 300, 5000])
@pytest.mark.parametrize("k", [1, 2, 40, 299, 10000])
def test_top_k(n, k):
    values = np.random.default_rng(n + k).normal(size=n).astype(np.float32)
    c = steps.top_k(candidates(values), k)
    assert ids(c) == falling(values)[:k]
    assert c.sorted and np.array_equal(c.logits, values[ids(c)])


@given(logit_lists, st.integers(1, 320))
def test_top_k_keeps_the_largest(values, k):
    c = steps.top_k(candidates(values), k)
    assert sorted(c.logits.tolist()) == sorted(values)[-k:]             # as values: equal logits are interchangeable
    assert len(set(ids(c))) == c.logits.size


def test_top_k_of_equal_logits_does_not_keep_more():
    assert len(ids(steps.top_k(candidates(np.ones(20000)), 40))) == 40


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_top_p(p, scale):
    values = (np.random.default_rng(3).normal(size=4000) * scale).astype(np.float32)
    kept = ids(steps.top_p(candidates(values), p))
    assert abs(len(kept) - len(define_top_p(values, p))) <= 1           # float32 may fall on either side of p
    assert kept == falling(values)[:len(kept)]


@given(logit_lists, st.floats(0, 1))
def test_top_p_reaches_p_and_no_more(values, p):
    kept = ids(steps.top_p(candidates(values), p))
    mass = exact(values)[kept]
    assert mass.sum() >= p - 1e-5
    assert mass[:-1].sum() < p + 1e-5 or len(kept) == 1


@given(logit_lists, st.floats(0, 1))
def test_min_p(values, p):
    probability = exact(values)
    kept = ids(steps.min_p(candidates(values), p))
    ratio = probability / probability.max()
    assert all(ratio[i] >= p * (1 - 1e-4) for i in kept)
    assert all(ratio[i] <= p * (1 + 1e-4) for i in set(range(len(values))) - set(kept))
    assert int(np.argmax(values)) in kept


@pytest.mark.parametrize("p", [0.0, 0.2, 0.7, 0.95])
def test_typical(p):
    values = (np.random.default_rng(5).normal(size=200) * 2).astype(np.float32)
    assert ids(steps.typical(candidates(values), p)) == define_typical(values, p)


@pytest.mark.parametrize("step", [steps.top_p, steps.min_p, steps.typical])
def test_min_keep(step):
    values = np.linspace(0, 50, 100)
    strict = {steps.min_p: 1.0}.get(step, 0.0)
    assert len(ids(step(candidates(values), strict))) == 1
    assert len(ids(step(candidates(values), strict, 7))) == 7


@pytest.mark.parametrize("name", list(sampling.SAMPLERS))
def test_a_neutral_parameter_changes_nothing(name):
    neutral = SamplingParams(temp=1.0, top_k=0, top_p=1.0, min_p=0.0)
    sampler = Sampler(neutral)
    sampler.accept(1, 2, 2)
    c = candidates([3, 1, 2])
    assert sampling.SAMPLERS[name](c, sampler.params, sampler.counts) is c


def test_penalties():
    logits = [2.0, -2.0, 1.0, 0.5]
    c = steps.penalties(candidates(logits), {0: 3, 1: 1}, repeat=2.0, frequency=0.1, presence=0.25)
    assert c.logits == pytest.approx([1.0 - 0.3 - 0.25, -4.0 - 0.1 - 0.25, 1.0, 0.5])
    chosen = Candidates(np.array([2.0, 1.0], np.float32), np.array([7, 3]))      # after top-k: ids are no longer indices
    assert steps.penalties(chosen, {3: 1, 5: 1}, presence=1.0).logits.tolist() == [2.0, 0.0]


def test_penalties_see_the_last_tokens_only():
    sampler = Sampler(SamplingParams(repeat_last_n=3))
    sampler.accept(1, 2, 3, 4, 4)
    assert sampler.counts == Counter({3: 1, 4: 2})
    for n, expected in ((0, 0), (-1, 1000)):
        sampler = Sampler(SamplingParams(repeat_last_n=n))
        sampler.accept(*range(1000))
        assert sum(sampler.counts.values()) == expected


def test_greedy_is_the_first_largest():
    assert Sampler(SamplingParams(temp=0)).sample(np.array([1, 5, 5, 2], np.float32)) == 1
    assert Sampler(SamplingParams(temp=0.0, top_p=0.1)).sample(np.array([1, 5, 5, 2], np.float32)) == 1


@given(logit_lists, st.floats(0, 1, exclude_max=True))
def test_draw_lays_probabilities_end_to_end(values, u):
    token, p = sampling.draw(candidates(values), u)
    probability = exact(values)
    ends = np.cumsum(probability)
    assert p == pytest.approx(probability[token], rel=1e-4)
    assert ends[token] - probability[token] - 1e-5 <= u <= ends[token] + 1e-5


def chi_square(counts: Counter, probability: dict[int, float], n: int) -> float:
    assert set(counts) <= set(probability)
    return sum((counts[i] - n * p) ** 2 / (n * p) for i, p in probability.items())


@pytest.mark.parametrize("given_params", [
    {"temp": 1.0}, {"temp": 0.5}, {"temp": 2.0}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.3}, {"typical_p": 0.5},
    {"top_k": 12, "top_p": 0.9, "min_p": 0.1, "temp": 0.8}, {"logit_bias": {3: 2.0, 7: -math.inf}}, {"repeat_penalty": 1.5, "presence_penalty": 0.5},
], ids=str)
def test_frequencies(given_params):
    """Tokens are drawn as often as the definitions say (chi-square, 6,000 draws, p = 1e-6)."""
    values = [float(v) for v in np.random.default_rng(11).normal(size=20) * 1.5]
    params = SamplingParams(**{"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 42, **given_params})
    sampler = Sampler(params)
    sampler.accept(0, 1, 1)
    expected = list(values)
    for token, bias in params.logit_bias.items():
        expected[token] += bias
    for token in (0, 1):
        e = expected[token]
        expected[token] = (e * params.repeat_penalty if e <= 0 else e / params.repeat_penalty) - params.presence_penalty
    kept = set(range(20))
    if params.top_k:
        kept = define_top_k(expected, params.top_k)
    for share, define in ((params.typical_p, define_typical), (params.top_p, define_top_p)):
        if share < 1:
            rest = sorted(kept)
            kept = {rest[i] for i in define([expected[i] for i in rest], share)}
    best = max(expected)
    kept = {i for i in kept if math.exp(expected[i] - best) >= params.min_p and expected[i] > -math.inf}
    weight = {i: math.exp((expected[i] - best) / params.temp) for i in kept}
    probability = {i: w / sum(weight.values()) for i, w in weight.items()}
    n = 6000
    logits = np.array(values, np.float32)
    counts = Counter(sampler.sample(logits) for _ in range(n))
    assert chi_square(counts, probability, n) < 70          # 19 degrees of freedom: the 1e-6 quantile is 65
    assert np.array_equal(logits, np.array(values, np.float32))


def test_frequencies_over_a_large_vocabulary():
    """Drawing by blocks is fair inside and across blocks."""
    values = np.random.default_rng(2).normal(size=3000).astype(np.float32)
    sampler = Sampler(SamplingParams(temp=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1))
    counts = np.bincount([sampler.sample(values) for _ in range(20000)], minlength=3000)
    groups, probability = counts.reshape(100, 30).sum(1), exact(values).reshape(100, 30).sum(1)
    assert ((groups - 20000 * probability) ** 2 / (20000 * probability)).sum() < 175        # 99 degrees of freedom, 1e-6 quantile 177


def test_mirostat_holds_the_surprise_it_aims_at():
    values = np.random.default_rng(8).normal(size=2000).astype(np.float32) * 2
    surprise = -np.log2(exact(values))
    sampler = Sampler(SamplingParams(mirostat=2, mirostat_tau=4.0, temp=1.0, seed=5))
    drawn = [sampler.sample(values) for _ in range(4000)]
    limit = sampler.mu
    assert np.mean([surprise[i] for i in drawn[200:]]) < 8                # bounded by mu, which is near it
    mu, tau, eta = 8.0, 4.0, 0.1
    kept = steps.mirostat_v2(candidates(values), mu)
    assert kept.ids.tolist() == [i for i in range(2000) if surprise[i] <= mu]
    token, p = sampling.draw(kept, 0.3)
    assert p == pytest.approx(exact(values)[token] / exact(values)[kept.ids].sum(), rel=1e-3)
    assert steps.mirostat_next(mu, p, tau, eta) == pytest.approx(mu - eta * (-math.log2(p) - tau), rel=1e-3)
    assert 0 < limit < 12


def test_mirostat_always_keeps_one():
    assert steps.mirostat_v2(candidates([1.0, 3.0, 2.0]), -5.0).ids.tolist() == [1]


@given(logit_lists, seeds, st.integers(0, 50), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 3))
def test_any_parameters_give_a_token_that_is_possible(values, seed, top_k, top_p, min_p, typical_p, temp):
    values = [v if i % 3 else -math.inf for i, v in enumerate(values)] + [0.0]
    sampler = Sampler(SamplingParams(seed=seed, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p, temp=temp))
    logits = np.array(values, np.float32)
    token = sampler.sample(logits)
    assert isinstance(token, int) and logits[token] > -math.inf


@given(seeds)
def test_a_seed_repeats_itself(seed):
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    first, second = (Sampler(SamplingParams(seed=seed)) for _ in range(2))
    drawn = [first.sample(values) for _ in range(20)]
    assert [second.sample(values) for _ in range(20)] == drawn
    first.reset()
    assert [first.sample(values) for _ in range(20)] == drawn


USUAL = [dict(), dict(top_k=1), dict(top_k=256, top_p=0.5), dict(top_k=7, min_p=0.0), dict(top_p=1.0, min_p=0.3), dict(top_p=0.0, min_keep=3),
         dict(min_p=1.0, min_keep=2), dict(temp=0.05), dict(temp=3.0, top_p=0.99), dict(repeat_penalty=1.3, frequency_penalty=0.2),
         dict(logit_bias={3: -math.inf, 5: 2.0})]


@pytest.mark.skipif(native.lib is None, reason="compares the native draw with the chain")
@pytest.mark.parametrize("given_params", USUAL, ids=str)
def test_the_native_draw_is_the_chain(given_params):
    """The same numbers fall on tokens of the same logit, but for one that lies on the border between two."""
    params = SamplingParams(seed=7, **given_params)
    quick, chain = Sampler(params), Sampler(params)
    chain._usual = False
    assert quick._usual
    rng, different = np.random.default_rng(3), 0
    for i in range(300):
        size = rng.choice([1, 6, 15, 16, 17, 300, 4096]) if params.unmoved else 200
        logits = rng.normal(0, rng.choice([0.5, 3, 10]), size).astype(np.float32)
        if i % 3 == 0:
            logits = np.round(logits)                                           # many are equal
        if i % 5 == 0:
            logits[1:][rng.random(logits.size - 1) < 0.5] = -np.inf
        token = quick.sample(logits)
        other = chain.sample(logits)
        different += logits[token] != logits[other]                             # the chain keeps any k of equal ones
        for sampler in (quick, chain):
            sampler.accept(other)
    assert different <= 1


def test_what_the_native_draw_leaves_to_the_chain():
    for given_params in (dict(top_k=0), dict(top_k=257), dict(typical_p=0.9), dict(mirostat=2), dict(temp=0.0), dict(samplers=("top_k",))):
        assert not SamplingParams(**given_params).usual


@pytest.mark.parametrize("seed", [None, -1, sampling.RANDOM_SEED])
def test_no_seed_is_a_fresh_one(seed):
    assert len({Sampler(SamplingParams(seed=seed)).seed for _ in range(5)}) > 1


def test_logprobs():
    values = np.random.default_rng(4).normal(size=500).astype(np.float32)
    own, best = sampling.top_logprobs(values, 17, 5)
    expected = np.log(exact(values))
    assert own == pytest.approx(expected[17], abs=1e-5)
    assert [token for token, _ in best] == falling(values)[:5]
    assert [p for _, p in best] == pytest.approx([expected[token] for token, _ in best], abs=1e-5)
    assert sampling.top_logprobs(values, 17, 0)[1] == []


@pytest.mark.parametrize(("name", "value"), [
    ("temp", math.nan), ("temp", -0.1), ("temp", math.inf), ("top_k", -2), ("top_k", 1.5), ("top_p", 1.1), ("top_p", math.nan), ("min_p", -0.1),
    ("typical_p", 2), ("repeat_last_n", -2), ("repeat_penalty", 0.0), ("repeat_penalty", -1.0), ("frequency_penalty", math.inf),
    ("presence_penalty", math.nan), ("mirostat", 1), ("mirostat", 3), ("mirostat_tau", -1), ("mirostat_eta", math.nan), ("min_keep", -1),
    ("seed", -7), ("seed", 0.5), ("top_k", True), ("top_p", "0.9"),
])
def test_nonsense_is_refused_by_name(name, value):
    with pytest.raises(ParameterError, match=f"^{name}="):
        SamplingParams(**{name: value})


def test_other_nonsense_is_refused():
    with pytest.raises(ParameterError, match="logit_bias of token 3"):
        SamplingParams(logit_bias={3: math.nan})
    with pytest.raises(ParameterError, match="token 9"):
        Sampler(SamplingParams(logit_bias={9: 1.0})).sample(np.zeros(4, np.float32))
    with pytest.raises(ParameterError, match="'topk'.*top_k"):
        SamplingParams(samplers=("topk",))


@pytest.mark.parametrize("params", [{}, {"temp": 0.0}, {"top_k": 0}, {"mirostat": 2}], ids=str)
@pytest.mark.parametrize(("bad", "message"), [(math.nan, "1 of 5000 logits are NaN"), (math.inf, "1 are infinite")])
def test_unusable_logits_are_an_error(params, bad, message):
    logits = np.random.default_rng(1).normal(size=5000).astype(np.float32)
    logits[4321] = bad
    with pytest.raises(PyggmlError, match=message):
        Sampler(SamplingParams(**params)).sample(logits)


def test_all_tokens_forbidden_is_an_error():
    with pytest.raises(PyggmlError, match="every token is forbidden"):
        Sampler().sample(np.full(10, -math.inf, np.float32))
