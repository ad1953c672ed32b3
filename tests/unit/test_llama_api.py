"""Llama against an exact fake engine: llama_cpp's names and answers, prefix reuse, stop strings, log-probabilities, refusals."""

import json
import math
import pickle

import fake_engine
import numpy as np
import pytest
from fake_engine import ID

from pyggml import Llama, LogitsProcessorList, StoppingCriteriaList
from pyggml.completion import TextBuffer
from pyggml.errors import ContextOverflow, ParameterError


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    fake_engine.install(monkeypatch)


@pytest.fixture
def llm():
    return Llama("fake.gguf", n_ctx=40, seed=1)


def text(answer):
    return answer["choices"][0]["text"]


def finish(answer):
    return answer["choices"][0]["finish_reason"]


def greedy(llm, prompt, **more):
    return llm.create_completion(prompt, **{"temperature": 0, "max_tokens": None, **more})


# ---- facts and tokens ----

def test_facts(llm):
    assert (llm.n_ctx(), llm.n_vocab(), llm.n_embd()) == (40, len(fake_engine.PIECES), 8)
    assert (llm.token_bos(), llm.token_eos(), llm.token_nl()) == (0, 1, 2)
    assert llm.metadata == {"general.architecture": "fake", "fake.embedding_length": "8", "fake.scale": "0.500000",
                            "tokenizer.ggml.add_bos_token": "true", "tokenizer.ggml.bos_token_id": "0"}


def test_tokenize(llm):
    assert llm.tokenize(b"abc") == [0, 3, 4, 5]
    assert llm.tokenize(b"abc", add_bos=False) == [3, 4, 5]
    assert llm.tokenize(b"</s>a", add_bos=False, special=True) == [1, 3]
    assert llm.detokenize([0, 3, 1]) == b"a"
    assert llm.detokenize([0, 3, 1], special=True) == b"<s>a</s>"
    assert llm.detokenize([0, ID[b" "], 3]) == b"a"
    assert llm.detokenize([ID[b" "], 3]) == b" a"


# ---- evaluation ----

def test_scores_of_every_token():
    llm = Llama("fake.gguf", n_ctx=20, n_batch=2, logits_all=True)
    llm.eval([0, 3, 4])
    llm.eval([5])
    assert llm.n_tokens == 4 and llm.eval_tokens == [0, 3, 4, 5]
    assert llm.scores.shape == (20, llm.n_vocab()) and llm.scores.dtype == np.float32
    assert llm.scores[:4].argmax(axis=1).tolist() == [3, 4, 5, 6]
    assert llm.eval_logits.shape[0] == 4


def test_scores_of_the_newest_token(llm):
    llm.eval([0, 3, 4])
    assert llm.scores.shape == (1, llm.n_vocab()) and llm.scores.argmax() == 5
    assert llm.sample(temp=0) == 5
    llm.reset()
    assert llm.n_tokens == 0
    with pytest.raises(ParameterError, match="eval"):
        llm.sample()


def test_overflow_names_both_sizes(llm):
    with pytest.raises(ContextOverflow, match=r"0 \+ 41 .* 40"):
        llm.eval([3] * 41)
    with pytest.raises(ValueError, match=r"41 tokens .* 40"):
        llm("a" * 40)
    with pytest.raises(ContextOverflow, match="40"):
        list(llm.generate([0], temp=0, logit_bias={1: -math.inf}))


def test_sample_takes_a_row():
    llm = Llama("fake.gguf", logits_all=True)
    llm.eval([0, 3, 4])
    assert [llm.sample(temp=0, idx=i) for i in range(3)] == [3, 4, 5]


# ---- generation and the cache ----

def test_generate(llm):
    tokens = llm.generate([0, 3], temp=0)
    assert [next(tokens) for _ in range(3)] == [4, 5, 6]
    assert tokens.send([ID[b"m"]]) == ID[b"n"]            # tokens of one's own are appended


def test_prefix_is_not_computed_again(llm):
    calls = llm._context.evaluated
    greedy(llm, "abc", max_tokens=3)
    assert calls == [(0, [0, 3, 4, 5], "last"), (4, [6], "last"), (5, [7], "last")]
    calls.clear()
    greedy(llm, "abcdx", max_tokens=1)
    assert calls == [(5, [ID[b"x"]], "last")]
    calls.clear()
    assert text(greedy(llm, "abcdx", max_tokens=1)) == "y" and calls == []     # the logits are still there
    assert text(greedy(llm, "abc", max_tokens=1)) == "d" and calls == [(3, [5], "last")]
    calls.clear()
    list(zip(range(1), llm.generate([7, 8], temp=0), strict=False))
    assert calls == [(0, [7, 8], "last")]


def test_generate_goes_on_without_reset(llm):
    llm.eval([0, 3])
    assert next(llm.generate([ID[b"k"]], temp=0, reset=False)) == ID[b"l"]
    assert llm.eval_tokens == [0, 3, ID[b"k"]]


def test_states(llm):
    greedy(llm, "abc", max_tokens=2)
    state = llm.save_state()
    llm.reset()
    llm.eval([0, 3, 20])
    calls = llm._context.evaluated
    calls.clear()
    llm.load_state(state)
    assert llm.eval_tokens == [0, 3, 4, 5, 6] and llm.sample(temp=0) == 7
    assert text(greedy(llm, "abcdef", max_tokens=1)) == "g" and calls == [(5, [ID[b"e"], ID[b"f"]], "last")]
    again = pickle.loads(pickle.dumps(llm))
    assert again.eval_tokens == llm.eval_tokens and again.n_ctx() == 40


# ---- completions ----

def test_completion_dict(llm):
    answer = greedy(llm, "abc", max_tokens=4)
    assert list(answer) == ["id", "object", "created", "model", "choices", "usage"]
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-") and answer["model"] == "fake.gguf"
    assert answer["choices"] == [{"text": "defg", "index": 0, "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}


def test_end_token_stops(llm):
    answer = llm("wx", temperature=0)
    assert (text(answer), finish(answer)) == ("yz", "stop")
    assert answer["usage"]["completion_tokens"] == 2


def test_a_full_context_is_a_length(llm):
    answer = greedy(llm, "abc", logit_bias={"1": -math.inf})
    assert finish(answer) == "length" and answer["usage"]["total_tokens"] == 40


@pytest.mark.parametrize("prompt", [[0, 3, 4, 5], "abc"])
def test_echo(llm, prompt):
    assert text(greedy(llm, prompt, max_tokens=2, echo=True)) == "abcde"


@pytest.mark.parametrize(("stop", "expected"), [
    ("fgh", "de"), (["q", "g"], "def"), (["ghx", "gh"], "def"), ("d", ""), ("zz", "defghijklmnopqrstuvwxyz"), ([], "defghijklmnopqrstuvwxyz"),
    (["klm", "jkl"], "defghi"), (None, "defghijklmnopqrstuvwxyz"), ("", "defghijklmnopqrstuvwxyz"),
])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_span_tokens(llm, stop, expected, stream):
    if stream:
        chunks = list(greedy(llm, "abc", stop=stop, stream=True))
        assert "".join(map(text, chunks)) == expected
        assert [finish(c) for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    else:
        answer = greedy(llm, "abc", stop=stop)
        assert (text(answer), finish(answer)) == (expected, "stop")


def test_stream_chunks(llm):
    chunks = list(greedy(llm, "abc", max_tokens=2, stream=True))
    assert [c["choices"][0] for c in chunks] == [
        {"text": "d", "index": 0, "logprobs": None, "finish_reason": None},
        {"text": "e", "index": 0, "logprobs": None, "finish_reason": None},
        {"text": "", "index": 0, "logprobs": None, "finish_reason": "length"}]
    assert len({c["id"] for c in chunks}) == 1 and "usage" not in chunks[0]


def test_a_stream_shows_whole_characters(monkeypatch):
    a, b = fake_engine.SNOWMAN
    monkeypatch.setattr(fake_engine.FakeModel, "load", lambda path, **_: fake_engine.FakeModel({b"b": a, a: b, b: b"c", b"c": a}))
    llm = Llama("fake.gguf")
    chunks = [text(c) for c in greedy(llm, "ab", max_tokens=5, stream=True)]
    assert chunks == ["\u2603", "c", "\u2603", ""]
    assert [text(c) for c in greedy(llm, "ab", max_tokens=1, stream=True)] == ["\ufffd", ""]


def test_logprobs_need_no_logits_all(llm):
    answer = greedy(llm, "abc", max_tokens=3, logprobs=2)
    logprobs = answer["choices"][0]["logprobs"]
    assert list(logprobs) == ["tokens", "text_offset", "token_logprobs", "top_logprobs"]
    assert logprobs["tokens"] == ["d", "e", "f"] and logprobs["text_offset"] == [3, 4, 5]
    row = llm._model.logits(5).astype(np.float64)
    expected = row[6] - np.log(np.exp(row).sum())
    assert logprobs["token_logprobs"][0] == pytest.approx(expected, abs=1e-5)
    assert list(logprobs["top_logprobs"][0]) == ["d", "<s>"]
    json.dumps(answer)


def test_logprobs_of_the_prompt(llm):
    logprobs = greedy(llm, "acb", max_tokens=1, logprobs=1, echo=True)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "c", "b", "c"] and logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["token_logprobs"][0] == pytest.approx(logprobs["token_logprobs"][3], abs=0.2)      # bos -> a, b -> c: both expected
    assert logprobs["token_logprobs"][1] < -5
    assert list(logprobs["top_logprobs"][1]) == ["b", "c"]
    assert text(greedy(llm, [3, 4], max_tokens=1, logprobs=0, echo=True)) == "abc"
    first = greedy(llm, [3, 4], max_tokens=1, logprobs=0, echo=True)["choices"][0]["logprobs"]
    assert first["token_logprobs"][0] is None and first["top_logprobs"][0] is None


def test_logprobs_end_at_the_stop(llm):
    answer = greedy(llm, "abc", stop="fgh", logprobs=0)
    assert answer["choices"][0]["logprobs"]["tokens"] == ["d", "e"]
    chunks = list(greedy(llm, "abc", stop="fgh", logprobs=0, stream=True))
    assert [c["choices"][0]["logprobs"] and c["choices"][0]["logprobs"]["tokens"] for c in chunks] == [["d"], ["e"], None]


def test_processors_and_criteria(llm):
    def no_e(ids, scores):
        scores[ID[b"e"]] = -math.inf
        return scores

    assert text(greedy(llm, "abc", max_tokens=2, logits_processor=[no_e])) != "de"
    assert text(greedy(llm, "abc", max_tokens=2, logits_processor=LogitsProcessorList([no_e]))) == "d" + text(greedy(llm, "d", max_tokens=1,
                                                                                                               logits_processor=no_e))
    answer = greedy(llm, "abc", stopping_criteria=StoppingCriteriaList([lambda ids, scores: ids[-1] == ID[b"g"]]))
    assert (text(answer), finish(answer)) == ("defg", "stop")
    assert text(greedy(llm, "abc", max_tokens=3)) == "def"          # a processor leaves the cached logits alone


def test_seed_repeats(llm):
    hot = dict(temperature=3.0, top_k=0, top_p=1.0, min_p=0.0, max_tokens=8)
    first = [text(llm("abc", seed=s, **hot)) for s in (1, 2, 1)]
    assert first[0] == first[2] != first[1]
    assert text(llm("abc", **hot)) == first[0]              # the constructor's seed


def test_empty_prompt_starts_from_bos(llm):
    assert text(greedy(llm, "", max_tokens=2)) == "ab"
    assert text(greedy(llm, [], max_tokens=2)) == "ab"


# ---- refusals ----

@pytest.mark.parametrize("given", [
    {"split_mode": 2}, {"lora_path": "x.gguf"}, {"embedding": True}, {"rope_freq_base": 1e6}, {"chat_format": "chatml"}, {"draft_model": object()},
], ids=lambda given: next(iter(given)))
def test_unsupported_arguments_are_named(given):
    with pytest.raises(ParameterError, match=next(iter(given))):
        Llama("fake.gguf", **given)


def test_unknown_arguments_are_named(llm):
    with pytest.raises(TypeError, match="n_ctxx"):
        Llama("fake.gguf", n_ctxx=3)
    with pytest.raises(TypeError, match="top_kk"):
        llm("a", top_kk=3)
    with pytest.raises(TypeError, match="temp"):
        llm("a", temp=1, temperature=0)


def test_neutral_arguments_are_taken(llm):
    Llama("fake.gguf", n_gpu_layers=0, flash_attn=True, offload_kqv=False, tensor_split=None, type_k=1, type_v="f32", verbose=False)
    llm("a", tfs_z=1.0, grammar=None, mirostat_mode=0, max_tokens=1)


@pytest.mark.parametrize(("given", "message"), [
    ({"suffix": "x"}, "suffix"), ({"logprobs": -1}, "logprobs=-1"), ({"tfs_z": 0.5}, "tfs_z"), ({"grammar": object()}, "grammar"),
    ({"stop": [3]}, "stop holds 3"), ({"top_p": 7}, "top_p=7"), ({"mirostat_mode": 1}, "mirostat"),
    ({"max_tokens": math.nan}, "max_tokens=nan is not a whole number"), ({"max_tokens": 2.5}, "max_tokens=2.5"),
    ({"max_tokens": "3"}, "max_tokens='3'"),
    ({"logprobs": 2.5}, "logprobs=2.5"), ({"logit_bias": {"a": 1}}, "token ids to numbers"), ({"logit_bias": [1]}, "token ids to numbers"),
])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_fail_at_once(llm, given, message, stream):
    with pytest.raises(ParameterError, match=message):
        llm("abc", stream=stream, **given)


@pytest.mark.parametrize(("prompt", "message"), [(b"abc", "bytes"), ([3, 4.5], "a token of the prompt=4.5")])
def test_what_is_no_prompt_is_not_taken_for_ids(llm, prompt, message):
    with pytest.raises(ParameterError, match=message):
        llm(prompt)


def test_numbers_may_be_numpys(llm):
    given = {"temperature": np.float32(0.5), "top_k": np.int64(5), "top_p": np.float16(0.5), "seed": np.uint32(7), "max_tokens": np.int32(2)}
    assert text(llm(np.array([ID[b"a"]]), **given)) == "bc"


def test_closing():
    with Llama("fake.gguf") as llm:
        llm("a", max_tokens=1)
    with pytest.raises(ParameterError, match="closed"):
        llm("a", max_tokens=1)


# ---- text that becomes certain ----

@pytest.mark.parametrize("cut", range(1, 6))
def test_text_buffer_does_not_depend_on_cuts(cut):
    whole = "a\u2603b</s".encode() + b"\xff" + "\U0001f600 stop behind".encode()
    buffer = TextBuffer([b"</s>", b" stop"])
    out = "".join(buffer.push(whole[i:i + cut]) for i in range(0, len(whole), cut) if not buffer.stopped)
    assert buffer.stopped and out == "a\u2603b</s\ufffd\U0001f600"


def test_text_buffer_holds_back_no_more_than_it_must():
    buffer = TextBuffer([b"aab"])
    assert [buffer.push(bytes([c])) for c in b"xaaacab"] == ["x", "", "", "a", "aac", "", "ab"]
    assert not buffer.stopped and buffer.flush() == ""


# ---- chat ----

@pytest.fixture
def chat(monkeypatch):
    """A Llama whose template strings the messages together."""
    def load(path, **_):
        model = fake_engine.FakeModel()
        model.file.kv["tokenizer.chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        return model

    monkeypatch.setattr(fake_engine.FakeModel, "load", load)
    return Llama("fake.gguf", n_ctx=40)


MESSAGES = [{"role": "system", "content": "x"}, {"role": "user", "content": "abc"}]


def test_chat(chat):
    answer = chat.create_chat_completion(MESSAGES, temperature=0, max_tokens=3)
    assert list(answer) == ["id", "object", "created", "model", "choices", "usage"]
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [{"index": 0, "message": {"role": "assistant", "content": "def"}, "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    assert chat._context.evaluated[0][1] == [0, ID[b"x"], 3, 4, 5]


def test_a_template_that_writes_bos_gets_no_second_one(chat):
    chat.create_chat_completion([{"role": "user", "content": "<s>abc"}], temperature=0, max_tokens=1)
    assert chat._context.evaluated[0][1] == [0, 3, 4, 5]


def test_chat_stream(chat):
    chunks = list(chat.create_chat_completion(MESSAGES, temperature=0, stop="ef", stream=True))
    assert [(c["choices"][0]["delta"], finish(c)) for c in chunks] == [({"role": "assistant"}, None), ({"content": "d"}, None), ({}, "stop")]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}


def test_chat_logprobs(chat):
    answer = chat.create_chat_completion(MESSAGES, temperature=0, max_tokens=1, logprobs=True, top_logprobs=2)
    (entry,) = answer["choices"][0]["logprobs"]["content"]
    assert entry["token"] == "d" and [other["token"] for other in entry["top_logprobs"]] == ["d", "<s>"]
    assert entry["top_logprobs"][0]["logprob"] == entry["logprob"] < 0


@pytest.mark.parametrize("given", [{"tools": [{}]}, {"response_format": {"type": "json_object"}}, {"functions": [{}]}], ids=lambda g: next(iter(g)))
def test_chat_refuses_what_it_has_not(chat, given):
    with pytest.raises(ParameterError, match=next(iter(given))):
        chat.create_chat_completion(MESSAGES, **given)
    with pytest.raises(TypeError, match="toools"):
        chat.create_chat_completion(MESSAGES, toools=[])
