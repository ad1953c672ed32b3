"""Products with many columns, dense and of experts, against numpy."""

import os

import numpy as np
import pytest
from device_case import eight_bits, hands_on_what_it_makes, nmse, run, view, weight

from pyggml.backends.cuda import gemm as kernels
from pyggml.backends.cuda import moe
from pyggml.backends.cuda.act import INT8
from pyggml.backends.cuda.base import HandOn
from pyggml.ops import OPS

HALF = 1e-6                                     # activations and weights are half floats: NMSE
rng = np.random.default_rng(8)


def numbers(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("tile,name,k", [((64, 32), "Q4_K", 256), ((64, 64), "Q8_0", 96), ((128, 128), "IQ1_S", 256), ((64, 32), "F16", 76)])
def test_a_product_with_every_epilogue(monkeypatch, tile, name, k):
    monkeypatch.setattr(kernels, "tile_of", lambda *_: tile)
    tokens, m = 18, 35
    w, numeric = weight(numbers(m, k), name)
    x, norm, bias, residual = numbers(tokens, k), numbers(k), numbers(m), numbers(tokens, m)
    out = np.full((tokens, m), 7, np.float32)
    run("mul_mat", view(out, 0), [w, view(x, 0), view(norm), view(bias), view(residual, 0)], i=[0, 0, 0], f=[1e-5, 0.5, 30], tokens=tokens - 1)
    want = 30 * np.tanh((OPS["rms_norm"].reference(x, norm, 1e-5) @ numeric.T * 0.5 + bias + residual) / 30)
    assert nmse(out[:-1], want[:-1]) < HALF
    assert (out[-1] == 7).all()


@pytest.mark.skipif("PYGGML_PTX" in os.environ, reason="as PTX every type is decoded in test_layout.py")
@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "Q2_K", "IQ4_XS", "BF16"])
def test_types(name):
    w, numeric = weight(numbers(3, 256), name)
    x, out = numbers(9, 256), np.zeros((9, 3), np.float32)
    run("mul_mat", view(out), [w, view(x), None, None, None], i=[0, 0, 0], f=[0, 1])
    assert nmse(out, x @ numeric.T) < HALF


def test_gated_units():
    wg, g = weight(numbers(8, 64), "Q8_0")
    wu, u = weight(numbers(8, 64), "BF16")
    x, out = numbers(9, 64), np.zeros((9, 8), np.float32)
    run("glu_mat", view(out), [wg, view(x), None, wu, None, None], i=[0, 0, 0, 0], f=[0])
    assert nmse(out, OPS["glu"].reference(x @ g.T, x @ u.T, "silu")) < HALF


def test_numbers_that_half_floats_have_no_room_for_stay_finite():
    w, numeric = weight(numbers(8, 32), "F16")
    x, out = numbers(9, 32), np.zeros((9, 8), np.float32)
    x[0, :3] = 1e6, -1e6, 65504
    run("mul_mat", view(out, 0), [w, view(x, 0), None, None, None], i=[0, 0, 0], f=[0, 1], tokens=9)
    assert nmse(out, np.clip(x, -65504, 65504) @ numeric.T) < HALF


def test_large_tiles_where_they_fill_the_gpu():
    assert kernels.tile_of(4096, 512) == (128, 128) and kernels.tile_of(4096, 9) == (64, 32) and kernels.tile_of(14336, 64) == (64, 64)


# ---- experts ----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_route(gating, normalize):
    logits = numbers(3, 37)
    logits[1, [5, 30]] = 9                      # equal logits go to the lower expert
    ids, weights = np.full((3, 4), -1, np.int32), np.zeros((3, 4), np.float32)
    run("moe_route", view(ids, 0), [view(logits, 0), view(weights, 0)], i=[gating == "sigmoid", normalize], f=[1.5], tokens=2)
    wanted = OPS["moe_ids"].reference(logits, 4)
    assert (ids[:2] == wanted[:2]).all() and (ids[2] == -1).all()
    assert nmse(weights[:2], OPS["moe_weights"].reference(logits, wanted, gating, normalize, 1.5)[:2]) < 1e-12


def test_routing_of_nan_stays_among_the_experts():
    """An id that is no expert's would read weights far outside of memory: on a GPU the end of everything."""
    ids, weights = np.full((1, 2), -7, np.int32), np.zeros((1, 2), np.float32)
    run("moe_route", view(ids, 0), [view(np.full((1, 9), np.nan, np.float32), 0), view(weights, 0)], i=[0, 0], f=[1], tokens=1)
    assert ((ids >= 0) & (ids < 9)).all()


@pytest.mark.parametrize("residual", [True, False])
def test_sum(residual):
    y, w, r, out = numbers(3, 2, 20), numbers(3, 2), numbers(3, 20), np.full((3, 20), 7, np.float32)
    run("moe_sum", view(out, 0), [view(y, 0), view(w, 0), view(r, 0) if residual else None], tokens=2)
    assert nmse(out[:2], (OPS["moe_sum"].reference(y, w) + (r if residual else 0))[:2]) < 1e-12
    assert (out[2] == 7).all()


@pytest.mark.parametrize("pairs_at_most", [32, 0], ids=["matvec", "tensor cores"])
@pytest.mark.parametrize("own_rows", [False, True])
def test_products_of_experts(monkeypatch, pairs_at_most, own_rows):
    monkeypatch.setattr(moe, "PAIRS", pairs_at_most)
    tokens, used, experts, m, k = 4, 2, 3, 5, 64
    w, numeric = weight(numbers(experts, m, k), "Q8_0")
    ids = np.array([[2, 0], [0, 1], [2, 1], [1, 0]], np.int32)
    x = numbers(tokens, used, k) if own_rows else numbers(tokens, k)
    out = np.full((tokens, used, m), 7, np.float32)
    run("mul_mat_id", view(out, 0), [w, view(x, 0), None, view(ids, 0)], i=[0, 0], f=[0], tokens=3)
    seen = eight_bits(x) if pairs_at_most else x
    assert nmse(out[:3], OPS["matmul_id"].reference(numeric, seen, ids)[:3]) < HALF
    assert (out[3] == 7).all()


@pytest.mark.parametrize("pairs_at_most", [32, 0], ids=["matvec", "tensor cores"])
def test_gated_experts(monkeypatch, pairs_at_most):
    monkeypatch.setattr(moe, "PAIRS", pairs_at_most)
    wg, g = weight(numbers(3, 4, 64), "Q8_0")
    wu, u = weight(numbers(3, 4, 64), "Q5_1")
    x, norm, ids, out = numbers(2, 64), numbers(64), np.array([[2, 0], [0, 1]], np.int32), np.zeros((2, 2, 4), np.float32)
    run("glu_mat_id", view(out, 0), [wg, view(x, 0), view(norm), view(ids, 0), wu], i=[0, 0, 0, 1], f=[1e-5], tokens=2)
    y, product = OPS["rms_norm"].reference(x, norm, 1e-5), OPS["matmul_id"].reference
    y = eight_bits(y) if pairs_at_most else y
    assert nmse(out, OPS["glu"].reference(product(g, y, ids), product(u, y, ids), "gelu")) < 1e-5


@pytest.mark.parametrize("pairs_at_most", [32, 0], ids=["matvec", "tensor cores"])
def test_experts_with_biases(monkeypatch, pairs_at_most):
    monkeypatch.setattr(moe, "PAIRS", pairs_at_most)
    (wg, g), (wu, u) = (weight(numbers(3, 5, 64), "Q8_0") for _ in range(2))
    x, ids, bias, bias_up = numbers(2, 64), np.array([[2, 0], [0, 1]], np.int32), 3 * numbers(3, 5), 3 * numbers(3, 5)
    one, two = np.zeros((2, 2, 5), np.float32), np.zeros((2, 2, 5), np.float32)
    run("mul_mat_id", view(one, 0), [wg, view(x, 0), None, view(ids, 0), view(bias)], i=[0, 0], f=[0], tokens=2)
    run("glu_mat_id", view(two, 0), [wg, view(x, 0), None, view(ids, 0), wu, view(bias), view(bias_up)], i=[0, 0, 0, 3], f=[0], tokens=2)
    y = eight_bits(x) if pairs_at_most else x
    gate, up = (OPS["matmul_id"].reference(w, y, ids) + b[ids] for w, b in ((g, bias), (u, bias_up)))
    assert nmse(one, gate) < HALF and nmse(two, OPS["glu"].reference(gate, up, "clamped")) < HALF


@pytest.mark.parametrize("tokens", [1, 3])
def test_gated_experts_hand_on_what_they_make(tokens):
    """More rows than are quantized together, for the product that reads each of a token's experts apart."""
    (wg, _), (wu, _), (wd, _) = (weight(numbers(3, *shape), "Q8_0") for shape in ((160, 32), (160, 32), (4, 160)))
    ids = np.array([[2, 0], [0, 1], [1, 2]], np.int32)
    x, ids, made = numbers(3, 32), view(ids, 0), view(np.zeros((3, 2, 160), np.float32), 0)
    left = run("glu_mat_id", made, [wg, view(x, 0), None, ids, wu], i=[0, 0, 0, 0], f=[0], tokens=tokens, hands_on=HandOn(7, INT8))
    outs = [np.zeros((3, 2, 4), np.float32) for _ in range(2)]
    for out, memory in zip(outs, (left, None), strict=True):
        run("mul_mat_id", view(out, 0), [wd, made, None, ids], i=[7, 0], f=[0], tokens=tokens, shared=memory)
    assert left.prepared != (7, INT8) and outs[0][:tokens].all() and (outs[0] == outs[1]).all()


@pytest.mark.parametrize("reader", ["Q8_0", "F16"])
def test_a_sum_of_experts_hands_on_what_it_makes(reader):
    y, w, r = numbers(3, 2, 160), numbers(3, 2), numbers(3, 160)
    hands_on_what_it_makes("moe_sum", view(np.zeros((3, 160), np.float32), 0), [view(y, 0), view(w, 0), view(r, 0)], (), (), norm=view(numbers(160)),
                           reader=reader, tokens=2)
