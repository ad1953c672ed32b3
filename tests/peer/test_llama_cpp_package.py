"""pyggml and llama.cpp (through the llama_cpp package) on the same models, generated ones and the bundled one: tokens and logits."""

from pathlib import Path

import numpy as np
import pytest
import random_model
from agreement import distance

from pyggml import Llama
from pyggml.quantize import quantize_file

llama_cpp = pytest.importorskip("llama_cpp")
import llama_cpp_bench  # noqa: E402  (needs llama_cpp)

BUNDLED = Path(__file__).parents[2] / "models" / "books6m-q8_0.gguf"
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


def assert_logits_agree(path: str, l2: float, kl: float) -> None:
    llama = Llama(path, n_ctx=N_TOKENS, n_threads=1, logits_all=True, verbose=False)
    tokens = np.random.default_rng(0).integers(0, llama.n_vocab(), N_TOKENS, dtype=np.int32)
    llama.eval(tokens.tolist())
    figures = distance(llama_cpp_logits(path, tokens), llama.scores[:N_TOKENS])
    assert figures["relative l2"] <= l2 and figures["kl mean"] <= kl, figures
    assert figures["same greedy choice"] >= 0.9, figures


def test_logits_agree(model):
    mix, path = model
    assert_logits_agree(path, *BOUNDS.get(mix, QUANTIZED_BOUND))


@pytest.mark.parametrize("recipe", ["Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_XS", "IQ3_S", "TQ2_0"])
def test_logits_agree_on_what_pyggml_quantizes(tmp_path, recipe):
    quantize_file(BUNDLED, tmp_path / "m.gguf", recipe, allow_requantize=True)
    assert_logits_agree(str(tmp_path / "m.gguf"), 0.03, 3e-3)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [False, True])
def test_tokens_are_equal(tmp_path, text, special):
    random_model.write_random_model(tmp_path / "m.gguf", "tiny", "Q8_0")
    ours = Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    assert ours.tokenize(text.encode(), add_bos=True, special=special) == theirs.tokenize(text.encode(), add_bos=True, special=special)
