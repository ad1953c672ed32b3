"""Llama, run and bench on a real file: what the cache keeps makes no difference to what comes out."""

import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from pyggml import Llama, cli
from pyggml.errors import Cancelled, PyggmlError

MODELS = Path(__file__).parents[1] / "golden" / "models"
MODEL = str(MODELS / "llama_linear.f16.gguf")
PROMPT = list(range(3, 40))


@pytest.fixture
def llm():
    with Llama(MODEL, n_ctx=128, n_threads=2) as llm:
        yield llm


def greedy(llm, prompt, n=12):
    return [token for _, token in zip(range(n), llm.generate(prompt, temp=0), strict=False)]


def test_a_reused_prefix_changes_nothing(llm):
    first = greedy(llm, PROMPT)
    assert greedy(llm, PROMPT) == first                         # from the cached prompt
    greedy(llm, PROMPT[:20] + [5, 6, 7])                        # branches off in the middle
    assert greedy(llm, PROMPT) == first
    assert greedy(llm, PROMPT + first[:4], 8) == first[4:]


def test_an_interrupted_prompt_leaves_nothing_behind(monkeypatch):
    """Part of a prompt in the cache under the tokens of an earlier one would be taken for that one."""
    with Llama(MODEL, n_ctx=128, n_ubatch=8, n_threads=1) as llm:
        first = greedy(llm, PROMPT)
        run, calls = llm._ctx._run, []

        def interrupted(*args):
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return run(*args)

        monkeypatch.setattr(llm._ctx, "_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            greedy(llm, PROMPT[::-1])
        monkeypatch.undo()
        assert llm.n_tokens == 0 and greedy(llm, PROMPT) == first


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="looks at open files")
def test_a_model_that_is_let_go_gives_its_file_back():
    def descriptors():
        return [fd for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == os.path.realpath(MODEL)]

    gc.collect()
    before = descriptors()
    gc.disable()
    try:
        llm = Llama(MODEL, n_ctx=32, n_threads=1)
        llm(PROMPT[:8], max_tokens=1)
        del llm
        assert descriptors() == before
    finally:
        gc.enable()


def test_a_state_brings_its_scores_back():
    with Llama(MODEL, n_ctx=64, logits_all=True, n_threads=1) as llm, Llama(MODEL, n_ctx=64, n_threads=1) as plain:
        llm.eval(PROMPT)
        state, scores = llm.save_state(), llm.eval_logits.copy()
        llm.reset()
        llm.eval(PROMPT[::-1])
        llm.load_state(state)
        np.testing.assert_array_equal(llm.eval_logits, scores)
        plain.eval(PROMPT)
        llm.load_state(plain.save_state())
        assert np.isnan(llm.eval_logits).all()


def test_scores_do_not_depend_on_how_tokens_came_in():
    with Llama(MODEL, n_ctx=64, logits_all=True, n_threads=1) as whole, Llama(MODEL, n_ctx=64, logits_all=True, n_batch=7, n_threads=1) as parts:
        whole.eval(PROMPT)
        parts.eval(PROMPT[:10])
        for token in PROMPT[10:13]:
            parts.eval([token])
        parts.eval(PROMPT[13:])
        a, b = whole.scores[:len(PROMPT)], parts.scores[:len(PROMPT)]
    assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(a)


def test_a_state_moves_to_another_llama(llm):
    greedy(llm, PROMPT, 5)
    state = llm.save_state()
    expected = greedy(llm, llm.eval_tokens, 6)
    with Llama(MODEL, n_ctx=64, n_threads=2) as other:
        other.load_state(state)
        assert greedy(other, other.eval_tokens, 6) == expected
    with Llama(MODEL, n_ctx=16) as small, pytest.raises(PyggmlError, match="41 tokens .* 16"):
        small.load_state(state)
    with Llama(MODEL, n_ctx=64, type_k="F32") as different, pytest.raises(PyggmlError, match="type"):
        different.load_state(state)


def test_quantized_cache_types_are_taken_by_number_and_name():
    with Llama(MODEL, n_ctx=64, type_k=8, type_v="f16") as llm:
        assert llm._context.cache.keys[0].type.name == "Q8_0"
        assert len(greedy(llm, PROMPT)) == 12


def test_vocab_only():
    with Llama(MODEL, vocab_only=True) as llm:
        text = b"some words"
        assert llm.detokenize(llm.tokenize(text)).strip() == text and llm.n_vocab() > 0 and llm.n_embd() > 0
        with pytest.raises(PyggmlError, match="vocab_only"):
            llm("text")


def test_cancel_keeps_the_cache(llm):
    llm.eval(PROMPT)
    stop = threading.Event()

    def cancel():
        while not stop.wait(0.0001):
            llm._context.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    try:
        with pytest.raises(Cancelled):
            for _ in range(1000):
                llm.n_tokens = len(PROMPT)
                llm.eval(PROMPT * 2)
    finally:
        stop.set()
        thread.join()
    assert llm.eval_tokens == PROMPT
    assert greedy(llm, PROMPT) == greedy(Llama(MODEL, n_ctx=128, n_threads=2), PROMPT)


def test_run_writes_the_same_text_as_llama(llm, capsys):
    expected = llm.create_completion("a b", max_tokens=10, temperature=0)["choices"][0]["text"]
    assert cli.main(["run", MODEL, "-p", "a b", "-n", "10", "--temp", "0", "-t", "2"]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_bench_on_a_real_file(capsys):
    assert cli.main(["bench", MODEL, "-p", "16", "-n", "4", "-r", "2", "-d", "0,8", "-o", "json", "-ub", "8"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["n_prompt"], row["n_gen"], row["n_depth"]) for row in rows] == [(16, 0, 0), (0, 4, 0), (16, 0, 8), (0, 4, 8)]
    assert all(row["avg_ts"] > 0 and row["model_type"].startswith("llama") for row in rows)


def test_a_terminal_without_unicode():
    done = subprocess.run([sys.executable, "-m", "pyggml", "bench", MODEL, "-p", "2", "-n", "0", "-r", "2"], capture_output=True, timeout=60,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=False)
    assert done.returncode == 0 and b" ? " in done.stdout and not done.stderr


def test_tokenize_on_a_real_file(llm, capsys):
    assert cli.main(["tokenize", MODEL, "-p", "some words", "--ids"]) == 0
    assert json.loads(capsys.readouterr().out) == llm.tokenize("some words", special=True)
