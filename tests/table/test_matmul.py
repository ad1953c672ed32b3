"""Matmuls of every weight type, on every ISA, in every layout, against float64 products of the dequantized weights.

The reference rounds the activations as their format says, so what is left is the order of float additions.
"""

import ctypes
import mmap

import numpy as np
import pytest
from kernel_case import ISAS, THREADS, instruction_set, nmse, pool
from matmul_support import ACT_ROW_Q8_1, EPS, SMALL_COLS, Matmul, Weight, act_layout, activation, rms_norm, rounded

from pyggml.native import lib
from pyggml.types import TYPES

MULTIPLIED = [t for t in TYPES if t.activation]
PACKED = [t for t in MULTIPLIED if lib.pyg_pack_bytes(t.id, 16, 256)]
CASES = [(t.name, layout) for t in MULTIPLIED for layout in ("packed", "raw", "exact") if t in PACKED or layout != "packed"]
COLUMNS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 64, 33, 40)
ROWS = (1, 15, 16, 33)


def bound(weight: Weight, columns: int) -> float:
    """Largest NMSE allowed: float rounding; Q8_1 rows also round their sums to half floats."""
    if act_layout(weight.format, columns) == ACT_ROW_Q8_1:
        return 1e-6
    return 1e-10                            # a single sum may cancel to a small number


def test_every_type_has_a_case():
    assert {t.name for t in PACKED} >= {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4",
                                        "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name, layout", CASES)
def test_mul_mat(isa, name, layout):
    rng = np.random.default_rng(len(name))
    with instruction_set(isa):
        for case, columns in enumerate(COLUMNS):
            rows, k = ROWS[case % len(ROWS)], (256, 768)[case % 2]
            weight = Weight(name, (rows, k), layout, rng)
            x = rng.standard_normal((columns, k), np.float32)
            expected = rounded(x, weight.format) @ weight.seen(columns).T
            for prepare in (False, True):
                matmul = Matmul(x, weight, prepare=prepare)
                for _ in range(2):              # packs on the first run, finds tiles packed on the second
                    error = nmse(matmul(pool(THREADS[case % len(THREADS)])), expected)
                    assert error < bound(weight, columns), (columns, rows, k, prepare)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", [t.name for t in PACKED])
@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_few_columns_of_many_rows(isa, name, columns):
    """Several tiles at once, the tiles that are left over, and one of fewer rows."""
    rng = np.random.default_rng(len(name))
    weight = Weight(name, (149, 512), "packed", rng)
    x = rng.standard_normal((columns, 512), np.float32)
    with instruction_set(isa):
        expected = rounded(x, weight.format) @ weight.seen(columns).T
        for threads in THREADS:
            assert nmse(Matmul(x, weight)(pool(threads)), expected) < bound(weight, columns), threads


@pytest.mark.parametrize("name, k", [("F32", 1), ("F16", 37), ("BF16", 5), ("Q4_0", 32), ("Q8_0", 96), ("MXFP4", 32), ("Q4_1", 160)])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("columns", [9, 40])
def test_rows_of_odd_length(isa, name, k, columns):
    rng = np.random.default_rng(k)
    weight = Weight(name, (17, k), "packed", rng)
    x = rng.standard_normal((columns, k), np.float32)
    with instruction_set(isa):
        assert nmse(Matmul(x, weight)(pool(2)), rounded(x, weight.format) @ weight.seen(columns).T) < bound(weight, columns)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["F16", "Q4_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("threads", THREADS)
def test_many_chunks(isa, name, threads):
    rng = np.random.default_rng(threads)
    weight = Weight(name, (1000, 256), "packed", rng)
    x = rng.standard_normal((150, 256), np.float32)
    with instruction_set(isa):
        for columns in (1, 5, 150):
            got = Matmul(x[:columns], weight, prepare=columns > SMALL_COLS)(pool(threads))
            assert nmse(got, rounded(x[:columns], weight.format) @ weight.seen(columns).T) < bound(weight, columns)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["F32", "Q4_0", "Q4_K"])
def test_result_does_not_depend_on_threads_or_batch(isa, name):
    rng = np.random.default_rng(3)
    weight = Weight(name, (100, 512), "packed", rng)
    x = rng.standard_normal((40, 512), np.float32)
    with instruction_set(isa):
        whole = Matmul(x, weight, prepare=True)(pool(1)).copy()
        assert np.array_equal(whole, Matmul(x, weight, prepare=True)(pool(7)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("columns", [1, 8, 20, 40])
@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q4_K"])
def test_norm_bias_scale_residual_softcap(isa, name, columns):
    rng = np.random.default_rng(columns)
    weight = Weight(name, (33, 512), "packed", rng)
    x, residual = rng.standard_normal((columns, 512), np.float32) * 3, rng.standard_normal((columns, 33), np.float32)
    norm, bias = rng.uniform(0.5, 2, 512).astype(np.float32), rng.standard_normal(33).astype(np.float32)
    with instruction_set(isa):
        product = rounded(rms_norm(x, norm, EPS), weight.format) @ weight.seen(columns).T
        for prepare in (False, True):
            run = lambda **more: Matmul(x, weight, norm=norm, prepare=prepare, **more)(pool(2)).copy()  # noqa: E731, B023
            # the norm itself is rounded to float32, so a byte of the activations may fall to the other side
            assert nmse(run(), product) < 1e-5
            assert nmse(run(bias=bias) - run(), np.broadcast_to(bias, product.shape)) < 1e-10
            assert nmse(run(bias=bias, scale=0.25, residual=residual), 0.25 * run().astype(float) + bias + residual) < 1e-11
            assert nmse(run(residual=residual, softcap=2.0), 2 * np.tanh((run().astype(float) + residual) / 2)) < 1e-11


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("columns", [64, 75])
@pytest.mark.parametrize("name", ["F16", "Q4_0", "Q4_K"])
def test_residual_of_whole_and_partial_tiles(isa, name, columns):
    """A residual and nothing else, which a matrix unit adds by itself; so deep that it puts its sums aside on the way."""
    rng = np.random.default_rng(columns)
    x, residual = rng.standard_normal((columns, 2560), np.float32), 100 * rng.standard_normal((columns, 85), np.float32)
    with instruction_set(isa):
        weight = Weight(name, (85, 2560), "packed", rng)
        got = Matmul(x, weight, prepare=True, residual=residual)(pool(2))
        assert nmse(got, rounded(x, weight.format) @ weight.seen(columns).T + residual) < bound(weight, columns)


@pytest.mark.skipif("amx" not in ISAS, reason="needs the tile registers of AMX")
def test_tile_registers_keep_the_shape_of_others():
    """llama.cpp, in the same process, shapes the registers of a thread once and for all."""
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("c4e2784907c3 c4e2794907c3"))          # ldtilecfg [rdi]; ret; sttilecfg [rdi]; ret
    start = ctypes.addressof(ctypes.c_char.from_buffer(code))
    load, store = (ctypes.CFUNCTYPE(None, ctypes.c_void_p)(start + at) for at in (0, 6))
    others, found, none = np.zeros((3, 64), np.uint8)
    others[[0, 16, 48]] = 1, 32, 8                                  # one tile of 8 rows of 32 bytes
    rng = np.random.default_rng(0)
    matmul = Matmul(rng.standard_normal((64, 256), np.float32), Weight("Q4_0", (33, 256), "packed", rng), prepare=True)
    with instruction_set("amx"):
        load(others.ctypes.data)
        matmul(pool(1))
        store(found.ctypes.data)
        load(none.ctypes.data)
    assert np.array_equal(found, others)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("columns", [1, 3, 20, 50])
@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("name, layout", [("Q4_0", "packed"), ("Q6_K", "packed"), ("Q4_0", "raw"), ("F16", "exact"), ("IQ3_S", "raw")])
def test_glu_mat(isa, name, layout, kind, columns):
    rng = np.random.default_rng(columns)
    gate, up = (Weight(name, (49, 256), layout, rng) for _ in range(2))
    x = rng.standard_normal((columns, 256), np.float32)
    bias, bias_up = rng.standard_normal((2, 49)).astype(np.float32)
    with instruction_set(isa):
        y = rounded(x, gate.format)
        expected = activation(kind, y @ gate.seen(columns).T + bias) * (y @ up.seen(columns).T + bias_up)
        for prepare in (False, True):
            assert nmse(Matmul(x, gate, up, bias=bias, bias_up=bias_up, glu=kind, prepare=prepare)(pool(3)), expected) < 1e-11


@pytest.mark.parametrize("isa", ISAS)
def test_prepared_activations_are_shared_by_id(isa):
    """Two steps with one act id prepare once: the second must not see a changed x; another id must."""
    from pyggml.backends.cpu import Program
    rng = np.random.default_rng(0)
    weight = Weight("Q4_0", (16, 64), "packed", rng)
    x, zero = rng.standard_normal((1, 64), np.float32), np.zeros((1, 64), np.float32)
    out = np.empty((3, 1, 16), np.float32)
    program = Program()
    w = weight.view(program)
    for step, (source, act_id) in enumerate([(x, 5), (zero, 5), (zero, 6)]):
        program.step("mul_mat", program.view(out[step]), [w, program.view(source)], [act_id, weight.format, 0], [0.0, 1.0])
    with instruction_set(isa):
        program.finish().run(pool(1))
    assert np.array_equal(out[0], out[1]) and np.abs(out[0]).max() > 0
    assert not out[2].any()
