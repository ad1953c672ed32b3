"""Tokenizers against llama.cpp's ids (tests/golden/tokenizer), against sentencepiece, and the native engine against its Python twin."""

import gzip
import io
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml import tokenizers
from pyggml.errors import ModelError, PyggmlError
from pyggml.native import lib
from pyggml.tokenizers import StreamDecoder, table
from pyggml.tokenizers.base import SpecialCutter, clean_spaces
from pyggml.tokenizers.merge import BYTE_CHARS, CHAR_BYTES
from pyggml.tokenizers.pretokenize import PRE_TOKENIZERS, words
from pyggml.tokenizers.table import strings
from pyggml.tokenizers.vocab import Vocab

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer"
VOCABULARIES = ["llama-spm", "llama-bpe", "gpt-2", "qwen2", "phi-3", "tiny_llama_gqa_rope3", "tiny_llama_mha", "tiny_qwen2",
                "bert", "t5"]
ENGINES = ["native", "python"] if lib else ["python"]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def load(kv, engine="native"):
    """A tokenizer with the native engine or its Python twin."""
    with pytest.MonkeyPatch.context() as patch:
        if engine == "python":
            patch.setattr(table, "lib", None)
        return tokenizers.load(kv)


def golden(name):
    return json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))


# ---- ids and bytes of llama.cpp ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_and_bytes_equal_llama_cpp(name, engine):
    data = golden(name)
    tokenizer = load(data["kv"], engine)
    original, number = data["ids"], {id: i for i, id in enumerate(data["ids"])}
    checked = 0
    for case in data["cases"]:
        for key, expected in case.items():
            kind, *options = key.split("_")
            if kind == "ids":
                found = tokenizer.encode(case["text"], add_special="special" in options, parse_special="parse" in options)
                assert [original[id] for id in found] == expected, (case["text"], key)
            elif kind == "detok":
                ids = [number[id] for id in case[f"ids_nospecial_{options[0]}"]]
                assert tokenizer.decode(ids).hex() == expected, (case["text"], key)
            checked += kind != "text"
    assert checked >= 180


@pytest.mark.parametrize("row", sorted({row.patterns: name for name, row in PRE_TOKENIZERS.items()}.values()))
def test_words_of_every_pre_tokenizer(row):
    """words.json: word lengths that agreed with llama.cpp's ids on random texts (tests/peer/test_tokenizers.py)."""
    data = json.loads((GOLDEN / "words.json").read_text())
    for text, lengths in zip(data["texts"], data["words"][row], strict=True):
        assert [n for n in words(text, PRE_TOKENIZERS[row].patterns).tolist() if n] == lengths, text


# ---- sentencepiece -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pieces():
    """(sentencepiece's processor, our tokenizer) for a vocabulary of 4096 pieces trained on English books."""
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(GOLDEN / "books6m.model"))
    ids = range(len(processor))
    types = [2 if processor.IsUnknown(i) else 3 if processor.IsControl(i) else 6 if processor.IsByte(i) else 1 for i in ids]
    return processor, load({
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [processor.IdToPiece(i) for i in ids], "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [processor.GetScore(i) for i in ids]})


@given(text=ANY_TEXT | st.text("the quick brown fox, said he.\n \u2581", max_size=200))
def test_sentencepiece_agrees(pieces, text):
    processor, tokenizer = pieces
    if text:            # an empty text is no piece for sentencepiece and a lone space for llama.cpp's rules
        assert tokenizer.encode(text, add_special=False) == processor.EncodeAsIds(text)


def protobuf_fields(data):
    """(number, value) of each field of a protobuf message; sub-messages and strings as bytes."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            size = {5: 4, 1: 8}.get(key & 7) or varint()
            yield key >> 3, data[at:at + size]
            at += size


@pytest.fixture(scope="module")
def unigram():
    """(processor, our tokenizer) for a unigram model trained here, with sentencepiece's NFKC table as its normalization."""
    sentencepiece = pytest.importorskip("sentencepiece")
    words = re.findall(r"\w+", "the of and to in was on for as with by his that from at is it were which be this are not their one")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(words[i * j % 24] for j in range(1, 9)) for i in range(500)), model_writer=model, model_type="unigram",
        vocab_size=60, hard_vocab_limit=False, normalization_rule_name="nmt_nfkc", minloglevel=2)
    parts = list(protobuf_fields(model.getvalue()))         # ModelProto: 1 pieces {1 text, 2 score, 3 type}, 3 normalizer {2 table}
    pieces = [dict(protobuf_fields(value)) for number, value in parts if number == 1]
    scores = [np.frombuffer(piece.get(2, bytes(4)), "<f4")[0] for piece in pieces]
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()), load({
        "tokenizer.ggml.model": "t5", "tokenizer.ggml.tokens": [piece[1] for piece in pieces], "tokenizer.ggml.scores": np.array(scores),
        "tokenizer.ggml.token_type": [piece.get(3, 1) for piece in pieces], "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_space_prefix": True, "tokenizer.ggml.remove_extra_whitespaces": True,
        "tokenizer.ggml.precompiled_charsmap": np.frombuffer(dict(protobuf_fields(dict(parts)[3]))[2], np.uint8)})


@given(text=st.text("thefo adn \t\n\u3000ﬁⅣ²½ｱﾞカ\u0301é①㍿\u200b\x07한", max_size=30) | ANY_TEXT)
def test_sentencepiece_unigram_agrees(unigram, text):
    processor, tokenizer = unigram
    assert tokenizer.encode(text, add_special=False) == processor.EncodeAsIds(text)


# ---- the native engine and its twin --------------------------------------------------------------------------------------------
ALPHABET = "abc \n\u2581é中😀"


@st.composite
def random_bpe(draw):
    """A byte-level vocabulary with merges of its own tokens, of some unknown ones, and some that are damaged."""
    tokens = [chr(BYTE_CHARS[byte]) for byte in sorted({*range(0x30, 0x7F), *ALPHABET.encode()})]
    merges = []
    for _ in range(draw(st.integers(0, 40))):
        left, right = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        merges.append(f"{left} {right}")
        if left + right not in tokens and draw(st.integers(0, 9)):
            tokens.append(left + right)
    merges += draw(st.lists(st.sampled_from(["zz zz", "", " ", "x", "x ", " x", "a b c", "一 二", "Ä\udc80 x"]), max_size=3))
    tokens = [token for token in tokens if draw(st.integers(0, 19)) or len(token) > 1]
    pre = draw(st.sampled_from(["llama-bpe", "qwen2", "gpt-2", "default", "gemma4"]))
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": [*tokens, "<s>"],
            "tokenizer.ggml.token_type": [1] * len(tokens) + [3], "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": len(tokens)}


@st.composite
def random_spm(draw):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3, *[6] * 256]
    texts = draw(st.lists(st.text(ALPHABET + "<sx>0", min_size=1, max_size=5), max_size=60, unique=True))
    tokens += [text for text in texts if text not in tokens]
    types += [draw(st.sampled_from([1, 1, 1, 1, 1, 4])) for _ in tokens[len(types):]]
    scores = [draw(st.sampled_from([-1.0, -2.5, 0.0, -0.0, 3.0, float("inf")])) for _ in tokens]
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": types}


@pytest.mark.skipif(not lib, reason="without the native extension there is one engine")
@settings(max_examples=150)
@given(kv=random_bpe() | random_spm(), texts=st.lists(st.text(ALPHABET, max_size=40) | st.binary(max_size=30), min_size=1, max_size=5))
def test_native_equals_python(kv, texts):
    native, python = load(kv), load(kv, "python")
    for text in texts:
        assert native.encode(text) == python.encode(text)


# ---- there and back ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def byte_level():
    data = golden("llama-bpe")["kv"]
    return load(data | {"tokenizer.ggml.pre": "qwen2"})        # a row that does not close up spaces


@given(text=ANY_TEXT)
def test_byte_level_round_trip(byte_level, text):
    assert byte_level.decode(byte_level.encode(text, add_special=False)) == text.encode()


@given(text=ANY_TEXT.filter(lambda text: "\u2581" not in text))     # that character is how SPM spells a space
def test_spm_round_trip(pieces, text):
    tokenizer = pieces[1]
    assert tokenizer.decode(tokenizer.encode(text), remove_special=True) == (b" " + text.encode() if text else b"")
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text.encode()


@given(data=st.binary(max_size=40))
def test_spm_keeps_bytes_that_are_no_text(pieces, data):
    tokenizer = pieces[1]
    if "\u2581".encode() not in data:
        assert tokenizer.decode(tokenizer.encode(data, add_special=False)) == data


@given(text=ANY_TEXT)
def test_stream_decoder_gives_whole_characters(pieces, text):
    tokenizer = pieces[1]
    decoder = StreamDecoder(tokenizer, strip_space=True)
    parts = [decoder.feed(id) for id in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(parts) or "\ufffd" in text
    assert "".join(parts) + decoder.flush() == text.replace("\u2581", " ")


def test_stream_decoder_holds_back_half_a_character(pieces):
    tokenizer = pieces[1]
    first, second = (tokenizer.vocab.find(f"<0x{byte:02X}>") for byte in "é".encode())
    decoder = StreamDecoder(tokenizer)
    assert (decoder.feed(first), decoder.feed(second)) == ("", "é")
    assert (decoder.feed(first), decoder.flush(), decoder.feed(second), decoder.flush()) == ("", "\ufffd", "\ufffd", "")
    assert decoder.feed(tokenizer.bos) == "" and StreamDecoder(tokenizer, unparse_special=True).feed(tokenizer.bos) == "<s>"


# ---- special tokens ------------------------------------------------------------------------------------------------------------
def cut_by_definition(text, tokens):
    """The longest token first, everywhere; then the next longest in the text that is left."""
    parts = [text] if text else []
    for token, id in tokens:
        cut = []
        for part in parts:
            if isinstance(part, bytes):
                between = part.split(token)
                for i, piece in enumerate(between):
                    cut += ([id] if i else []) + ([piece] if piece else [])
            else:
                cut.append(part)
        parts = cut
    return parts


@given(texts=st.lists(st.text("ab<>|", min_size=1, max_size=4), min_size=1, max_size=8, unique=True), text=st.text("ab<>|", max_size=40))
def test_special_tokens_are_cut_longest_first(texts, text):
    kv = {"tokenizer.ggml.tokens": ["zz", *texts], "tokenizer.ggml.token_type": [1] + [4] * len(texts)}
    cutter = SpecialCutter(Vocab(kv, {}, {}), parse=False)
    tokens = sorted(((token.encode(), id + 1) for id, token in enumerate(texts)), key=lambda token: -len(token[0]))
    assert list(cutter.cut(text.encode())) == cut_by_definition(text.encode(), tokens)


def test_special_tokens_swallow_spaces_where_the_model_does():
    data = golden("phi-3")
    tokenizer, number = load(data["kv"]), {id: i for i, id in enumerate(data["ids"])}
    assert tokenizer.encode("<|end|>  \n", parse_special=True, add_special=False) == [number[32007]]


def test_end_of_generation_is_found_by_text():
    kv = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "<|im_end|>", "<|eot_id|>", "a"]}
    tokenizer = load(kv)
    assert tokenizer.eog == {2, 3, 4} and tokenizer.eot == 4 and tokenizer.is_control(3) and not tokenizer.is_control(5)
    harmony = load(kv | {"tokenizer.ggml.tokens": ["<unk>", "<s>", "<|return|>", "<|call|>", "<|end|>", "a"],
                         "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 2})
    assert harmony.eog == {2, 3} and not harmony.is_control(4)


def test_clean_spaces():
    spaced, closed = b"Well , it 's his . Is n't it ? They 're here ' s o ! 'll ", b"Well, it's his. Is n't it? They're here's o! 'll "
    assert clean_spaces(spaced) == closed


# ---- damaged vocabularies ------------------------------------------------------------------------------------------------------
TINY = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "<0x41>"],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 6], "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, 0.0]}
T5 = {"tokenizer.ggml.model": "t5", "tokenizer.ggml.tokens": ["<pad>", "</s>", "<unk>", "a"], "tokenizer.ggml.token_type": [3, 3, 2, 1]}
BPE = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.merges": ["a b"]}


@pytest.mark.parametrize("kv, change, sentence", [
    (TINY, {"tokenizer.ggml.model": None}, "tokenizer.ggml.model is missing"),
    (TINY, {"tokenizer.ggml.model": "word2vec"}, "'word2vec'"),
    (TINY, {"tokenizer.ggml.model": 5}, "is 5"),
    (TINY, {"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
    (TINY, {"tokenizer.ggml.tokens": []}, "tokenizer.ggml.tokens is empty"),
    (TINY, {"tokenizer.ggml.tokens": "abc"}, "is str"),
    (TINY, {"tokenizer.ggml.tokens": ["a", 5]}, "entry 1 is int"),
    (TINY, {"tokenizer.ggml.tokens": ["a", "b", "a"]}, "both id 0 and 2"),
    (TINY, {"tokenizer.ggml.tokens": np.zeros(5, np.float32)}, "is ndarray"),
    (TINY, {"tokenizer.ggml.scores": [0.0]}, "1 entries for 5 tokens"),
    (TINY, {"tokenizer.ggml.scores": np.zeros(5, np.int8)}, "int8"),
    (TINY, {"tokenizer.ggml.scores": np.zeros((5, 1), np.float32)}, "float32"),
    (TINY, {"tokenizer.ggml.scores": [0.0, 0.0, 0.0, float("nan"), 0.0]}, "score of id 3"),
    (TINY, {"tokenizer.ggml.scores": ["x"] * 5}, "<U1"),
    (TINY, {"tokenizer.ggml.token_type": [1, 1]}, "2 entries for 5 tokens"),
    (TINY, {"tokenizer.ggml.token_type": np.zeros(5, np.float32)}, "float32"),
    (TINY, {"tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "<0x-1>"]}, "id 4 is of type byte"),
    (TINY, {"tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "A"]}, "id 4 is of type byte"),
    (TINY, {"tokenizer.ggml.add_bos_token": "yes"}, "'yes'"),
    (TINY, {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.token_type": None}, "add_bos_token is true but tokenizer.ggml.bos_token_id is"),
    (T5, {"tokenizer.ggml.precompiled_charsmap": [1.5]}, "float64"),
    (T5, {"tokenizer.ggml.precompiled_charsmap": [255, 255, 255, 127, 0]}, "2147483647 bytes, but is 5 bytes long"),
    (T5, {"tokenizer.ggml.precompiled_charsmap": [1, 0]}, "but is 2 bytes long"),
    (T5, {"tokenizer.ggml.precompiled_charsmap": [4, 0, 0, 0, 0, 252, 255, 127, 0]}, "points to entry"),
    (BPE, {"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
    (BPE, {"tokenizer.ggml.merges": [1]}, "entry 0 is int"),
    (BPE, {"tokenizer.ggml.pre": "no-such"}, "'no-such'"),
    (BPE, {"tokenizer.ggml.pre": 3}, "tokenizer.ggml.pre is 3"),
    (BPE, {"tokenizer.ggml.pre": np.arange(300)}, "tokenizer.ggml.pre is [0, 1,"),
    (BPE, {"tokenizer.ggml.pre": ["qwen2"]}, 'tokenizer.ggml.pre is ["qwen2"]'),
    (BPE, {"tokenizer.ggml.model": np.arange(300)}, "tokenizer.ggml.model is [0, 1,"),
])
@pytest.mark.parametrize("engine", ENGINES)
def test_damage_is_one_sentence(kv, change, sentence, engine):
    kv = {key: value for key, value in (kv | change).items() if value is not None}
    with pytest.raises(ModelError) as error:
        load(kv, engine)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_odd_but_usable_vocabularies(engine):
    numbers = load(TINY | {"tokenizer.ggml.bos_token_id": 99, "tokenizer.ggml.eos_token_id": 2**32 - 1}, engine)
    assert (numbers.bos, numbers.eos) == (1, 2)             # ids outside the vocabulary: the defaults hold
    unknown_types = load(TINY | {"tokenizer.ggml.token_type": [2, 3, 3, 77, -5]}, engine)
    assert unknown_types.piece(3) == unknown_types.piece(4) == b""
    empty = load(TINY | {"tokenizer.ggml.tokens": ["<unk>", "", "</s>", "a", "<0x41>"]}, engine)
    assert empty.piece(1) == b"[EMPTY_1]"
    no_bytes = load(TINY, engine)
    assert no_bytes.encode("aé", add_special=False) == [0, 0, 0, 3, 0, 0]       # U+2581, a, é; no byte tokens: unknown
    no_tokens = load(BPE | {"tokenizer.ggml.merges": ["a b", "ab ab", "b q"]}, engine)
    assert no_tokens.encode("ababbq") == [0, 1, 0, 1, 1]                       # merged to texts that are no tokens: bytes again


def test_ids_outside_the_vocabulary_are_refused(byte_level):
    for id in (-1, byte_level.n_vocab, 2**40):
        with pytest.raises(PyggmlError, match="outside the vocabulary"):
            byte_level.decode([0, id])
        with pytest.raises(PyggmlError, match="outside the vocabulary"):
            StreamDecoder(byte_level).feed(id)


def test_a_text_that_is_too_long_is_refused(byte_level, monkeypatch):
    monkeypatch.setattr("pyggml.tokenizers.merge.MAX_BYTES", 10)
    with pytest.raises(PyggmlError, match="too long"):
        byte_level.encode("x" * 11)


# ---- parts ---------------------------------------------------------------------------------------------------------------------
@given(texts=st.lists(st.text(max_size=6) | st.binary(max_size=6)))
def test_strings_keep_every_text(texts):
    expected = [text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape") for text in texts if not _half(text)]
    assert strings([text for text in texts if not _half(text)], "texts").tolist() == expected


def _half(text):
    """Whether a str has a surrogate that stands for no byte."""
    return isinstance(text, str) and any("\ud800" <= char < "\udc80" or "\udcff" < char <= "\udfff" for char in text)


def test_byte_alphabet():
    assert len(CHAR_BYTES) == 256 and BYTE_CHARS[ord("a")] == ord("a") and chr(BYTE_CHARS[0x20]) == "Ġ" and chr(BYTE_CHARS[0x0A]) == "Ċ"


@given(text=ANY_TEXT, row=st.sampled_from(sorted(PRE_TOKENIZERS)))
def test_words_cover_the_text(text, row):
    assert words(text, PRE_TOKENIZERS[row].patterns).sum() == len(text)


@pytest.mark.parametrize("row", sorted({row.patterns: name for name, row in PRE_TOKENIZERS.items()}.values()))
def test_long_runs_take_linear_time(row):
    """A pattern that looks ahead over the rest of the text at every step needs minutes for this; the others milliseconds."""
    for unit in ("1", " ", "a", "A", "\n", "!", "'", " \n", "a ", "1a"):
        start = time.process_time()
        words(unit * 60_000, PRE_TOKENIZERS[row].patterns)
        assert time.process_time() - start < 5, unit
