"""Files that pyggml quantizes, run by llama.cpp (through the llama_cpp package): every recipe on a trained model, the logits pyggml's own."""

from pathlib import Path

import numpy as np
import pytest
from agreement import distance

from pyggml import Llama, formats
from pyggml.model import Model
from pyggml.quantize import calibrate, quantize_file
from pyggml.quantize.recipes import RECIPES

pytest.importorskip("llama_cpp")
import llama_cpp_bench  # noqa: E402  (needs llama_cpp)

MODEL = Path(__file__).parents[2] / "models" / "books6m-q8_0.gguf"
TEXT = "It was a dark and stormy night, and the old man sat before the fire with his pipe. " * 12
ABOVE = (1, 2, 3, 4, 5)         # layers that are left out: one of six keeps the test short
BOUNDS = {"F32": (4e-3, 1e-5), "F16": (6e-3, 1e-4), "BF16": (0.02, 1e-3)}
QUANTIZED_BOUND = (0.08, 0.02)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(trained weights as F16, their importance, tokens)"""
    path = tmp_path_factory.mktemp("models") / "f16.gguf"
    quantize_file(MODEL, path, "F16", allow_requantize=True, prune_layers=ABOVE)
    model = Model.load(path)
    tokens = np.asarray(model.tokenizer.encode(TEXT), np.int32)[:64]
    return path, calibrate.collect(model, TEXT, n_ctx=64, n_threads=1), tokens


@pytest.mark.parametrize("recipe", [r.name for r in RECIPES if r.base])
def test_llama_cpp_runs_what_pyggml_quantizes(source, tmp_path, recipe):
    path, imatrix, tokens = source
    target = str(tmp_path / "o.gguf")
    quantize_file(path, target, recipe, imatrix=imatrix)
    used = {t.type.name for t in formats.open(target).tensors.values()}
    assert len(used) > 1 or recipe == "F32"
    options = llama_cpp_bench.arguments(["-m", target, "-t", "1", "-fa", "0", "--repack", "0", "--logits", "-",
                                         "--tokens", ",".join(map(str, tokens))])
    expected = llama_cpp_bench.logits(llama_cpp_bench.open_model(options), options)
    llama = Llama(target, n_ctx=len(tokens), n_threads=1, logits_all=True, verbose=False)
    llama.eval(tokens.tolist())
    figures = distance(expected, llama.scores[:len(tokens)])
    l2, kl = BOUNDS.get(recipe, QUANTIZED_BOUND)
    assert figures["relative l2"] <= l2 and figures["kl mean"] <= kl, figures
