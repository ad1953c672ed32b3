"""Llama's answers beside llama_cpp.Llama's, for the same requests on the bundled model: the same keys, types, texts and counts."""

from pathlib import Path

import pytest

import pyggml

llama_cpp = pytest.importorskip("llama_cpp")

MODEL = str(Path(__file__).parents[2] / "models" / "books6m-q8_0.gguf")
REQUESTS = [{}, {"logprobs": 2}, {"echo": True}, {"stop": [" the"]}, {"max_tokens": 1}]


@pytest.fixture(scope="module")
def both():
    return (pyggml.Llama(MODEL, n_ctx=256, n_threads=1),
            llama_cpp.Llama(MODEL, n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False))


def shape(value):
    """The keys and types of an answer: what a program that reads it relies on."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value[:1]]
    return "number" if isinstance(value, float) or hasattr(value, "dtype") else type(value).__name__


def choice(answer):
    return answer["choices"][0]


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_completions(both, request_):
    own, peer = (llm.create_completion("The king", **{"max_tokens": 6, "temperature": 0, **request_}) for llm in both)
    if "logprobs" in request_:
        # their keys are tokens, so compare them as they are
        ours, theirs = choice(own).pop("logprobs"), choice(peer).pop("logprobs")
        assert list(ours) == list(theirs) and ours["tokens"] == theirs["tokens"] and ours["text_offset"] == theirs["text_offset"]
        assert ours["token_logprobs"] == pytest.approx([float(p) for p in theirs["token_logprobs"]], abs=0.1)
        assert [set(top) for top in ours["top_logprobs"]] == [set(top) for top in theirs["top_logprobs"]]
    assert shape(own) == shape(peer)
    assert choice(own) == choice(peer) and own["usage"] == peer["usage"] and own["model"] == peer["model"]


def test_streams(both):
    own, peer = (list(llm.create_completion("The king", max_tokens=6, temperature=0, stream=True)) for llm in both)
    assert [shape(chunk) for chunk in own] == [shape(chunk) for chunk in peer]
    assert [choice(chunk) for chunk in own] == [choice(chunk) for chunk in peer]


@pytest.mark.parametrize("stream", [False, True])
def test_chat(both, stream):
    messages = [{"role": "user", "content": "Who is there?"}]
    own, peer = (llm.create_chat_completion(messages, max_tokens=4, temperature=0, stream=stream) for llm in both)
    if stream:
        own, peer = list(own), list(peer)
        assert {str(sorted(chunk)) for chunk in own} == {str(sorted(chunk)) for chunk in peer}
        assert shape(own[0]) == shape(peer[0]) and shape(own[-1]) == shape(peer[-1])
    else:
        assert shape(own) == shape(peer)


def test_tokens_and_facts(both):
    own, peer = both
    text = b"Hello </s> world"
    for special in (False, True):
        for add_bos in (False, True):
            assert own.tokenize(text, add_bos=add_bos, special=special) == peer.tokenize(text, add_bos=add_bos, special=special)
    tokens = own.tokenize(text, special=True)
    for special in (False, True):
        assert own.detokenize(tokens, special=special) == peer.detokenize(tokens, special=special)
    assert own.metadata == peer.metadata
    for name in ("n_ctx", "n_vocab", "n_embd", "token_bos", "token_eos", "token_nl"):
        assert getattr(own, name)() == getattr(peer, name)()
