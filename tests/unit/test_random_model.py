"""Random models: the same bytes for the same seed, tensor types as llama-quantize chooses them, weights of a trained model's size."""

import numpy as np
import pytest
import random_model
from random_model import MIXES, SHAPES, Shape

from pyggml import formats
from pyggml.context import Context
from pyggml.errors import PyggmlError
from pyggml.model import Model
from pyggml.quants import dequantize
from pyggml.types import tensor_type


def write(path, mix, shape="tiny", seed=0):
    random_model.write_random_model(path, shape, mix, seed)
    return formats.open(path)


def test_the_seed_decides_every_byte(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(tmp_path / name, "Q4_K_M", seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b and len(a) == len(c) and a != c


@pytest.mark.parametrize("mix", MIXES)
def test_weights_have_mean_0_and_the_wanted_spread(tmp_path, mix):
    file, shape = write(tmp_path / "m.gguf", mix), SHAPES["tiny"]
    for matrix in random_model.matrices(shape, MIXES[mix]):
        tensor = file[matrix.name]
        weights = dequantize(tensor.raw, tensor.type.name)
        assert tensor.shape == matrix.shape and np.isfinite(weights).all()
        assert weights.std() == pytest.approx(matrix.std, rel=0.12), matrix.name
        assert abs(weights.mean()) < 0.05 * matrix.std, matrix.name
        assert weights.mean(-1).std() < 0.4 * matrix.std, matrix.name        # rows are not shifted much


@pytest.mark.parametrize(("row", "std"), [("Q4_0", 0.02), ("Q4_K", 0.02), ("F16", 0.02)])
def test_blocks_differ_in_scale(row, std):
    row = tensor_type(row)
    make = random_model.random_blocks if row.quantized else random_model.random_floats
    data = make(row, 64 * 256, std, np.random.default_rng(0)).view(np.uint8).reshape(64, -1)
    spread = dequantize(data, row.name).std(-1)
    assert spread.std() > (0.1 if row.quantized else 0.01) * std


def test_layers_with_better_types_are_llama_quantizes():
    better = [layer for layer in range(22) if random_model.gets_better_type(layer, 22)]
    assert better == [0, 1, 4, 7, 10, 13, 16, 19, 20, 21]       # llama-quantize --dry-run tinyllama-f16.gguf Q4_K_M


def test_bytes_read_per_token_of_the_published_shapes():
    """Q4_K_M of TinyLlama without its embedding table is 629.8 MB."""
    total = 0
    for matrix in random_model.matrices(SHAPES["tinyllama-1.1b"], MIXES["Q4_K_M"]):
        rows, columns = matrix.shape
        total += 0 if matrix.name.startswith("token_embd") else rows * tensor_type(matrix.type).row_bytes(columns)
    assert total / 1e6 == pytest.approx(629.8, abs=0.1)


def test_vocabulary_pieces_are_distinct_and_scored(tmp_path):
    file = write(tmp_path / "m.gguf", "F16", Shape(1, 256, 256, 4, 2, 32000))
    tokens, scores = list(file.kv["tokenizer.ggml.tokens"]), np.asarray(file.kv["tokenizer.ggml.scores"])
    assert len(tokens) == len(set(tokens)) == len(scores) == 32000
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"] and "▁" in tokens and "the" in tokens
    assert (np.diff(scores[259:]) < 0).all()


def test_a_gemma_has_what_its_architecture_asks_for(tmp_path):
    shape = Shape(2, 256, 512, 2, 1, 512, arch="gemma3", head=64, keys=(("attention.sliding_window", 8),))
    path = tmp_path / "m.gguf"
    random_model.write_random_model(path, shape, "Q4_0")
    assert np.isfinite(Context(Model.load(path), n_ctx=32).eval(range(20))).all()


def test_a_type_without_a_plain_scale_is_refused():
    with pytest.raises(PyggmlError, match="IQ1_M"):
        random_model.scale_fields(tensor_type("IQ1_M"))
