"""pyggml and llama.cpp (through the llama_cpp package) on the same generated models: tokens and logits."""

import numpy as np
import pytest
import random_model
from agreement import distance

from pyggml import Llama

llama_cpp = pytest.importorskip("llama_cpp")
import llama_cpp_bench  # noqa: E402  (needs llama_cpp)

N_TOKENS = 64
# (relative L2, mean KL) of logits: both programs round activations to 8 bits, each in its own order of operations.
BOUNDS = {"F16": (6e-3, 1e-4), "BF16": (0.02, 1e-3)}
QUANTIZED_BOUND = (0.08, 0.02)
TEXTS = ["", " ", "Hello, World!", "  two  spaces\n\nand lines\t", "übermäßig 漢字 🙂", "a" * 32, "<s> </s> <0x41>"]


@pytest.fixture(scope="module", params=random_model.MIXES)
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / f"{request.param}.gguf"
    random_model.write_random_model(path, "tiny", request.param)
    return request.param, str(path)


def llama_cpp_logits(path: str, tokens: np.ndarray) -> np.ndarray:
    """Logits (tokens, vocabulary) by llama.cpp's plainest path."""
    text = ",".join(map(str, tokens))
    options = llama_cpp_bench.arguments(["-m", path, "-t", "1", "-fa", "0", "--repack", "0", "--logits", "-", "--tokens", text])
    return llama_cpp_bench.logits(llama_cpp_bench.open_model(options), options)


def test_logits_agree(model):
    mix, path = model
    tokens = np.random.default_rng(0).integers(0, random_model.SHAPES["tiny"].vocab, N_TOKENS, dtype=np.int32)
    llama = Llama(path, n_ctx=N_TOKENS, n_threads=1, logits_all=True, verbose=False)
    llama.eval(tokens.tolist())
    figures = distance(llama_cpp_logits(path, tokens), llama.scores[:N_TOKENS])
    l2, kl = BOUNDS.get(mix, QUANTIZED_BOUND)
    assert figures["relative l2"] <= l2 and figures["kl mean"] <= kl, figures
    assert figures["same greedy choice"] >= 0.9, figures


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [False, True])
def test_tokens_are_equal(tmp_path, text, special):
    random_model.write_random_model(tmp_path / "m.gguf", "tiny", "Q8_0")
    ours = Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    assert ours.tokenize(text.encode(), add_bos=True, special=special) == theirs.tokenize(text.encode(), add_bos=True, special=special)
