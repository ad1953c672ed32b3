"""Row dots of weights with their activation type, on every instruction set."""

import numpy as np
import pytest
from type_cases import TYPES, as_bytes, every_isa, golden, isa, random_blocks  # noqa: F401

from pyggml import quants
from pyggml.native import ffi, lib
from pyggml.types import tensor_type

MULTIPLIED = [t for t in TYPES if t.activation]
BOUND = {"Q4_1": 5e-4, "Q5_1": 5e-4}                           # their activation blocks carry a half-float sum


def dot(row, n: int, weights: np.ndarray, activations: np.ndarray) -> float:
    result = np.zeros(1, np.float32)
    status = lib.pyg_dot(row.id, n, ffi.cast("void *", weights.ctypes.data), ffi.cast("void *", activations.ctypes.data),
                         ffi.cast("float *", result.ctypes.data))
    assert status == 0
    return float(result[0])


@every_isa
@pytest.mark.parametrize("row", MULTIPLIED, ids=str)
def test_dot_is_the_product_of_what_the_blocks_say(row, isa):  # noqa: F811
    rng = np.random.default_rng(2)
    for n in (0, 256, 768, 4096):
        weights = quants.quantize(rng.normal(size=n).astype(np.float32), row)
        activations = quants.quantize(rng.normal(size=n).astype(np.float32) * 3, row.activation)
        w, a = (quants.dequantize(b, t).astype(np.float64) for b, t in ((weights, row), (activations, row.activation)))
        assert abs(dot(row, n, weights, activations) - w @ a) <= BOUND.get(row.name, 1e-6) * (np.abs(w) @ np.abs(a))


@every_isa
@pytest.mark.parametrize("row", MULTIPLIED, ids=str)
def test_dot_of_extreme_codes(row, isa):  # noqa: F811
    """Every code at its end of the range and activations at +-127: no 16-bit sum on the way may overflow."""
    n = 512
    for activation in (1.0, -1.0):
        signs = np.where(np.arange(n) % 3 == 0, -activation, activation).astype(np.float32)
        activations = quants.quantize(signs, row.activation)
        a = quants.dequantize(activations, row.activation).astype(np.float64)
        for seed in range(4):
            blocks = random_blocks(row, 2 + n // row.block, seed)[2:]
            with np.errstate(invalid="ignore"):
                w = quants.dequantize(blocks.reshape(1, -1), row)[0].astype(np.float64)
            if np.isfinite(w).all():
                got = dot(row, n, blocks, activations)
                assert abs(got - w @ a) <= BOUND.get(row.name, 1e-6) * (np.abs(w) @ np.abs(a)) + 1e-30


@every_isa
@pytest.mark.parametrize("row", [t for t in MULTIPLIED if "actq_bytes" in golden(t.name) and t.activation != "F32"], ids=str)
def test_dot_is_ggmls(row, isa):  # noqa: F811
    vectors = golden(row.name)
    activations = np.ascontiguousarray(vectors["actq_bytes"])
    a = np.abs(quants.dequantize(activations.view(np.uint8), row.activation)).astype(np.float64).reshape(-1)
    assert (quants.quantize(golden("input")["act"], row.activation) == activations.view(np.uint8).reshape(-1)).all()
    for kind in ("plain", "imat"):
        for blocks, floats, want in zip(as_bytes(vectors[f"{kind}_bytes"]), vectors[f"{kind}_deq"], vectors[f"{kind}_dot"], strict=True):
            bound = BOUND.get(row.name, 1e-6) * (np.abs(floats.astype(np.float64)) @ a)
            assert abs(dot(row, 1024, np.ascontiguousarray(blocks), activations) - want) <= bound


@every_isa
@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("n", [1, 15, 64, 100])
def test_dot_of_plain_numbers_of_any_length(name, n, isa):  # noqa: F811
    row, rng = tensor_type(name), np.random.default_rng(n)
    weights, a = quants.quantize(rng.normal(size=n), row), rng.normal(size=n).astype(np.float32)
    w = quants.dequantize(weights, row).astype(np.float64)
    assert abs(dot(row, n, weights, a) - w @ a) <= 1e-6 * (np.abs(w) @ np.abs(a))
