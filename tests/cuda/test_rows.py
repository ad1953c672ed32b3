"""Norms, rotation, arithmetic and sampling against the op table's references."""

import numpy as np
import pytest
from device_case import hands_on_what_it_makes, nmse, run, view

from pyggml.backends.cuda.basic import OF_ONE
from pyggml.ops import OPS
from pyggml.ops.basic import GLU
from pyggml.ops.rope import MODES

rng = np.random.default_rng(6)


def numbers(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(3, 96), (2, 3, 20)])
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(shape, weighted):
    x, w, out = numbers(*shape), numbers(shape[-1]) if weighted else None, np.full(shape, 7, np.float32)
    run("rms_norm", view(out, 0), [view(x, 0), view(w) if weighted else None], f=[1e-5], tokens=shape[0] - 1)
    assert nmse(out[:-1], OPS["rms_norm"].reference(x, w, 1e-5)[:-1]) < 1e-12
    assert (out[-1] == 7).all()


def test_rms_norm_with_a_residual_hands_on():
    x, w, residual, norm, out = numbers(2, 96), numbers(96), numbers(2, 96), numbers(96), np.zeros((2, 96), np.float32)
    hands_on_what_it_makes("rms_norm", view(out, 0), [view(x, 0), view(w), view(residual, 0)], [], [1e-5], norm=view(norm), tokens=2)
    assert nmse(out, OPS["rms_norm"].reference(x, w, 1e-5) + residual) < 1e-12


@pytest.mark.parametrize("op,i,f,attrs", [("add", [], [], {}), ("mul", [], [], {}), ("scale", [], [0.3], {"factor": 0.3}),
                                          ("softcap", [], [0.7], {"cap": 0.7}),
                                          *(("glu", [n], [], {"kind": kind}) for n, kind in enumerate(GLU))])
@pytest.mark.parametrize("d", [40, 7])
def test_element_by_element(op, i, f, attrs, d):
    a, b, out = numbers(3, d), numbers(3, d), np.full((3, d), 9, np.float32)
    run(op, view(out, 0), [view(a, 0)] if op in OF_ONE else [view(a, 0), view(b, 0)], i, f, tokens=2)
    want = OPS[op].reference(a, **attrs) if op in OF_ONE else OPS[op].reference(a, b, **attrs)
    assert nmse(out[:2], want[:2]) < 1e-12
    assert (out[2] == 9).all()
    if op in ("add", "mul"):
        run(op, view(out), [view(a), view(b[0])])
        assert nmse(out, OPS[op].reference(a, b[0])) < 1e-12


def test_rows_of_a_value():
    x, ids, out = numbers(5, 24), np.array([4, 1], np.int32), np.zeros((2, 24), np.float32)
    run("get_rows", view(out), [view(x), view(ids)], f=[1.0])
    assert (out == x[ids]).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("d,rotated", [(16, 16), (24, 8)])
def test_rope_in_place(mode, d, rotated):
    pos, inv_freq = np.array([3, 100000, 7], np.int32), (10000.0 ** (-np.arange(rotated // 2) * 2 / rotated)).astype(np.float32)
    table, x = np.zeros((3, rotated // 2, 2), np.float32), numbers(3, 2, d)
    run("rope_table", view(table, 0), [view(pos, 0), view(inv_freq)], f=[1.5], tokens=3)
    assert np.abs(table - OPS["rope_table"].reference(pos, inv_freq, 1.5)).max() < 1e-6
    want = OPS["rope"].reference(x, table, mode)
    want[2] = x[2]
    run("rope", view(x, 0), [view(x, 0), view(table, 0)], i=[MODES.index(mode), rotated], tokens=2)
    assert nmse(x, want) < 1e-12


def test_the_best_token_and_the_k_best():
    logits = numbers(3, 70)
    logits[0, [60, 9]] = 5                               # of equals the lower id
    logits[1] = -1e30
    ids, ranked, values = np.full(3, -1, np.int32), np.zeros((3, 4), np.int32), np.zeros((3, 4), np.float32)
    run("argmax", view(ids), [view(logits)])
    assert ids.tolist() == [9, 0, int(logits[2].argmax())]
    run("top_k", view(ranked), [view(logits), view(values)])
    want = np.argsort(-logits, axis=1, kind="stable")[:, :4]
    assert (ranked == want).all() and (values == np.take_along_axis(logits, want, 1)).all()


def test_advance():
    ids, pos, cell = np.array([7, 8], np.int32), np.array([3, 5], np.int32), np.array([4, 9], np.int32)
    history, count, tokens = np.zeros((3, 2), np.int32), np.array([1], np.int32), np.zeros(2, np.int32)
    run("advance", view(tokens), [view(a) for a in (ids, pos, cell, history, count)])
    assert tokens.tolist() == [7, 8] and pos.tolist() == [4, 6] and cell.tolist() == [5, 10] and count.tolist() == [2]
    assert history.tolist() == [[0, 0], [7, 8], [0, 0]]
