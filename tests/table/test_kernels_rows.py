"""Row-wise kernels: get_rows, rms_norm, add, mul, scale, softcap, glu, and the experts' routing and sum."""

import numpy as np
import pytest
from kernel_case import GLU_CLAMPED, GLU_GELU, GLU_RELU, GLU_SILU, ISAS, MOE_SIGMOID, MOE_SOFTMAX, THREADS, nmse, run

FLOAT = 1e-12                   # NMSE of float arithmetic against double
SHAPES = [(1, 1), (1, 33), (3, 64), (37, 100), (300, 257), (2, 20000)]
rng = np.random.default_rng(7)


def floats(*shape) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("shape", SHAPES)
def test_element_wise(isa, threads, shape):
    a, b, row, dst = floats(*shape), floats(*shape), floats(shape[1]), np.full(shape, np.nan, np.float32)
    for op, want in (("add", a + b), ("mul", a * b)):
        run(op, isa, dst, [a, b], threads=threads)
        assert np.array_equal(dst, want)
    run("add", isa, dst, [a, row], threads=threads)
    assert np.array_equal(dst, a + row)
    run("scale", isa, dst, [a], f=[0.25], threads=threads)
    assert np.array_equal(dst, a * np.float32(0.25))
    in_place = a.copy()
    run("mul", isa, in_place, [in_place, b], threads=threads)
    assert np.array_equal(in_place, a * b)


@pytest.mark.parametrize("isa", ISAS)
def test_strided_sources(isa):
    wide = floats(5, 3, 48)
    a, dst = wide[:, 1], np.zeros((5, 48), np.float32)
    run("add", isa, dst, [(a, {"strides": a.strides[:-1]}), (a, {"strides": a.strides[:-1]})])
    assert np.array_equal(dst, 2 * a)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("shape", [*SHAPES, (4, 6, 80)])
def test_rms_norm(isa, threads, shape):
    x, weight, dst = 30 * floats(*shape), floats(shape[-1]), np.full(shape, np.nan, np.float32)
    want = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)
    run("rms_norm", isa, dst, [x, None], f=[1e-5], threads=threads)
    assert nmse(dst, want) < FLOAT
    run("rms_norm", isa, dst, [x, weight], f=[1e-5], threads=threads)
    assert nmse(dst, want * weight) < FLOAT
    residual = floats(*shape)
    run("rms_norm", isa, dst, [x, weight, residual], f=[1e-5], threads=threads)
    assert nmse(dst, want * weight + residual) < FLOAT


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("shape", [*SHAPES, (4, 6, 80)])
def test_softcap(isa, threads, shape):
    x, dst = 40 * floats(*shape), np.full(shape, np.nan, np.float32)
    x.flat[0] = -3e38
    run("softcap", isa, dst, [x], f=[30.0], threads=threads)
    assert nmse(dst, 30 * np.tanh(x.astype(np.float64) / 30)) < FLOAT


GLU = {
    GLU_SILU: lambda x, up: x / (1 + np.exp(-x)) * up,
    GLU_GELU: lambda x, up: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3))) * up,
    GLU_RELU: lambda x, up: np.maximum(x, 0) * up,
    GLU_CLAMPED: lambda x, up: np.minimum(x, 7) / (1 + np.exp(-1.702 * np.minimum(x, 7))) * (np.clip(up, -7, 7) + 1),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", GLU)
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_glu(isa, kind, shape):
    gate, up, dst = 5 * floats(*shape), 5 * floats(*shape), np.full(shape, np.nan, np.float32)
    gate.flat[0] = -200.0                       # the exponential of 200 is no float
    run("glu", isa, dst, [gate, up], i=[kind], threads=2)
    assert nmse(dst, GLU[kind](gate.astype(np.float64), up)) < FLOAT


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_get_rows(isa, threads, dtype):
    table, ids = floats(50, 1000).astype(dtype), rng.integers(0, 50, 70).astype(np.int32)
    dst = np.full((70, 1000), np.nan, np.float32)
    run("get_rows", isa, dst, [table, ids], f=[1.0], threads=threads)
    assert np.array_equal(dst, table[ids].astype(np.float32))
    run("get_rows", isa, dst, [table, ids], f=[3.0], threads=threads)
    assert np.array_equal(dst, table[ids].astype(np.float32) * 3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [MOE_SOFTMAX, MOE_SIGMOID])
@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("tokens, experts, used", [(1, 8, 2), (5, 60, 4), (200, 128, 8), (3, 4, 4)])
def test_moe_route(isa, kind, normalize, tokens, experts, used):
    logits = np.round(3 * floats(tokens, experts), 1)           # rounded: there will be ties
    ids, weights = np.full((tokens, used), -1, np.int32), np.full((tokens, used), np.nan, np.float32)
    run("moe_route", isa, ids, [logits, weights], i=[kind, normalize], f=[2.5], threads=3)
    x = logits.astype(np.float64)
    p = np.exp(x - x.max(-1, keepdims=True)) if kind == MOE_SOFTMAX else 1 / (1 + np.exp(-x))
    p = p / p.sum(-1, keepdims=True) if kind == MOE_SOFTMAX else p
    want = np.argsort(-x, axis=-1, kind="stable")[:, :used]
    chosen = np.take_along_axis(p, want, -1)
    assert np.array_equal(ids, want)
    assert nmse(weights, 2.5 * (chosen / chosen.sum(-1, keepdims=True) if normalize else chosen)) < FLOAT


@pytest.mark.parametrize("isa", ISAS)
def test_moe_route_without_any_weight(isa):
    ids, weights = np.full((1, 2), -1, np.int32), np.full((1, 2), np.nan, np.float32)
    run("moe_route", isa, ids, [np.full((1, 4), -1e4, np.float32), weights], i=[MOE_SIGMOID, 1], f=[1.0])
    assert ids.tolist() == [[0, 1]] and np.array_equal(weights, np.zeros((1, 2)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_moe_sum(isa, threads, with_residual):
    y, weights, residual, dst = floats(9, 3, 200), floats(9, 3), floats(9, 200), np.full((9, 200), np.nan, np.float32)
    run("moe_sum", isa, dst, [y, weights, residual if with_residual else None], threads=threads)
    assert nmse(dst, np.einsum("tum,tu->tm", y.astype(np.float64), weights) + (residual if with_residual else 0)) < FLOAT
