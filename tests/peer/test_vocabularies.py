"""Tokenizers against llama.cpp: every pre-tokenizer on a vocabulary whose ids show where words end."""

import llama_vocab
import pytest

from pyggml import tokenizers
from pyggml.tokenizers.pretokenize import PRE_TOKENIZERS

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")
TEXTS = llama_vocab.random_texts(3, 300)


def check(kv, texts):
    tokenizer = tokenizers.load(kv)
    for case in llama_vocab.cases(kv, texts):
        assert tokenizer.encode(case["text"], add_special=False) == case["ids_nospecial_noparse"], case["text"]
        assert tokenizer.encode(case["text"], parse_special=True) == case["ids_special_parse"], case["text"]
        assert tokenizer.decode(case["ids_nospecial_noparse"]).hex() == case["detok_noparse"], case["text"]


@pytest.mark.parametrize("pre", [name for name, row in PRE_TOKENIZERS.items() if row.byte_level])
def test_every_pre_tokenizer_cuts_as_llama_cpp(pre):
    check(llama_vocab.merging_everything(pre), TEXTS)


def test_characters_merge_as_in_llama_cpp():
    check(llama_vocab.merging_characters(), TEXTS)


@pytest.mark.parametrize("model", ["bert", "t5"])
def test_made_up_vocabularies(model):
    check(llama_vocab.made_up(model), llama_vocab.made_up_texts())
