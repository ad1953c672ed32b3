"""Files written here are read by the gguf package with the same keys, types, values and tensor bytes; and the other way round."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml import formats
from pyggml.formats import Typed, new_tensor

gguf = pytest.importorskip("gguf")

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
NAME = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=12)
NUMBERS = {"u8": (0, 255), "i8": (-128, 127), "u16": (0, 2 ** 16 - 1), "i16": (-2 ** 15, 2 ** 15 - 1), "u32": (0, 2 ** 32 - 1),
           "i32": (-2 ** 31, 2 ** 31 - 1), "u64": (0, 2 ** 64 - 1), "i64": (-2 ** 63, 2 ** 63 - 1)}
ELEMENTS = {**{name: st.integers(*limits) for name, limits in NUMBERS.items()}, "bool": st.booleans(), "str": TEXT,
            "f32": st.floats(width=32, allow_nan=False), "f64": st.floats(allow_nan=False)}
SCALARS = st.one_of(*(st.builds(Typed, st.just(name), values) for name, values in ELEMENTS.items()))
ARRAYS = st.one_of(*(st.builds(Typed, st.just(name + "[]"), st.lists(values, min_size=1, max_size=4)) for name, values in ELEMENTS.items()))
METADATA = st.dictionaries(NAME, SCALARS | ARRAYS, max_size=6)
GGUF_NAMES = {"u8": "UINT8", "i8": "INT8", "u16": "UINT16", "i16": "INT16", "u32": "UINT32", "i32": "INT32", "f32": "FLOAT32", "bool": "BOOL",
              "str": "STRING", "u64": "UINT64", "i64": "INT64", "f64": "FLOAT64"}
TENSORS = st.dictionaries(NAME, st.tuples(st.sampled_from(["F32", "F16", "Q4_0", "Q6_K", "I16"]), st.integers(1, 3), st.integers(1, 2)), max_size=3)


def make(spec):
    """Tensors with arbitrary bytes from (type, rows, blocks in a row)."""
    from pyggml.types import BY_NAME
    rng = np.random.default_rng(0)
    return [new_tensor(name, rng.integers(0, 64, (rows, blocks * BY_NAME[kind].bytes), np.uint8), kind)
            for name, (kind, rows, blocks) in spec.items()]


@settings(max_examples=60)
@given(METADATA, TENSORS, st.sampled_from("<>"))
def test_the_package_reads_what_is_written(tmp_path_factory, kv, spec, order):
    path, tensors = tmp_path_factory.mktemp("peer") / "a.gguf", make(spec)
    if order == ">":
        tensors = [t for t in tensors if t.type.name in ("F32", "F16", "I16")]       # the package knows no big-endian blocks
    formats.write(path, kv, tensors, order=order)
    reader = gguf.GGUFReader(path)
    for key, value in kv.items():
        field = reader.fields[key]
        types = ["ARRAY", GGUF_NAMES[value.type[:-2]]] if value.type.endswith("[]") else [GGUF_NAMES[value.type]]
        assert [t.name for t in field.types] == types
        assert field.contents() == value.value
    assert [t.name for t in reader.tensors] == [t.name for t in tensors]
    for theirs, ours in zip(reader.tensors, tensors, strict=True):
        assert theirs.tensor_type.name == ours.type.name and list(theirs.shape) == list(ours.shape[::-1])
        raw = np.ascontiguousarray(theirs.data)
        if order == ">":
            raw = raw.byteswap()
        assert raw.tobytes() == np.ascontiguousarray(ours.data).tobytes()


@settings(max_examples=40)
@given(METADATA, TENSORS, st.sampled_from("<>"))
def test_what_the_package_writes_is_read(tmp_path_factory, kv, spec, order):
    path = tmp_path_factory.mktemp("peer") / "a.gguf"
    endian = gguf.GGUFEndian.LITTLE if order == "<" else gguf.GGUFEndian.BIG
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    for key, value in kv.items():
        if value.type.endswith("[]"):
            writer.add_key_value(key, value.value, gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType[GGUF_NAMES[value.type[:-2]]])
        else:
            writer.add_key_value(key, value.value, gguf.GGUFValueType[GGUF_NAMES[value.type]])
    tensors = [t for t in make(spec) if order == "<" or t.type.name == "F32"]
    for t in tensors:
        if t.type.name == "F32":
            writer.add_tensor(t.name, np.ascontiguousarray(t.data).view(np.float32).reshape(t.shape))
        else:
            writer.add_tensor(t.name, t.data, raw_dtype=gguf.GGMLQuantizationType[t.type.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = formats.open(path)
    for key, value in kv.items():
        assert file.kv.type(key) == value.type
        got = file.kv[key]
        assert (got.tolist() if hasattr(got, "tolist") else got) == value.value
    for t in tensors:
        assert file[t.name].type == t.type and file[t.name].raw.tobytes() == np.ascontiguousarray(t.data).tobytes()
