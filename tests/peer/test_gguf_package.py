"""pyggml and the gguf package read each other's files and decode and encode blocks to the same bits."""

import numpy as np
import pytest
import random_model

from pyggml import formats
from pyggml.formats import Typed, new_tensor
from pyggml.quants import dequantize, quantize
from pyggml.types import BY_NAME, TYPES, TensorType

gguf = pytest.importorskip("gguf")

# Every kind of metadata value, with gguf's name for the type.
SCALARS = {"u8": ("UINT8", 200), "i8": ("INT8", -100), "u16": ("UINT16", 60000), "i16": ("INT16", -30000), "u32": ("UINT32", 4_000_000_000),
           "i32": ("INT32", -2_000_000_000), "u64": ("UINT64", 2**63 + 5), "i64": ("INT64", -(2**62)), "f32": ("FLOAT32", 0.15625),
           "f64": ("FLOAT64", 1 / 3), "bool": ("BOOL", True), "str": ("STRING", "naïve 語 \n")}
LISTS = {"i32": [-1, 0, 2**31 - 1], "f32": [0.5, -1e30], "u8": [0, 255], "bool": [True, False, True], "str": ["", "▁a", "b" * 300]}
BYTE_ORDERS = {"<": "LITTLE", ">": "BIG"}


def random_blocks(row: TensorType, n_rows: int, n_columns: int, seed: int = 0) -> np.ndarray:
    """Blocks of random bytes whose half-precision scales are ordinary numbers: uint8 (n_rows, row_bytes)."""
    rng = np.random.default_rng([seed, row.id])
    blocks = np.frombuffer(bytearray(rng.bytes(n_rows * row.row_bytes(n_columns))), row.layout)
    for field in row.layout.names or ():
        if row.layout[field].kind == "f":
            blocks[field] = rng.normal(0, 0.1, blocks[field].shape)
    if row.name == "IQ1_M":         # the scale's top bits lie in the top nibble of the last byte of `scales`
        blocks["scales"][:, 7] = blocks["scales"][:, 7] & 0x0F | 0x20
    if not row.quantized and row.layout.kind == "f":
        blocks = rng.normal(0, 1, n_rows * n_columns).astype(row.layout)
    return blocks.view(np.uint8).reshape(n_rows, -1)


def decoded_by_gguf(row: TensorType) -> bool:
    """gguf.dequantize knows the type."""
    try:
        with np.errstate(over="ignore"):
            gguf.dequantize(random_blocks(row, 1, row.block), gguf.GGMLQuantizationType[row.name])
    except NotImplementedError:
        return False
    return True


def encoded_by_gguf(row: TensorType) -> bool:
    try:
        gguf.quantize(np.zeros((1, row.block), np.float32), gguf.GGMLQuantizationType[row.name])
    except NotImplementedError:
        return False
    return True


# Types that tensors in files have. Left out are those of activations only (gguf still gives Q8_1 an older layout).
STORED = [row for row in TYPES if hasattr(gguf.GGMLQuantizationType, row.name) and (row.activation or not row.quantized)]
FLOATS = [row for row in STORED if row.activation]
DECODED = [row.name for row in FLOATS if decoded_by_gguf(row)]
ENCODED = [row.name for row in FLOATS if encoded_by_gguf(row)]


def test_the_types_compared_are_those_people_use():
    assert {"F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
            "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ1_M", "TQ2_0", "MXFP4"} <= set(DECODED)
    assert {"BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"} <= set(ENCODED)


@pytest.mark.parametrize("row", STORED, ids=str)
def test_block_sizes_are_equal(row):
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[row.name]] == (row.block, row.bytes)
    assert gguf.GGMLQuantizationType[row.name].value == row.id


@pytest.mark.parametrize("name", DECODED)
def test_dequantize_is_bit_equal(name):
    blocks = random_blocks(BY_NAME[name], 16, 4 * 256)
    with np.errstate(over="ignore"):            # the largest MXFP4 scales are beyond float32
        theirs = gguf.dequantize(blocks, gguf.GGMLQuantizationType[name])
    ours = dequantize(blocks, name)
    assert ours.shape == theirs.shape and np.array_equal(ours.view(np.uint32), theirs.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("name", ENCODED)
def test_quantize_is_byte_equal(name):
    weights = np.random.default_rng(1).normal(0, 1, (16, 4 * 256)).astype(np.float32)
    weights[3], weights[4, :256], weights[5] = 0, 1e-6, weights[5].clip(0)
    theirs = gguf.quantize(weights, gguf.GGMLQuantizationType[name])
    assert np.array_equal(quantize(weights, name).view(np.uint8), theirs.view(np.uint8).reshape(16, -1))


@pytest.mark.parametrize("order", BYTE_ORDERS)
def test_gguf_reads_our_metadata(tmp_path, order):
    values = {f"one.{type}": Typed(type, value) for type, (_, value) in SCALARS.items()}
    values |= {f"many.{type}": Typed(f"{type}[]", value) for type, value in LISTS.items()}
    formats.write(tmp_path / "m.gguf", {"general.architecture": Typed("str", "llama"), **values}, order=order)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    for type, (name, value) in SCALARS.items():
        field = fields[f"one.{type}"]
        assert field.types == [gguf.GGUFValueType[name]] and field.contents() == value
    for type, value in LISTS.items():
        field = fields[f"many.{type}"]
        assert field.types[1] == gguf.GGUFValueType[SCALARS[type][0]] and field.contents() == pytest.approx(value)


@pytest.mark.parametrize("order", BYTE_ORDERS)
def test_we_read_metadata_of_gguf(tmp_path, order):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian[BYTE_ORDERS[order]])
    for type, (name, value) in SCALARS.items():
        writer.add_key_value(f"one.{type}", value, gguf.GGUFValueType[name])
    for type, value in LISTS.items():
        writer.add_key_value(f"many.{type}", value, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[SCALARS[type][0]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    kv = formats.open(tmp_path / "m.gguf").kv
    assert kv["general.architecture"] == "llama"
    assert {type: (kv.type(f"one.{type}"), kv[f"one.{type}"]) for type in SCALARS} == {t: (t, value) for t, (_, value) in SCALARS.items()}
    for type, value in LISTS.items():
        assert kv.type(f"many.{type}") == f"{type}[]" and list(kv[f"many.{type}"]) == pytest.approx(value)


def test_gguf_reads_our_tensors(tmp_path):
    blocks = {row.name: random_blocks(row, 6, 512) for row in STORED}
    tensors = [new_tensor(f"t.{name}", data, name, (3, 2, 512)) for name, data in blocks.items()]
    formats.write(tmp_path / "m.gguf", {"general.architecture": Typed("str", "llama")}, tensors)
    theirs = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert list(theirs) == [f"t.{name}" for name in blocks]
    for name, data in blocks.items():
        tensor = theirs[f"t.{name}"]
        assert tensor.tensor_type.name == name and tensor.shape.tolist() == [512, 2, 3]
        assert tensor.data.tobytes() == data.tobytes()


def test_we_read_tensors_of_gguf(tmp_path):
    blocks = {row.name: random_blocks(row, 6, 512) for row in STORED}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, data in blocks.items():
        writer.add_tensor(f"t.{name}", data.reshape(3, 2, -1), raw_dtype=gguf.GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = formats.open(tmp_path / "m.gguf").tensors
    assert list(ours) == [f"t.{name}" for name in blocks]
    for name, data in blocks.items():
        tensor = ours[f"t.{name}"]
        assert (tensor.type.name, tensor.shape) == (name, (3, 2, 512)) and np.array_equal(tensor.raw, data)


def test_gguf_reads_a_random_model(tmp_path):
    random_model.write_random_model(tmp_path / "m.gguf", "tiny", "Q4_K_M")
    reader, shape = gguf.GGUFReader(tmp_path / "m.gguf"), random_model.SHAPES["tiny"]
    assert reader.fields["llama.block_count"].contents() == shape.layers
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == len(set(tokens)) == shape.vocab
    by_name = {t.name: t for t in reader.tensors}
    assert len(by_name) == 3 + 9 * shape.layers and by_name["output.weight"].tensor_type.name == "Q6_K"
    gate = by_name["blk.0.ffn_gate.weight"]
    weights = gguf.dequantize(gate.data, gate.tensor_type)
    assert weights.shape == (shape.ff, shape.dim)
    assert weights.std() == pytest.approx(shape.dim**-0.5, rel=0.1) and abs(weights.mean()) < 0.003
