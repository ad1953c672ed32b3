"""Whole files quantized by pyggml --compat and by llama.cpp (through the llama_cpp package): the same bytes."""

import numpy as np
import pytest
import random_model

from pyggml import formats
from pyggml.quantize import quantize_file, recipes

llama_cpp = pytest.importorskip("llama_cpp")

FORMULA = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")       # types that a formula defines; the others search


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "f16.gguf"
    random_model.write_random_model(path, "tiny", "F16")
    return path


def by_llama_cpp(source, target, recipe, pure):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = recipes.find(recipe).id, 1, pure
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0
    return target


@pytest.mark.parametrize("recipe", FORMULA)
def test_files_are_byte_identical(source, tmp_path, recipe):
    theirs = by_llama_cpp(source, tmp_path / "theirs.gguf", recipe, True)
    quantize_file(source, tmp_path / "ours.gguf", recipe, pure=True, compat=True)
    assert (tmp_path / "ours.gguf").read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("recipe", ["Q2_K", "Q3_K_L", "Q4_K_M", "Q5_K_S", "Q6_K", "IQ4_XS", "TQ2_0"])
def test_types_sizes_and_order_are_the_same(source, tmp_path, recipe):
    theirs = formats.open(by_llama_cpp(source, tmp_path / "theirs.gguf", recipe, False))
    quantize_file(source, tmp_path / "ours.gguf", recipe, compat=True)
    ours = formats.open(tmp_path / "ours.gguf")
    assert list(ours.kv) == list(theirs.kv)
    assert [(n, t.type.name, t.offset) for n, t in ours.tensors.items()] == [(n, t.type.name, t.offset) for n, t in theirs.tensors.items()]
    weights = formats.open(source)
    for name, tensor in ours.tensors.items():        # two searches for one thing come equally near to the weights
        errors = [np.linalg.norm(t[name].dequantize() - weights[name].dequantize()) for t in (ours, theirs)]
        assert errors[0] <= 1.02 * errors[1], name
