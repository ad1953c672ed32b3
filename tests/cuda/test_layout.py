"""Every block type's re-laid form decodes to pyggml.quants' floats, and the GPU's kernels make it as numpy does."""

import os

import numpy as np
import pytest
from device_case import run, same_bits, view

from pyggml import quants
from pyggml.backends.cuda import layout, upload
from pyggml.backends.cuda.base import DeviceView
from pyggml.types import TYPES, tensor_type

QUANTIZED = [t.name for t in TYPES if t.quantized]
ALIKE = {"Q8_1", "Q5_1", "Q5_K", "TQ2_0"} if "PYGGML_PTX" in os.environ else set()      # codes and scales like other types', which are compiled
every_type = pytest.mark.parametrize("name", [name for name in QUANTIZED if name not in ALIKE])


def some_blocks(name: str, rows: int, k: int, seed: int = 0) -> np.ndarray:
    """Random bytes, the first block all ones, the second all zeros: uint8 (rows, bytes)."""
    t = tensor_type(name)
    blocks = np.random.default_rng(seed).integers(0, 256, (rows * k // t.block, t.bytes), np.uint8)
    blocks[0], blocks[1] = 255, 0
    return blocks.reshape(rows, -1)


def test_every_block_type_has_a_layout():
    assert set(QUANTIZED) == set(layout.LAYOUTS)


@every_type
def test_rows_of_a_relaid_weight_are_the_floats_of_the_format(name):
    rows, k = 5, 256
    blocks = some_blocks(name, rows, k)
    with np.errstate(all="ignore"):
        memory = layout.relay_numpy(name, (rows, k), blocks)
        table = DeviceView(memory, name, (rows, k), weight=layout.RelaidWeight(name, (rows, k), memory))
        ids, out = np.array([4, 0, 1, 2], np.int32), np.full((4, k), 7, np.float32)
        run("get_rows", view(out, 0), [table, view(ids)], f=[1.0], tokens=3)
        want = quants.dequantize(blocks, name)[ids]
    assert same_bits(out[:3], want[:3])
    assert (out[3] == 7).all()                          # the fourth token is not of this run


@every_type
def test_the_kernel_that_relays_moves_the_same_bits_as_numpy(name):
    rows, k = 3, 256
    blocks = some_blocks(name, rows, k, seed=1)
    out = np.zeros(layout.relaid_bytes(name, (rows, k)), np.uint8)
    staging = np.zeros(blocks.size, np.uint8)
    for start, stop in ((0, 2), (2, 3)):                # in two pieces, through one staging area
        part = blocks[start:stop].reshape(-1)
        staging[:part.size] = part
        made = upload.relay(name, (rows, k), staging, out, 0, rows=(start, stop))
    assert (out == layout.relay_numpy(name, (rows, k), blocks)).all()
    assert made.shape == (rows, k) and made.type == name


@pytest.mark.parametrize("name", list(layout.FLOATS))
@pytest.mark.parametrize("k", [16, 12])
def test_rows_of_floats_are_padded(name, k):
    x = np.random.default_rng(2).standard_normal((3, k)).astype(np.float32)
    raw = quants.quantize(x, name)
    out = np.full(layout.relaid_bytes(name, x.shape), 99, np.uint8)
    upload.relay(name, x.shape, raw.reshape(-1), out, 0)
    assert (out == layout.relay_numpy(name, x.shape, raw)).all()
    table = DeviceView(out, name, x.shape, weight=layout.RelaidWeight(name, x.shape, out.view(layout.FLOATS[name])))
    got = np.zeros((2, k), np.float32)
    run("get_rows", view(got), [table, view(np.array([2, 1], np.int32))], f=[2.0])
    assert same_bits(got, quants.dequantize(raw, name)[[2, 1]] * 2)


def test_what_a_layout_costs_is_no_more_than_it_says():
    grown = {name: round(layout.relaid_bytes(name, (4096, 4096)) / (4096 * tensor_type(name).row_bytes(4096)), 3) for name in QUANTIZED}
    dearer = {name: factor for name, factor in grown.items() if factor > 1}
    assert dearer == {"Q3_K": 1.036, "IQ4_XS": 1.015, "TQ1_0": 1.222, "IQ3_S": 1.036, "IQ1_M": 1.036}


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_cells_of_a_cache_come_back_as_ggml_rows(name):
    shape = (2, 5, 64)
    rows = quants.quantize(np.random.default_rng(3).standard_normal((2, 3, 64)).astype(np.float32), name)
    memory = np.zeros(2 * 5 * tensor_type(name).row_bytes(64), np.uint8)
    layout.put_cache_rows(name, shape, memory, rows)
    assert (layout.cache_rows(name, shape, memory, 3) == rows).all()
