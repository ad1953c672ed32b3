"""What is written is what is read: arbitrary metadata and tensors, both byte orders, and the gguf package as a witness."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml import formats
from pyggml.errors import PyggmlError
from pyggml.formats import Typed, new_tensor, values
from pyggml.formats.writer import NewTensor
from pyggml.types import TYPES

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
NAME = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=16)


def scalars(t: values.ValueType) -> st.SearchStrategy:
    if t.code == "?":
        return st.booleans()
    if t.code in ("f", "d"):
        return st.floats(width=32 if t.code == "f" else 64, allow_nan=False)
    if not t.code:
        return TEXT
    limits = np.iinfo(t.dtype("<"))
    return st.integers(int(limits.min), int(limits.max))


PLAIN = [t for t in values.VALUE_TYPES if t is not values.ARRAY]
SCALAR = st.one_of(*(st.builds(Typed, st.just(t.name), scalars(t)) for t in PLAIN))
FLAT = st.one_of(*(st.builds(Typed, st.just(t.name + "[]"), st.lists(scalars(t), max_size=5)) for t in PLAIN))
ARRAYS = st.recursive(FLAT, lambda inner: st.builds(Typed, st.just("arr[]"), st.lists(inner, max_size=3)), max_leaves=6)
METADATA = st.dictionaries(NAME.filter(lambda key: key != "general.alignment"), SCALAR | ARRAYS, max_size=6)


@st.composite
def tensors(draw) -> list[NewTensor]:
    result = []
    for name in draw(st.lists(NAME.filter(lambda n: len(n.encode()) <= 64), max_size=4, unique=True)):
        row = draw(st.sampled_from(TYPES))
        shape = (*draw(st.lists(st.integers(0, 3), max_size=3)), row.block * draw(st.integers(0, 3)))
        data = np.frombuffer(draw(st.binary(min_size=0, max_size=8)) + b"\1", np.uint8)
        result.append(new_tensor(name, np.resize(data, math.prod(shape) // row.block * row.bytes), row, shape))
    return result


def plain(value):
    if isinstance(value, Typed):
        return plain(value.value)
    if isinstance(value, list | np.ndarray | values.StringArray):
        return [plain(v) for v in (value.tolist() if not isinstance(value, list) else value)]
    return value


@settings(max_examples=150)
@given(METADATA, tensors(), st.sampled_from("<>"), st.sampled_from([None, 8, 16, 64, 4096]))
def test_round_trip(tmp_path_factory, kv, written, order, alignment):
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    if alignment:
        kv = {**kv, "general.alignment": alignment}
    formats.write(path, kv, written, order=order)
    file = formats.open(path)
    assert list(file.kv) == list(kv) and list(file.tensors) == [t.name for t in written]
    for key, value in kv.items():
        assert file.kv.type(key) == values.typed(value).type
        assert plain(file.kv[key]) == plain(value)
    for t in written:
        got = file.tensors[t.name]
        assert (got.type, got.shape, got.offset % file.alignment) == (t.type, t.shape, 0)
        np.testing.assert_array_equal(got.raw.reshape(-1), t.data.reshape(-1))
    again, back = path.with_name("b.gguf"), path.with_name("c.gguf")
    formats.write(again, file.kv, file.tensors, order=">" if order == "<" else "<")
    formats.write(back, formats.open(again).kv, formats.open(again).tensors, order=order)
    assert back.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("use_mmap", [True, False])
def test_arrays_and_types(tmp_path, use_mmap):
    path = tmp_path / "a.gguf"
    weights = np.arange(12, dtype=np.float32).reshape(3, 4)
    formats.write(path, {"n": 3, "minus": -1, "big": 2 ** 40, "x": 0.5, "yes": True, "s": "t", "l": [1, 2], "f": [1, 2.5], "e": [],
                         "nested": [[1], ["a"]], "np": np.arange(3, dtype=np.uint16)},
                  {"w": weights, "h": weights.astype(np.float16), "i": np.arange(5, dtype=np.int64)})
    file = formats.open(path, use_mmap=use_mmap)
    kinds = {"n": "u32", "minus": "i32", "big": "i64", "x": "f32", "yes": "bool", "s": "str", "l": "i32[]", "f": "f32[]", "e": "str[]",
             "nested": "arr[]", "np": "u16[]"}
    assert {key: file.kv.type(key) for key in file.kv} == kinds
    np.testing.assert_array_equal(file["w"].numpy(), weights)
    assert file["h"].numpy().dtype == np.float16 and file["i"].numpy().tolist() == [0, 1, 2, 3, 4]
    assert file["w"].raw.shape == (3, 16) and file["w"].raw is not None
    assert not file["w"].raw.flags.writeable or not use_mmap
    held = file["w"].raw
    assert held.ctypes.data == file["w"].raw.ctypes.data          # mapped or not, holders share one copy


def test_mapped_tensors_are_views(tmp_path):
    path = tmp_path / "a.gguf"
    formats.write(path, {}, {"w": np.zeros((64, 64), np.float32)})
    file = formats.open(path)
    start = np.frombuffer(file.map, np.uint8).ctypes.data
    assert file["w"].raw.ctypes.data == start + file["w"].offset


def test_the_gguf_package_reads_it_and_writes_what_is_read(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "a.gguf"
    weights = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    formats.write(path, {"general.architecture": "llama", "a": [1, 2, 3], "t": ["x", "y"], "b": True}, {"w": weights, "v": weights[0]})
    reader = gguf.GGUFReader(path)
    assert [t.name for t in reader.tensors] == ["w", "v"]
    np.testing.assert_array_equal(reader.tensors[0].data, weights)
    assert reader.fields["t"].contents() == ["x", "y"] and reader.fields["a"].contents() == [1, 2, 3]

    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.add_array("words", ["a", "b\u00e9"])
    writer.add_float32("f", 1.5)
    writer.add_tensor("q", gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = formats.open(tmp_path / "b.gguf")
    assert file.kv["words"] == ["a", "b\u00e9"] and file.kv["f"] == 1.5
    assert file["q"].type.name == "Q8_0" and file["q"].shape == (4, 64)


def test_unknown_types_are_copied_in_their_byte_order(tmp_path):
    import struct
    for order, other in (("<", ">"), (">", "<")):
        path = tmp_path / "a.gguf"
        formats.write(path, {}, {"t": np.arange(8, dtype=np.float32)}, order=order)
        data = bytearray(path.read_bytes())
        at = data.index(struct.pack(order + "IQIQ", 1, 8, 0, 0)) + 12
        data[at:at + 4] = struct.pack(order + "I", 99)
        path.write_bytes(data)
        file = formats.open(path)
        assert file["t"].raw.tobytes() == np.arange(8, dtype=order + "f4").tobytes()
        formats.write(tmp_path / "b.gguf", file.kv, file.tensors, order=order)
        assert (tmp_path / "b.gguf").read_bytes() == bytes(data)
        with pytest.raises(PyggmlError, match='tensor "t": type 99 is unknown to .*, so its byte order cannot be changed'):
            formats.write(tmp_path / "c.gguf", file.kv, file.tensors, order=other)


@pytest.mark.parametrize("kv, tensors, says", [
    ({"k": object()}, {}, 'key "k": a metadata value cannot be a object'),
    ({"k": Typed("u8", 256)}, {}, 'key "k": 256 does not fit type u8'),
    ({"k": Typed("u9", 1)}, {}, "'u9' is unknown"),
    ({"k": Typed("arr", [])}, {}, "element type"),
    ({"k": Typed("str", 5)}, {}, "is not text"),
    ({"k": Typed("u8[]", np.array([1, 300]))}, {}, "do not fit type u8"),
    ({"k": Typed("u8[]", np.array([1.5]))}, {}, "do not fit type u8"),
    ({"k": Typed("u8[]", np.array([True]))}, {}, "do not fit type u8"),
    ({"k": Typed("bool[]", np.array([0, 1]))}, {}, "do not fit type bool; it takes true or false"),
    ({"k": Typed("f32[]", np.array([1e39]))}, {}, "do not fit type f32"),
    ({"k": Typed("bool", 2)}, {}, "2 does not fit type bool"),
    ({"k": [1, "a"]}, {}, 'key "k": .*one kind of value'),
    ({"k": 2 ** 64}, {}, "at most 64 bits"),
    ({"": 1}, {}, "1 to 65535 bytes"),
    ({"k\udcff": 1}, {}, "UTF-8 text of"),
    ({"k": "\ud800"}, {}, 'key "k": .*half of a character'),
    ({"k": "x" * ((32 << 20) + 1)}, {}, "limit 33554432.*could not be read again"),
    ({}, {"t\udcff": np.zeros(1, np.float32)}, "not UTF-8.*could not be read again"),
    ({"general.alignment": 3}, {}, "power of two"),
    ({}, {"n" * 65: np.zeros(1, np.float32)}, "1 to 64 bytes"),
    ({}, {"t": np.zeros((1,) * 5, np.float32)}, "5 dimensions"),
    ({}, {"t": np.zeros(1, np.complex64)}, "has no tensor type"),
    ({}, [NewTensor("t", TYPES[0], (1,), np.zeros(4, np.uint8), 4)] * 2, "given twice"),
    ({}, [NewTensor("t", TYPES[0], (2,), np.zeros(4, np.uint8), 8)], "got 4 bytes"),
])
def test_refused(tmp_path, kv, tensors, says):
    with pytest.raises(PyggmlError, match=says):
        formats.write(tmp_path / "a.gguf", kv, tensors)
    assert not list(tmp_path.iterdir())


def test_new_tensor_checks_its_bytes():
    with pytest.raises(PyggmlError, match="take 18 bytes, the array has 17"):
        new_tensor("t", np.zeros(17, np.uint8), "Q4_0", (32,))
    with pytest.raises(PyggmlError, match="blocks of 32"):
        new_tensor("t", np.zeros(18, np.uint8), "Q4_0", (33,))
    assert new_tensor("t", np.zeros((2, 36), np.uint8), "Q4_0").shape == (2, 64)
