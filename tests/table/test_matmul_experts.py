"""Expert matmuls against a loop over tokens and slots, and the lazy packing of a memory-mapped weight."""

import mmap

import numpy as np
import pytest
from kernel_case import ISAS, instruction_set, nmse, pool
from matmul_support import EPS, SMALL_COLS, Matmul, Weight, activation, rms_norm, rounded

from pyggml.backends.cpu import Program

LAYOUTS = [("Q4_0", "packed"), ("Q4_K", "packed"), ("F16", "packed"), ("Q8_0", "raw"), ("IQ2_XS", "raw"), ("Q6_K", "exact")]


def choose(tokens: int, slots: int, experts: int, rng: np.random.Generator) -> np.ndarray:
    """(T, U) different experts for each token; expert 1 is everybody's favourite, so that one batch is long."""
    ids = np.array([rng.choice(np.arange(2, experts), slots, replace=False) for _ in range(tokens)], np.int32)
    ids[:, 0] = 1
    return ids


def expected(x: np.ndarray, weight: Weight, ids: np.ndarray) -> np.ndarray:
    """x (T, U, K) -> (T, U, M). Activations are rounded per expert's batch, whose size decides how ggml's rows keep their scale."""
    out = np.empty((*ids.shape, weight.shape[1]))
    for e in np.unique(ids):
        out[ids == e] = rounded(x[ids == e], weight.format) @ weight.seen(int((ids == e).sum()))[e].T
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name, layout", LAYOUTS)
@pytest.mark.parametrize("tokens, slots, biased", [(1, 1, False), (1, 3, True), (6, 2, False), (90, 2, True)])
def test_mul_mat_id(isa, name, layout, tokens, slots, biased):
    rng = np.random.default_rng(tokens)
    weight = Weight(name, (7, 33, 256), layout, rng)
    ids = choose(tokens, slots, 7, rng)
    x, bias = rng.standard_normal((tokens, slots, 256), np.float32), 9 * biased * rng.standard_normal((7, 33)).astype(np.float32)
    out = np.full((tokens, slots, 33), np.nan, np.float32)
    with instruction_set(isa):
        program = Program()
        sources = [weight.view(program), program.view(x), -1, program.view(ids), program.view(bias) if biased else -1]
        program.step("mul_mat_id", program.view(out), sources, [-1, weight.format], [EPS])
        program.finish()
        for _ in range(2):
            program.run(pool(3))
            assert nmse(out, expected(x, weight, ids) + bias[ids]) < 1e-10


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name, layout", LAYOUTS)
def test_no_tokens(isa, name, layout):
    """The last layer of a batch without any logits."""
    rng = np.random.default_rng(0)
    weight = Weight(name, (7, 33, 256), layout, rng)
    x, ids, out = np.zeros((4, 2, 256), np.float32), np.zeros((4, 2), np.int32), np.full((4, 2, 33), np.nan, np.float32)
    with instruction_set(isa):
        program = Program()
        sources = [weight.view(program), program.view(x, slot=0), -1, program.view(ids, slot=0), -1]
        program.step("mul_mat_id", program.view(out, slot=0), sources, [-1, weight.format], [EPS])
        program.finish().run(pool(2))           # slot 0 is 0
    assert np.isnan(out).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name, layout", LAYOUTS)
@pytest.mark.parametrize("tokens, slots", [(1, 2), (70, 3)])
def test_glu_mat_id_shares_a_tokens_column(isa, name, layout, tokens, slots):
    rng = np.random.default_rng(tokens)
    gate, up = (Weight(name, (6, 48, 256), layout, rng) for _ in range(2))
    ids = choose(tokens, slots, 6, rng)
    x, norm = rng.standard_normal((tokens, 256), np.float32), rng.uniform(0.5, 2, 256).astype(np.float32)
    bias = rng.standard_normal((2, 6, 48)).astype(np.float32)
    out = np.full((tokens, slots, 48), np.nan, np.float32)
    with instruction_set(isa):
        program = Program()
        sources = [gate.view(program), program.view(x), program.view(norm), program.view(ids), up.view(program), *map(program.view, bias)]
        program.step("glu_mat_id", program.view(out), sources, [-1, gate.format, 0, 0], [EPS])
        program.finish().run(pool(2))
        each = np.repeat(rms_norm(x, norm, EPS)[:, None], slots, 1)
        # a byte of the normalized activations may fall to the other side
        assert nmse(out, activation(0, expected(each, gate, ids) + bias[0][ids]) * (expected(each, up, ids) + bias[1][ids])) < 2e-5


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("columns", [1, 40])
def test_packing_releases_the_files_pages(tmp_path, threads, columns):
    """A mapped weight is packed once; its pages go back, the mapping and the result stay."""
    rng = np.random.default_rng(0)
    weight = Weight("Q8_0", (2048, 512), "packed", rng)
    path = tmp_path / "weight"
    path.write_bytes(weight.raw.tobytes())
    with open(path, "rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8).reshape(weight.raw.shape)
    weight.raw = mapped
    x = rng.standard_normal((columns, 512), np.float32)
    matmul = Matmul(x, weight, prepare=columns > SMALL_COLS, release=True)
    want = rounded(x, weight.format) @ weight.seen(columns).T
    assert nmse(matmul(pool(threads)), want) < 1e-10
    assert resident(mapped) < 0.2 * mapped.nbytes
    assert weight.ready.all()
    assert nmse(matmul(pool(threads)), want) < 1e-10
    assert resident(mapped) < 0.2 * mapped.nbytes
    assert (mapped.reshape(-1)[:100] == np.frombuffer(path.read_bytes()[:100], np.uint8)).all()


def resident(array: np.ndarray) -> int:
    """Bytes of the mapping at `array` that are in this process's memory."""
    start, inside = array.ctypes.data, False
    with open("/proc/self/smaps") as maps:
        for line in maps:
            fields = line.split()
            if "-" in fields[0] and not fields[0].endswith(":"):
                low, high = (int(v, 16) for v in fields[0].split("-"))
                inside = low <= start < high
            elif inside and fields[0] == "Rss:":
                return int(fields[1]) * 1024
    raise AssertionError("the mapping is gone")
