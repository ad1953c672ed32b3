"""What a context promises: one native call and no lasting allocation per token, pieces that add up, refusals that name both sizes."""

import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pyggml import native
from pyggml.context import Context
from pyggml.crew import Crew
from pyggml.errors import Cancelled, ContextOverflow, PyggmlError
from pyggml.model import Model

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
needs_native = pytest.mark.skipif(native.lib is None, reason="counts native calls")


@pytest.fixture(scope="module")
def model():
    return Model.load(GOLDEN / "llama_quant.q4_k.gguf")


@pytest.fixture
def context(model):
    return Context(model, n_ctx=128, n_threads=2)


@needs_native
def test_a_token_is_one_native_call(context):
    context.eval([1, 2, 3])
    program = context.plan(1, 1).program
    before = program.native_calls
    for token in range(20):
        context.eval([token])
    assert program.native_calls - before == 20


@needs_native
def test_single_tokens_after_batches_are_as_those_of_a_batch(context):
    """Single tokens go a short way of their own (Context._follow): batches between them leave nothing behind that it relies on."""
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    expected = context.eval(tokens[:8], "all").copy(), context.sequences(np.array([[7], [8]]), 9, [0]), context.eval(tokens[8:], "all").copy()
    context.reset()
    rows = [context.eval([token])[0].copy() for token in tokens[:3]]
    rows += [*context.eval(tokens[3:6], "all").copy()]
    rows += [context.eval(np.array([token]), "all")[0].copy() for token in tokens[6:8]]
    np.testing.assert_array_equal(rows, expected[0])
    context.sequences(np.array([[7], [8]]), 9, [0])
    rows = [context.eval(np.array(tokens[at:at + 1]))[0].copy() for at in range(8, 12)]
    np.testing.assert_array_equal(rows, expected[2])
    assert context.n_past == len(tokens)
    with pytest.raises(PyggmlError, match="token -1 is outside"):
        context.eval([-1])
    with pytest.raises(PyggmlError, match="'first'; it must be last, all or none"):
        context.eval([1], "first")
    assert context.eval([1], "none").shape == (0, context.model.n_vocab) and context.eval(np.array([[1, 2]])).shape == (1, context.model.n_vocab)


@needs_native
def test_a_prompt_is_one_native_call_per_batch(model):
    context = Context(model, n_ctx=128, n_ubatch=16)
    context.eval(range(48))
    assert context.plan(16, 1).program.native_calls == 3


@needs_native
def test_tokens_leave_no_memory_behind(context):
    context.eval([1])
    scratch = context.plan(1, 1)
    tracemalloc.start()
    for token in range(10):
        context.eval([token])
    before = tracemalloc.take_snapshot()
    for token in range(50):
        context.eval([token])
    grown = tracemalloc.take_snapshot().compare_to(before, "filename")
    tracemalloc.stop()
    inside = sum(s.size_diff for s in grown if "pyggml" in s.traceback[0].filename)
    assert inside < 2000
    assert context.plan(1, 1) is scratch


@needs_native
def test_at_most_five_barriers_a_layer(context):
    context.eval([1])
    start = context.pool.barriers
    context.eval([2])
    outside = 4                                     # embedding, gathering the wanted row, final norm and logits
    assert context.pool.barriers - start <= 5 * context.model.config.n_layers + outside


@pytest.mark.parametrize("split", [1, 7, 8, 9, 39])
def test_pieces_add_up(model, split):
    tokens = np.arange(40) * 7 % model.n_vocab
    whole = Context(model, n_ctx=64, exact=True, type_k="F32", type_v="F32").eval(tokens).copy()
    context = Context(model, n_ctx=64, exact=True, type_k="F32", type_v="F32")
    context.eval(tokens[:split], logits="none")
    np.testing.assert_allclose(context.eval(tokens[split:]), whole, atol=2e-4)


def test_truncating_forgets(context):
    tokens = [5, 6, 7, 8, 9]
    fresh = context.eval(tokens).copy()
    context.eval([1, 2, 3])
    context.truncate(3)
    np.testing.assert_array_equal(context.eval(tokens[3:4]).shape, fresh.shape)
    context.truncate(3)
    np.testing.assert_allclose(context.eval(tokens[3:]), fresh, atol=0.05 * np.abs(fresh).max())


def test_all_last_and_none(context):
    tokens = np.arange(20)
    every = context.eval(tokens, "all").copy()
    assert every.shape == (20, context.model.n_vocab)
    context.reset()
    np.testing.assert_allclose(context.eval(tokens)[0], every[-1], atol=0.05 * np.abs(every).max())
    assert context.eval([1], "none").shape == (0, context.model.n_vocab)


def test_overflow_names_both_sizes(context):
    context.eval(range(100))
    with pytest.raises(ContextOverflow, match=r"100 \+ 29 tokens .* 128"):
        context.eval(range(29))
    assert context.n_past == 100


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_ids_outside_the_vocabulary_are_refused(context, bad):
    with pytest.raises(PyggmlError, match=f"token {bad} is outside"):
        context.eval([1, bad])


@needs_native
def test_cancel_stops_a_running_evaluation(model):
    context = Context(model, n_ctx=4096, n_batch=4096, n_ubatch=8, n_threads=2)
    context.eval([1])
    timer = threading.Timer(0.05, context.cancel)
    timer.start()
    with pytest.raises(Cancelled):
        while True:
            context.reset()
            context.eval(np.ones(4000, np.int32))
    context.reset()
    assert np.isfinite(context.eval([1, 2, 3])).all()


def test_two_contexts_share_weights(model):
    one, two = Context(model, n_ctx=32), Context(model, n_ctx=32)
    np.testing.assert_array_equal(one.eval([1, 2, 3]), two.eval([1, 2, 3]))


@pytest.mark.parametrize(("pool", "waking", "alone"), [(1.0, 1.0, 1.5), (1.6, 0.1, 1.5), (1.0, 0.0, 1.01), (9.0, 0.0, 1.5)])
def test_small_models_take_what_is_faster_in_a_row(monkeypatch, pool, waking, alone):
    """A pool that was left aside sleeps: its next token takes `waking` more, which says nothing about the tokens after it."""
    clock, awake, ways = [0.0], [False], []

    def run(by_itself):
        clock[0] += alone if by_itself else pool + waking * (not awake[0])
        awake[0] = not by_itself
        ways.append(by_itself)
        return True

    monkeypatch.setattr("pyggml.crew.time.perf_counter", lambda: clock[0])
    crew = Crew(undecided=True)
    for _ in range(40):
        assert crew.run(run)
    clear = max(pool, alone) > Crew.CLEAR * min(pool, alone)
    trials = 2 * Crew.ROW if clear else Crew.TRIALS
    assert set(ways[:trials]) == {False, True} and set(ways[trials:]) == {alone < pool}
    settled = Crew(undecided=False)
    settled.run(run)
    assert not ways[-1]
