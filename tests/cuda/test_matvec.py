"""Products with few columns against numpy, for every type, with every epilogue."""

import os

import numpy as np
import pytest
from device_case import eight_bits, hands_on_what_it_makes, nmse, run, scratch, view, weight

from pyggml.backends.cuda.base import DeviceStep
from pyggml.backends.cuda.decode import decoder
from pyggml.backends.cuda.layout import FLOATS, LAYOUTS
from pyggml.backends.cuda.matmul import by_columns
from pyggml.backends.cuda.plan import kernels
from pyggml.ops import OPS
from pyggml.ops.basic import GLU
from pyggml.types import TYPES

MULTIPLIED = [t.name for t in TYPES if t.activation]
if "PYGGML_PTX" in os.environ:          # decoding is compiled for every type in test_layout.py: here one type of each kind of product
    KINDS = {name: (d.halves, d.has_min, d.zero != 0) for name in LAYOUTS for d in [decoder(name)]}
    MULTIPLIED = [*FLOATS, *{kind: name for name, kind in reversed(KINDS.items()) if name in MULTIPLIED}.values()]
ROUNDING = 1e-10                                     # NMSE against the same products in float64
EPS = 1e-5
rng = np.random.default_rng(5)


def numbers(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def seen_by(name: str, x: np.ndarray) -> np.ndarray:
    return (x if name in ("F32", "F16", "BF16") else eight_bits(x.astype(np.float32))).astype(np.float64)


@pytest.mark.parametrize("name", MULTIPLIED)
def test_a_column_of_every_type(name):
    w, numeric = weight(numbers(3, 256), name)
    x, out = numbers(1, 256), np.zeros((1, 3), np.float32)
    run("mul_mat", view(out), [w, view(x), None, None, None], i=[0, 0, 0], f=[0, 1])
    assert nmse(out, seen_by(name, x) @ numeric.T) < ROUNDING


@pytest.mark.parametrize("name", ["Q4_K", "F16"])
def test_columns_with_every_epilogue(name):
    w, numeric = weight(numbers(5, 256), name)
    x, norm, bias, residual = numbers(4, 256) * 3, numbers(256), numbers(5), numbers(4, 5)
    out = np.full((4, 5), 7, np.float32)
    run("mul_mat", view(out, 0), [w, view(x, 0), view(norm), view(bias), view(residual, 0)], i=[0, 0, 0], f=[EPS, 0.5, 3], tokens=3)
    want = 3 * np.tanh((seen_by(name, OPS["rms_norm"].reference(x, norm, EPS)) @ numeric.T * 0.5 + bias + residual) / 3)
    assert nmse(out[:3], want[:3]) < 1e-7                # a code may round the other way
    assert (out[3] == 7).all()


@pytest.mark.parametrize("gate,up,kind,columns", [("Q4_0", "Q6_K", "silu", 1), ("Q4_0", "Q6_K", "gelu", 2), ("F32", "F16", "relu", 1),
                                                  ("F32", "F16", "silu", 2)])
def test_gated_units(gate, up, kind, columns):
    wg, g = weight(numbers(3, 256), gate)
    wu, u = weight(numbers(3, 256), up)
    x, a, b, out = numbers(columns, 256), numbers(3), numbers(3), np.zeros((columns, 3), np.float32)
    run("glu_mat", view(out), [wg, view(x), None, wu, view(a), view(b)], i=[0, 0, 0, GLU.index(kind)], f=[EPS])
    seen = seen_by(gate, x)
    assert nmse(out, OPS["glu"].reference(seen @ g.T + a, seen @ u.T + b, kind)) < ROUNDING


def test_rows_of_floats_of_any_length():
    for name in ("F32", "F16", "BF16"):
        w, numeric = weight(numbers(2, 44), name)
        x, out = numbers(2, 44), np.zeros((2, 2), np.float32)
        run("mul_mat", view(out), [w, view(x), None, None, None], i=[0, 0, 0], f=[0, 1])
        assert nmse(out, x @ numeric.T) < ROUNDING


def test_a_block_shares_rows_where_there_are_few():
    w, numeric = weight(numbers(2, 2080), "Q8_0")     # 65 groups: the warps of a block split them, with a ragged end
    x, out = numbers(1, 2080), np.zeros((1, 2), np.float32)
    run("mul_mat", view(out), [w, view(x), None, None, None], i=[0, 0, 0], f=[0, 1])
    assert nmse(out, eight_bits(x) @ numeric.T) < ROUNDING


def test_neighbouring_products_share_activations():
    w, numeric = weight(numbers(2, 64), "Q8_0")
    floats, exact = weight(numbers(2, 64), "F32")
    x, norm = numbers(1, 64), numbers(64)
    room = max(kernels()[1]["mul_mat"](DeviceStep("mul_mat", view(x), (m, view(x))), 0)[0] for m in (w, floats))
    memory = scratch(room)
    outs = [np.zeros((1, 2), np.float32) for _ in range(3)]
    wanted = OPS["rms_norm"].reference(x, norm, EPS)
    for out, matrix in zip(outs, (w, w, floats), strict=True):
        run("mul_mat", view(out), [matrix, view(x), view(norm), None, None], i=[4, 0, 0], f=[EPS, 1], shared=memory)
        x[:] = 0 if out is outs[0] else x               # the second must not read x again
        if out is outs[1]:
            assert (outs[0] == outs[1]).all()
            x[:] = 1                                    # another form of the same activations is made anew
    assert nmse(outs[0], eight_bits(wanted) @ numeric.T) < 1e-7
    assert nmse(outs[2], OPS["rms_norm"].reference(np.ones((1, 64), np.float32), norm, EPS) @ exact.T) < ROUNDING


@pytest.mark.parametrize("m,columns", [(160, 1), (32, 2)])      # the second 128 rows are not whole
def test_gated_units_hand_on_what_they_make(m, columns):
    (gate, _), (up, _) = weight(numbers(m, 64), "Q8_0"), weight(numbers(m, 64), "Q8_0")
    out = view(np.zeros((columns, m), np.float32))
    hands_on_what_it_makes("glu_mat", out, [gate, view(numbers(columns, 64)), None, up, None, None], i=[0, 0, 0, 0], f=[EPS])


@pytest.mark.parametrize("m,columns,reader", [(40, 1, "F16"), (544, 2, "Q8_0")])       # 544 numbers are more than a block's lanes take at once
def test_a_product_hands_on_what_it_makes_normed(m, columns, reader):
    w, numeric = weight(numbers(m, 64), "Q8_0")
    x, residual, out, norm = numbers(columns, 64), numbers(columns, m), np.zeros((columns, m), np.float32), numbers(m)
    hands_on_what_it_makes("mul_mat", view(out, 0), [w, view(x, 0), None, None, view(residual, 0)], i=[0, 0, 0], f=[EPS, 1], norm=view(norm),
                           reader=reader, tokens=columns)
    assert nmse(out, eight_bits(x) @ numeric.T + residual) < ROUNDING


def test_which_products_take_which_way():
    assert by_columns("Q4_K", 8) and not by_columns("Q4_K", 9) and by_columns("F32", 512)
