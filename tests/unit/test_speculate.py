"""Speculation: the same greedy text, the same sampled distribution, fewer native calls; and drafts that stop where they do not pay."""

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest

from pyggml import Llama, native, speculate
from pyggml import context as engine
from pyggml.errors import Cancelled, ContextOverflow, ParameterError, PyggmlError
from pyggml.model import Model
from pyggml.sampling import Candidates, Sampler, SamplingParams, draw_beside
from pyggml.sampling.choose import dense
from pyggml.speculate import MOST, Draft, DraftModel, Gate, PromptLookup, Speculation

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
BUNDLED = Path(__file__).parents[2] / "models" / "books6m-q8_0.gguf"
PROMPT = [1, 9, 12, 40, 9, 12, 41, 9, 12, 40]
needs_native = pytest.mark.skipif(native.lib is None, reason="counts native calls")


def Context(model, n_ctx):                      # noqa: N802  (one thread: these models are too small for more)
    return engine.Context(model, n_ctx=n_ctx, n_threads=1)


class Guesses:
    """Drafts with a plan: right guesses for some, wrong ones for others."""

    prior = 0.6

    def __init__(self, text, wrong_at=()):
        self.text, self.wrong_at = text, set(wrong_at)

    def draft(self, ids, n):
        at = len(ids)
        return Draft([t + (at + i in self.wrong_at) for i, t in enumerate(self.text[at:at + n])])


def generate(context, prompt, n, params=None):
    """n tokens as a decoding loop makes them."""
    sampler = Sampler(params or SamplingParams(temp=0.0))
    sampler.accept(*prompt)
    choose = Sampler.sample
    if isinstance(context, Speculation):
        context.use(sampler.params)
        choose = context.choose
    row, tokens = context.eval(prompt)[-1], []
    for _ in range(n):
        tokens.append(choose(sampler, row))
        sampler.accept(tokens[-1])
        row = context.eval(tokens[-1:])[-1]
    return tokens


@pytest.fixture(scope="module")
def model():
    return Model.load(GOLDEN / "stories260K.q4_k_m_mix.gguf")


# ---- drafts ----

def test_lookup_takes_the_longest_then_the_latest():
    draft = PromptLookup(max_ngram_size=3).draft(np.array([1, 2, 3, 4, 8, 2, 3, 5, 7, 2, 3, 6, 1, 2, 3], np.int32), 4)
    assert draft.tokens == [4, 8, 2, 3] and draft.kind == 3                     # 1 2 3 came once
    draft = PromptLookup(max_ngram_size=2).draft(np.array([2, 3, 5, 7, 2, 3, 6, 9, 2, 3], np.int32), 3)
    assert draft.tokens == [6, 9, 2] and draft.kind == 2


def test_lookup_goes_round():
    assert PromptLookup().draft(np.array([5, 7, 8, 9, 7, 8, 9], np.int32), 7).tokens == [7, 8, 9, 7, 8, 9, 7]
    assert PromptLookup().draft(np.array([4, 4], np.int32), 3).tokens == [4, 4, 4]


@pytest.mark.parametrize("ids", [[], [3], [1, 2, 3]])
def test_lookup_without_a_match(ids):
    assert PromptLookup().draft(np.array(ids, np.int32), 5).tokens == []


def test_lookup_as_a_callable():
    assert PromptLookup(2, num_pred_tokens=2)(np.array([1, 2, 3, 1, 2])).tolist() == [3, 1]


# ---- the same text ----

MODELS = ["llama_quant.q4_0", "llama_quant.iq4_xs", "llama_yarn.f16", "stories260K.bf16", "mixtral.q4_k_m_mix", "qwen2.q4_k_m_mix"]


@pytest.mark.parametrize("name", [*MODELS, "books6m"])
def test_greedy_is_the_same(name):
    model = Model.load(BUNDLED if name == "books6m" else GOLDEN / f"{name}.gguf")
    plain = generate(Context(model, n_ctx=128), PROMPT, 80)
    for gate in (True, False):
        ahead = Speculation(Context(model, n_ctx=128), PromptLookup(), gate=gate)
        assert generate(ahead, PROMPT, 80) == plain
    assert ahead.drafted > 0
    wrong = Speculation(Context(model, n_ctx=128), Guesses(PROMPT + plain, range(0, 128, 5)), gate=False)
    assert generate(wrong, PROMPT, 80) == plain and wrong.accepted > 50


@pytest.mark.parametrize("params", [SamplingParams(seed=3, temp=1.2), SamplingParams(seed=4, temp=0.9, repeat_penalty=1.3, top_k=0),
                                    SamplingParams(seed=5, mirostat=2, temp=1.0)], ids=["chain", "penalties", "mirostat"])
def test_a_seed_gives_the_same_text(model, params):
    plain = generate(Context(model, n_ctx=128), PROMPT, 80, params)
    for drafter in (PromptLookup(1), Guesses(PROMPT + plain, range(0, 128, 4))):
        ahead = Speculation(Context(model, n_ctx=128), drafter, gate=False)
        assert generate(ahead, PROMPT, 80, params) == plain and ahead.drafted > 0


@needs_native
def test_right_guesses_save_calls(model):
    plain = generate(Context(model, n_ctx=128), PROMPT, 80)
    context = Context(model, n_ctx=128)
    generate(Speculation(context, Guesses(PROMPT + plain), gate=False), PROMPT, 80)
    assert sum(plan.program.native_calls for plan in context._plans.values()) == 1 + 80 // (MOST + 1)


# ---- the same distribution ----

def chi_square(counts: np.ndarray, probability: np.ndarray) -> float:
    """(sum of squares - degrees of freedom) / its standard deviation, about normal; cells that expect little are one."""
    expected = probability * counts.sum()
    assert counts[expected == 0].sum() == 0
    few = expected < 5
    observed, expected = (np.append(x[~few], x[few].sum()) for x in (counts, expected))
    keep = expected > 0
    n = keep.sum() - 1
    return float((((observed - expected) ** 2)[keep] / expected[keep]).sum() - n) / np.sqrt(2 * max(n, 1))


@pytest.mark.parametrize("seed", range(4))
def test_a_draw_beside_a_draft_is_a_draw(seed):
    """For unlike distributions, subsets of the vocabulary among them."""
    rng = np.random.default_rng(seed)
    p = Candidates(rng.normal(size=30).astype(np.float32) * 2)
    q = Candidates(rng.normal(size=20).astype(np.float32) * 2, rng.permutation(30)[:20])
    if seed % 2:
        p = Candidates(p.logits[:12], rng.permutation(30)[:12])
    q_dense, p_dense = dense(q, 30), dense(p, 30)
    drafted = rng.choice(30, 20000, p=q_dense)
    drawn = np.array([draw_beside(p, int(d), q, 30, *rng.random(2))[0] for d in drafted])
    assert abs(chi_square(np.bincount(drawn, minlength=30), p_dense)) < 5
    assert np.mean(drawn == drafted) == pytest.approx(np.minimum(p_dense, q_dense).sum(), abs=0.02)        # as often as can be


CHAINS = [SamplingParams(seed=1, temp=1.3, top_k=6, top_p=0.98, min_p=0.01),
          SamplingParams(seed=2, temp=1.6, top_k=5, top_p=1.0, min_p=0.0, repeat_penalty=1.4, samplers=("penalties", "top_k", "temperature")),
          SamplingParams(seed=3, temp=1.0, top_k=0, top_p=0.6, min_p=0.0, typical_p=0.95, logit_bias={12: 2.0, 9: -np.inf})]


@pytest.mark.parametrize("params", CHAINS, ids=["top-k", "penalties", "typical"])
def test_sampled_text_is_distributed_the_same(model, params):
    """Pairs of tokens that a draft model guessed, against what the chain makes of the model's logits."""
    def final(context, prompt, tokens):
        sampler = Sampler(params)
        sampler.accept(*prompt)
        return dense(sampler.candidates(context.eval(tokens)[-1]), model.n_vocab)

    context = Context(model, n_ctx=64)
    first = final(context, PROMPT, PROMPT)
    joint = np.zeros((model.n_vocab, model.n_vocab))
    for token in np.flatnonzero(first):
        context.truncate(len(PROMPT))
        joint[token] = first[token] * final(context, [*PROMPT, token], [token])
    small = DraftModel(Context(Model.load(GOLDEN / "stories260K.q4_0.gguf"), n_ctx=64))
    ahead = Speculation(Context(model, n_ctx=64), small, n_max=3, gate=False)
    sampler = Sampler(params)
    ahead.use(params)
    counts = np.zeros_like(joint)
    for _ in range(2000):
        ahead.truncate(min(ahead.n_past, len(PROMPT) - 1))
        ahead.eval(PROMPT[:-1]) if not ahead.n_past else None
        sampler.forget()
        sampler.accept(*PROMPT)
        one = ahead.choose(sampler, ahead.eval(PROMPT[-1:])[-1])
        sampler.accept(one)
        two = ahead.choose(sampler, ahead.eval([one])[-1])
        counts[one, two] += 1
    assert abs(chi_square(counts.reshape(-1), joint.reshape(-1))) < 5
    assert 0.3 < ahead.accepted / ahead.drafted < 1


def test_a_draft_model_changes_no_greedy_text(model):
    small = DraftModel(Context(Model.load(GOLDEN / "stories260K.q4_0.gguf"), n_ctx=128))
    ahead = Speculation(Context(model, n_ctx=128), small, gate=False)
    assert generate(ahead, PROMPT, 100) == generate(Context(model, n_ctx=128), PROMPT, 100)
    assert 0 < ahead.accepted < ahead.drafted
    itself = Speculation(Context(model, n_ctx=128), DraftModel(Context(model, n_ctx=128)), gate=False)
    generate(itself, PROMPT, 100)
    assert itself.accepted == itself.drafted > 80


def test_p_min_ends_drafts(model):
    small = Context(model, n_ctx=64)
    ids = np.array(PROMPT, np.int32)
    assert len(DraftModel(small).draft(ids, 5).tokens) == 5
    assert DraftModel(small, p_min=1.01).draft(ids, 5).tokens == []


def test_vocabularies_must_agree(model):
    other = DraftModel(Context(Model.load(GOLDEN / "qwen2.q4_k_m_mix.gguf"), n_ctx=64))
    with pytest.raises(ParameterError, match="same vocabulary"):
        other.check(model)
    DraftModel(Context(Model.load(GOLDEN / "stories260K.q4_0.gguf"), n_ctx=64)).check(model)


# ---- whether it pays ----

def decided(gate, kind=0):
    return gate.best(kind, MOST)


def test_the_gate_measures_single_tokens_first():
    gate = Gate(0.6)
    assert decided(gate) == 0
    for _ in range(2):
        gate.tell_batch(1, 1.0)
    assert 0 < decided(gate) < MOST and 0 < decided(gate, 1) < decided(gate, 4)      # nothing is known of batches: try, not too many


@pytest.mark.parametrize(("right", "slope", "expected"), [(0.95, 0.02, {MOST}), (0.05, 0.2, {0}), (0.6, 0.15, {1, 2, 3}), (0.9, 1.0, {0})])
def test_the_gate_opens_where_it_pays(right, slope, expected):
    gate = Gate(0.6)
    for n in range(1, MOST + 2):
        for _ in range(3):
            gate.tell_batch(n, 1.0 + slope * (n - 1))
    rng = np.random.default_rng(0)
    for _ in range(60):
        gate.tell_guess(0, rng.random() < right)
    assert decided(gate) in expected


def test_kinds_are_told_apart():
    gate = Gate(0.6)
    for n in (1, 1, 2, 2):
        gate.tell_batch(n, 1.0 + 0.3 * (n > 1))
    for _ in range(50):
        gate.tell_guess(1, False)
        gate.tell_guess(4, True)
    assert decided(gate, 1) == 0 and decided(gate, 4) > 0


def test_a_closed_gate_opens_to_look_again():
    gate = Gate(0.6)
    for n in (1, 1, *range(2, MOST + 2), *range(2, MOST + 2)):
        gate.tell_batch(n, 1.0 + 0.3 * (n - 1))
    for _ in range(30):
        gate.tell_guess(0, False)
    assert decided(gate) == 0
    opened = 0
    for _ in range(3000):                   # guesses stay wrong: looks are few
        if k := decided(gate):
            opened += k
            gate.tell_guess(0, False)
        gate.tell_batch(1, 1.0)
    assert 0 < opened < 100


def test_a_slow_draft_is_not_worth_it():
    gate = Gate(0.8)
    for n in (1, 1, 2, 2):
        gate.tell_batch(n, 1.0)
    assert decided(gate) > 0
    gate.tell_draft(4, 4.0)
    assert decided(gate) == 0


# ---- a context in other respects ----

def test_it_goes_up_to_the_last_cell(model):
    text = generate(Context(model, n_ctx=41), PROMPT, 31)
    ahead = Speculation(Context(model, n_ctx=41), Guesses(PROMPT + text + [0] * 9), gate=False)
    assert generate(ahead, PROMPT, 31) == text and ahead.n_past == 41
    with pytest.raises(ContextOverflow, match="41"):
        ahead.eval([5])


def test_truncating_takes_guesses_back(model):
    plain = Context(model, n_ctx=64)
    ahead = Speculation(Context(model, n_ctx=64), Guesses([*PROMPT, *range(50, 90)]), gate=False)
    plain.eval([*PROMPT, 50, 51])
    ahead.eval(PROMPT)
    for token in (50, 51):
        ahead.eval([token])
    saved = ahead.save()
    assert saved[0].shape[1] == ahead.n_past == 12
    ahead.eval([52])
    ahead.truncate(12)
    plain.truncate(11)
    ahead.truncate(11)
    np.testing.assert_array_equal(ahead.eval([7]), plain.eval([7]))
    with pytest.raises(PyggmlError, match="keep 40"):
        ahead.truncate(40)
    ahead.restore(saved)
    assert ahead.n_past == 12


def test_all_and_none(model):
    ahead = Speculation(Context(model, n_ctx=64), Guesses([*PROMPT, *range(50, 90)]), gate=False)
    ahead.eval(PROMPT)
    ahead.eval([50])
    assert ahead.eval([51], "all").shape == (1, model.n_vocab) and ahead.eval([52, 60], "all").shape == (2, model.n_vocab)
    assert ahead.eval([61], "none").shape == (0, model.n_vocab) and ahead.n_past == len(PROMPT) + 5


@needs_native
def test_cancelling_from_another_thread(model):
    ahead = Speculation(engine.Context(model, n_ctx=4096, n_batch=4096, n_ubatch=8), DraftModel(Context(model, n_ctx=4096)))
    ahead.eval(PROMPT)
    threading.Timer(0.05, ahead.cancel).start()
    with pytest.raises(Cancelled):
        while True:
            ahead.reset()
            ahead.eval(np.ones(4000, np.int32))
    assert ahead.n_past == 0 and np.isfinite(ahead.eval([1, 2])).all()


# ---- Llama ----

def test_llama_with_drafts():
    plain, ahead = Llama(BUNDLED, n_ctx=128), Llama(BUNDLED, n_ctx=128, draft_model=PromptLookup())
    text = "He said that it was late, and she said that it was late, and he said"
    for options in ({"temperature": 0}, {"temperature": 0, "stop": ["late"]}, {"seed": 5}, {"temperature": 0, "logprobs": 2},
                    {"seed": 6, "stream": True}):
        answers = [llm(text, max_tokens=60, **options) for llm in (plain, ahead)]
        choices = [[c["choices"] for c in a] if options.get("stream") else a["choices"] for a in answers]
        assert choices[0] == choices[1]
    assert ahead._context.drafted > 0 and ahead.eval_tokens == plain.eval_tokens
    state = ahead.save_state()
    first = list(itertools.islice(ahead.generate([5, 6], temp=0), 5))
    ahead.load_state(state)
    assert ahead.eval_tokens == plain.eval_tokens
    assert list(itertools.islice(ahead.generate([5, 6], temp=0), 5)) == first


def test_llama_takes_a_model_file_and_a_callable():
    asked = []

    def guess(input_ids, /, **_):
        asked.append(len(input_ids))
        return np.array([input_ids[-1], 10**6])

    plain = Llama(BUNDLED, n_ctx=64)("The old house", max_tokens=30, temperature=0)["choices"]
    assert Llama(BUNDLED, n_ctx=64, draft_model=BUNDLED)("The old house", max_tokens=30, temperature=0)["choices"] == plain
    assert Llama(BUNDLED, n_ctx=64, draft_model=guess)("The old house", max_tokens=30, temperature=0)["choices"] == plain and asked
    with pytest.raises(ParameterError, match="draft_model=5"):
        Llama(BUNDLED, draft_model=5)


def test_speculate_knows_the_largest_small_batch():
    assert native.lib is None or native.lib.PYG_SMALL_COLS == speculate.MOST + 1
