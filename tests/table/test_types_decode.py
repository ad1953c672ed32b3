"""Decoders: C equals numpy equals ggml, bit for bit, for every type on every instruction set."""

import numpy as np
import pytest
from type_cases import BLOCKED, GOLDEN, as_bytes, assert_same_floats, every_isa, every_type, golden, isa, numpy_decode, random_blocks  # noqa: F401

from pyggml import quants
from pyggml.native import ffi, lib
from pyggml.types import BY_ID, TYPES


def test_sizes_are_ggmls():
    """index.txt lists ggml's own block lengths and sizes."""
    for line in (GOLDEN / "index.txt").read_text().splitlines():
        facts = dict(word.split("=") for word in line.split() if "=" in word)
        if "tsize" in facts:
            row = BY_ID[int(facts["type"])]
            assert (row.block, row.bytes) == (int(facts["blck"]), int(facts["tsize"])), row
            assert row.name.lower() == line.split()[0].lower()


@every_type
def test_c_knows_the_same_sizes(row):
    """A decoder given n weights writes n floats, and an encoder writes exactly the row's bytes."""
    n = 2 * row.block
    floats, blocks = np.full(n + 1, 7, np.float32), np.zeros(2 * row.bytes, np.uint8)
    assert lib.pyg_dequantize(row.id, n, ffi.cast("void *", blocks.ctypes.data), ffi.cast("float *", floats.ctypes.data), 0) == 0
    assert not floats[:n].any() or row.name == "Q1_0"
    assert floats[n] == 7
    written = [np.full(2 * row.bytes + 8, canary, np.uint8) for canary in (0, 255)]
    x = np.linspace(-1, 1, n, dtype=np.float32)
    source = ffi.cast("float *", x.ctypes.data)
    statuses = [lib.pyg_quantize(row.id, 1, n, source, ffi.cast("void *", w.ctypes.data), ffi.NULL, 0, 0, 0) for w in written]
    if statuses == [1, 1]:
        assert not row.quantized
        return
    assert (written[0][:-8] == written[1][:-8]).all(), "a byte of the row was not written"
    assert not written[0][-8:].any() and (written[1][-8:] == 255).all()


@every_isa
@every_type
@pytest.mark.parametrize("n", [0, 1, 3, 50])
def test_c_decodes_as_numpy_from_any_address(row, isa, n):  # noqa: F811
    blocks = random_blocks(row, n)
    want = numpy_decode(row, blocks)
    for offset in (0, 1, 3):
        buffer = np.empty(blocks.size + offset, np.uint8)
        moved = buffer[offset:].reshape(blocks.shape)
        moved[:] = blocks
        assert_same_floats(quants.dequantize(moved, row), want)


@every_isa
@pytest.mark.parametrize("row", [t for t in TYPES if golden(t.name)], ids=str)
def test_decodes_as_ggml(row, isa):  # noqa: F811
    vectors = golden(row.name)
    for kind in ("plain", "imat", "cpu_from_float"):
        if f"{kind}_deq" in vectors:
            blocks = as_bytes(vectors[f"{kind}_bytes"])
            assert_same_floats(quants.dequantize(blocks, row), vectors[f"{kind}_deq"])
            assert_same_floats(numpy_decode(row, blocks), vectors[f"{kind}_deq"])


@every_isa
@pytest.mark.parametrize("row", [t for t in TYPES if f"{t.name}_blocks" in golden("more")], ids=str)
def test_decodes_random_bytes_as_ggml(row, isa):  # noqa: F811
    blocks, floats = golden("more")[f"{row.name}_blocks"], golden("more")[f"{row.name}_floats"]
    assert_same_floats(quants.dequantize(blocks, row), floats)
    assert_same_floats(numpy_decode(row, blocks), floats)


def test_every_blocked_type_has_golden_vectors():
    activations = {"Q8_1", "Q8_K"}
    assert all(golden(t.name) or f"{t.name}_blocks" in golden("more") for t in BLOCKED if t.name not in activations)


@every_type
def test_weights_do_not_depend_on_threads(row, monkeypatch):
    blocks = random_blocks(row, 12 * max(1, 256 // row.block)).reshape(12, -1)
    want = quants.dequantize(blocks, row, threads=1)
    monkeypatch.setattr(quants, "_CHUNK", 512)
    monkeypatch.setattr(quants, "_QUICK", 0)
    assert_same_floats(quants.dequantize(blocks, row, threads=3), want)


@every_isa
@every_type
@pytest.mark.parametrize("weights", [1, 512, 513, 5000])
def test_floats_past_the_caches_are_the_same(row, isa, weights):  # noqa: F811
    blocks = random_blocks(row, -(-weights // row.block))
    want = quants.dequantize(blocks, row).reshape(-1)
    for at in (0, 3, 16, 31):
        room = np.full(want.size + 64, 7, np.float32)
        target = ffi.from_buffer("float[]", room[at:])
        assert lib.pyg_dequantize(row.id, want.size, ffi.from_buffer(blocks), target, 1) == 0
        assert_same_floats(room[at : at + want.size], want)
        assert (room[:at] == 7).all() and (room[at + want.size :] == 7).all()
