"""Encoders: the formula types byte for byte ggml's, the searched types with no more error than ggml's."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from type_cases import (  # noqa: F401
    BLOCKED,
    FORMULA,
    SEARCHED,
    as_bytes,
    every_isa,
    golden,
    isa,
    numpy_encode,
    squared_error,
)

from pyggml import quants
from pyggml.errors import PyggmlError
from pyggml.types import TYPES, tensor_type

X, IMATRIX = golden("input")["X"], golden("input")["imatrix"]


def ggml_bytes(name: str) -> np.ndarray | None:
    """ggml's encoding of X without importance."""
    vectors, more = golden(name), golden("more")
    for found in (vectors.get("plain_bytes"), vectors.get("act_bytes"), more.get(f"{name}_bytes")):
        if found is not None:
            return as_bytes(found)
    return None


@every_isa
@pytest.mark.parametrize("row", [t for t in TYPES if t.name in FORMULA and ggml_bytes(t.name) is not None], ids=str)
def test_formula_types_give_ggmls_bytes(row, isa):  # noqa: F811
    want = ggml_bytes(row.name)
    assert (quants.quantize(X, row) == want).all()
    assert (numpy_encode(row, X, None) == want).all()


@every_isa
@pytest.mark.parametrize("row", [t for t in TYPES if t.name in FORMULA and t.block > 1], ids=str)
def test_any_number_of_blocks_and_blocks_that_are_odd(row, isa):  # noqa: F811
    """1 to 35 blocks: all widths of vectors with their rests. Extremes twice with either sign, zeros of either sign, one weight alone."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((35, row.block)).astype(np.float32)
    x[3] = 0
    x[4] = -0.0
    x[5] = 0
    x[5, -1] = -2
    x[6, 1], x[6, -2] = -9, 9
    x[7, 1], x[7, -2] = 9, -9
    x[8] = 1
    x[9, 2:4] = x[9].min() - 1
    want = numpy_encode(row, x, None)
    for n in range(1, 36):
        assert (quants.quantize(x[35 - n:].reshape(1, -1), row).reshape(n, -1) == want[35 - n:]).all(), n


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", BLOCKED, ids=str)
def test_what_is_not_finite_is_refused_wherever_it_is(row, bad):
    for at in (0, row.block - 1, 17 * row.block + 5, 300 * row.block - 1):
        x = np.zeros(300 * row.block, np.float32)
        x[at] = bad
        shape = (3, 100 * row.block)
        with pytest.raises(PyggmlError, match=rf"cannot quantize {bad} at index \[{at // shape[1]}, {at % shape[1]}\] to {row}"):
            quants.quantize(x.reshape(shape), row)


def test_every_formula_type_is_compared():
    assert {t.name for t in TYPES if t.name in FORMULA and ggml_bytes(t.name) is not None} == FORMULA - {"F32"}


def ggml_error(row, w: np.ndarray | None) -> np.ndarray:
    """ggml's error on each row of X."""
    kind = "plain" if w is None else "imat"
    known = golden("more").get(f"{row.name}_{kind}_error")
    return known if known is not None else squared_error(row, ggml_choice(row, w), X, w)


def ggml_choice(row, w: np.ndarray | None) -> np.ndarray:
    """ggml's encoding of X by a search."""
    return as_bytes(golden(row.name)["plain_bytes" if w is None else "imat_bytes"])


WEIGHTED_TOO = [tensor_type(name) for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1")]
CODEBOOKS = {"IQ2_XXS": 32, "IQ2_XS": 16, "IQ2_S": 16, "IQ3_XXS": 32, "IQ3_S": 32, "IQ1_S": 32, "IQ1_M": 16}      # weights of a scale
weighted = pytest.mark.parametrize("w", [None, IMATRIX], ids=["plain", "imatrix"])


# An error below this part of the energy is only the rounding of half-float scales, and a matter of luck; below TINY scales hardly have digits.
NEGLIGIBLE, TINY = 3e-7, 1e-12


def energy(w: np.ndarray | None) -> np.ndarray:
    return (X.astype(np.float64) ** 2 * (1 if w is None else w)).sum(axis=1)


@every_isa
@weighted
@pytest.mark.parametrize("row", CODEBOOKS)
def test_codebook_types_give_ggmls_bytes_without_search(row, w, isa):  # noqa: F811
    same = (quants.quantize(X, row, w) == golden("more")[f"{row}_{'plain' if w is None else 'imat'}_bytes"]).all(axis=1)
    if row.startswith("IQ1"):
        same[[9, 14, 15]] = True           # a constant, two values and a ramp: of splits that are equally good rounding chooses one
    assert same.all()


@every_isa
@weighted
@pytest.mark.parametrize("row", [*(t for t in SEARCHED if t.name not in CODEBOOKS), *WEIGHTED_TOO], ids=str)
def test_without_search_the_error_is_ggmls_to_four_digits(row, w, isa):  # noqa: F811
    theirs, ours = ggml_error(row, w), squared_error(row, quants.quantize(X, row, w), X, w)
    assert abs(ours.sum() / theirs.sum() - 1) < 5e-5
    assert (np.abs(ours - theirs) <= 2e-3 * theirs + NEGLIGIBLE * energy(w)).all()         # single rows: a tie may fall either way


# A search adds a mean square of the weights, of the row or so many times that of the block, before a root: importance * sqrt(.. + x^2).
MEAN_SQUARE = {"Q4_0": "row", "Q4_1": "row", "Q5_0": "row", "Q5_1": "row", "Q2_K": 1, "Q3_K": 4, "Q4_K": 4, "Q5_K": 4, "IQ4_NL": 4, "IQ4_XS": 4}
MEAN_SQUARE_PLAIN = {"Q3_K": 16}


def minimized(row, w: np.ndarray | None) -> np.ndarray | None:
    """What squared errors are weighted with in a search: (rows, n)."""
    square = X.astype(np.float64) ** 2
    if w is None and row.name == "Q4_0":
        return square
    kind = (MEAN_SQUARE if w is not None else MEAN_SQUARE_PLAIN).get(row.name)
    if kind is None:
        return w
    if kind == "row":
        mean = square.mean(axis=1, keepdims=True)
    else:
        mean = kind * square.reshape(len(X), -1, row.block).mean(axis=2).repeat(row.block, axis=1)
    return (1 if w is None else w) * np.sqrt(mean + square)


def loss(blocks: np.ndarray, row, weights: np.ndarray | None, group: int, coherence: float = 4) -> tuple[np.ndarray, float]:
    """What a search minimizes, of each row: squared errors, of which those along the weights of a group count `coherence` times.
    And what of their energy the weights keep along themselves."""
    x, y = (v.astype(np.float64).reshape(len(X), -1, group) for v in (X, quants.dequantize(blocks, row)))
    w = np.ones_like(x) if weights is None else np.broadcast_to(weights, X.shape).reshape(x.shape)
    energy, along = (w * x * x).sum(axis=2), (w * x * (x - y)).sum(axis=2)
    again = np.divide(along ** 2, energy, out=np.zeros_like(energy), where=energy > 0)
    return ((w * (x - y) ** 2).sum(axis=2) + (coherence - 1) * again).sum(axis=1), 1 - along.sum() / energy.sum()


# Types that a search stretches, as coarse codes shrink weights: always, or without importance.
STRETCHED = {"Q2_K", "Q3_K", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "Q2_0"}
STRETCHED_PLAIN = STRETCHED | {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K"}


@every_isa
@weighted
@pytest.mark.parametrize("row", [t for t in BLOCKED if t.name not in {"Q8_1", "Q8_K", *CODEBOOKS}], ids=str)
def test_search_loses_no_more_than_ggml(row, w, isa):  # noqa: F811
    formula = row.name in FORMULA and not (w is not None and row in WEIGHTED_TOO)
    coherence = 4 if row.name in (STRETCHED_PLAIN if w is None else STRETCHED) else 1
    blocks = ggml_bytes(row.name) if formula else ggml_choice(row, w)
    weights = minimized(row, w)
    (theirs, _), (ours, _) = (loss(b, row, weights, row.block, coherence) for b in (blocks, quants.quantize(X, row, w, search=True)))
    assert (ours <= theirs * (1 + 1e-6) + NEGLIGIBLE * energy(weights) + TINY).all()
    assert ours.sum() <= theirs.sum() * (1 + 1e-6)


@every_isa
@weighted
@pytest.mark.parametrize("row", [tensor_type(name) for name in ("Q2_K", "Q3_K", "TQ1_0", "TQ2_0", "Q2_0")], ids=str)
def test_search_takes_back_what_least_squares_shrinks(row, w, isa):  # noqa: F811
    """No block would lose less if it were longer, but for the rounding of half floats."""
    weights = np.broadcast_to(1 if (known := minimized(row, w)) is None else known, X.shape)
    x, y, weights = (v[:4].astype(np.float64) for v in (X, quants.dequantize(quants.quantize(X, row, w, search=True), row), weights))
    xx, xy, yy = ((weights * product).reshape(-1, row.block).sum(axis=1) for product in (x * x, x * y, y * y))
    longer = 4 * xy / (yy + 3 * xy ** 2 / xx)
    assert np.abs(longer - 1).max() < 1e-3


@pytest.mark.parametrize("row", [tensor_type(name) for name in ("Q2_K", "TQ1_0", "TQ2_0", "Q2_0")], ids=str)
def test_search_leaves_what_codes_can_hold(row):
    x = np.tile(np.float32([-0.5, 0, 0.5, 0]), (2, 64))
    assert (quants.dequantize(quants.quantize(x, row, search=True), row) == x).all()


def codebook_weights(w: np.ndarray | None) -> np.ndarray | None:
    """Columns with half of a block's mean importance more, as ggml weighs them."""
    if w is None:
        return None
    square, columns = X.reshape(len(X), -1, 256).astype(np.float64) ** 2, w.astype(np.float64).reshape(-1, 256)
    damped = columns + 0.5 * columns.mean(axis=1, keepdims=True)
    return (damped * np.sqrt(2 * square.mean(axis=2, keepdims=True) + square)).reshape(X.shape)


@every_isa
@weighted
@pytest.mark.parametrize("row", [tensor_type(name) for name in CODEBOOKS], ids=str)
def test_search_of_codebooks_loses_less_than_ggml_and_does_not_shrink(row, w, isa):  # noqa: F811
    weights = codebook_weights(w)
    (ours, kept), (theirs, _) = (loss(quants.quantize(X, row, w, search=search), row, weights, CODEBOOKS[row.name]) for search in (True, False))
    assert ours.sum() < theirs.sum()
    assert kept > 0.93


@pytest.mark.parametrize("row", SEARCHED, ids=str)
def test_numpy_encoder_comes_close_to_c(row):
    x = X[:4, :512]
    for w in (None, IMATRIX[:512]):
        c, numpy = (squared_error(row, b, x, w).sum() for b in (quants.quantize(x, row, w, search=True), numpy_encode(row, x, w)))
        assert numpy <= 1.35 * c


@pytest.mark.parametrize("row", BLOCKED, ids=str)
def test_bytes_do_not_depend_on_threads(row):
    x = np.tile(X[:2, :256], (3, 5)) if row in SEARCHED else np.random.default_rng(0).normal(size=(2100, 1024)).astype(np.float32)
    before = quants._CHUNK
    quants._CHUNK = 2048 if row in SEARCHED else before
    try:
        assert (quants.quantize(x, row, threads=1) == quants.quantize(x, row, threads=3)).all()
    finally:
        quants._CHUNK = before


@every_isa
@pytest.mark.parametrize("row", [t for t in TYPES if t.name in FORMULA], ids=str)
@pytest.mark.parametrize("weights", [256, 512, 768, 5120])
def test_blocks_past_the_caches_are_the_same(row, isa, weights):  # noqa: F811
    x = np.random.default_rng(0).normal(size=(1, weights)).astype(np.float32)
    want = quants.quantize(x, row)
    for at in (0, 1, 16, 63):
        room = np.full((1, want.size + 64), 7, np.uint8)
        assert quants.quantize_rows(x, row, None, room[:, at : at + want.size], search=False, threads=1, stream=True)
        assert (room[:, at : at + want.size] == want).all()
        assert (room[:, :at] == 7).all() and (room[:, at + want.size :] == 7).all()


@pytest.mark.parametrize("row", BLOCKED, ids=str)
def test_hostile_but_finite_rows_stay_finite(row):
    rows = np.zeros((6, 256), np.float32)
    rows[1] = 1e-40                                            # denormals
    rows[2, ::3] = 60000
    rows[3, 7] = -1e-3                                         # a single weight
    rows[4] = np.where(np.arange(256) % 2, 3e4, -3e4)
    rows[5] = np.linspace(-1e-7, 1e-7, 256)
    no_column_matters = np.zeros(256, np.float32)
    for w in (None, no_column_matters):
        y = quants.dequantize(quants.quantize(rows, row, w), row)
        assert np.isfinite(y).all()
        assert not y[0].any()
        assert np.abs(y).max() < 2e5


def test_no_memory_for_a_codebook_is_a_sentence():
    """In a process of its own: no more memory than it has once numpy and the kernels are there."""
    script = """if True:
        import resource, numpy as np
        from pyggml import quants
        x = np.ones((1, 256), np.float32)
        quants.quantize(x, "Q4_K", threads=1)
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        quants.quantize(x, "IQ1_S", threads=1)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "PyggmlError: no memory for the codebook of IQ1_S" in done.stderr
    assert done.returncode == 1


@settings(max_examples=40)
@given(x=hnp.arrays(np.float32, st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from([0, 256, 512])),
                    elements=st.floats(-1000, 1000, width=32)),
       row=st.sampled_from([t for t in BLOCKED if t.name in FORMULA and t.name[:2] in {"Q4", "Q5", "Q8"}]))
def test_round_trip_keeps_shape_and_nearness(x, row):
    """Each weight comes back within one step of its block's range over the number of codes."""
    y = quants.dequantize(quants.quantize(x, row), row)
    assert y.shape == x.shape
    levels = {"Q4": 15, "Q5": 31, "Q8": 254}[row.name[:2]]
    blocks, back = x.reshape(-1, row.block), y.reshape(-1, row.block)
    reach = 2 * np.abs(blocks).max(axis=1, initial=0)
    step = reach / levels + 0.002 * reach + 1e-4               # half-float scales add their own rounding
    assert (np.abs(blocks - back) <= 1.01 * step[:, None]).all()


@pytest.mark.parametrize("row", [t for t in TYPES if t.name in {"F32", "F64", "I8", "I16", "I32", "I64"}], ids=str)
@given(values=st.lists(st.integers(-100, 100), min_size=1, max_size=50))
def test_plain_numbers_round_trip(row, values):
    x = np.array([values], np.float32)
    assert (quants.dequantize(quants.quantize(x, row), row) == x).all()


@every_isa
@pytest.mark.parametrize("row", [tensor_type(name) for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K")], ids=str)
def test_a_block_does_not_depend_on_the_blocks_beside_it(row, isa):  # noqa: F811
    """Blocks that hold nearly exact values, whose neighbouring scales are tried too, among blocks that do not."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((37, row.block)).astype(np.float32)
    x[::5] = np.rint(4 * x[::5]).clip(-7, 7)
    together = quants.quantize(x.reshape(1, -1), row, search=True).reshape(len(x), -1)
    alone = [quants.quantize(block, row, search=True) for block in x]
    assert (together == alone).all()
