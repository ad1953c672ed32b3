"""A split model opens as one from any part, and a part that is missing or does not belong is named."""

import shutil

import numpy as np
import pytest

from pyggml import formats
from pyggml.errors import GGUFError
from pyggml.formats import Typed, shards


@pytest.fixture
def parts(tmp_path):
    paths = [tmp_path / shards.part_path("m", i + 1, 3) for i in range(3)]
    for i, path in enumerate(paths):
        kv = {"split.no": Typed("u16", i), "split.count": Typed("u16", 3), "split.tensors.count": Typed("i32", 3)}
        formats.write(path, ({"general.name": "m"} if i == 0 else {}) | kv, {f"t{i}": np.full(4, i, np.float32)})
    return paths


@pytest.mark.parametrize("which", range(3))
def test_any_part_opens_the_whole(parts, which):
    file = formats.open(parts[which])
    assert dict(file.kv) == {"general.name": "m"} and list(file.tensors) == ["t0", "t1", "t2"]
    assert [t.numpy()[0] for t in file.tensors.values()] == [0, 1, 2]
    assert file.path == str(parts[0])


def test_one_part_alone(parts):
    assert list(formats.open(parts[1], split=False).tensors) == ["t1"]


def test_missing_part_is_named(parts):
    parts[2].unlink()
    with pytest.raises(GGUFError, match="has 3 parts, missing: .*m-00003-of-00003.gguf"):
        formats.open(parts[0])


def test_swapped_parts_are_refused(parts):
    shutil.copy(parts[2], parts[1])
    with pytest.raises(GGUFError, match='"split.no" is 2, by the file name it should be 1'):
        formats.open(parts[0])


@pytest.mark.parametrize("key, value, says", [
    ("split.no", [1, 1], r'"split.no" is \[1, 1\], by the file name it should be 1'),
    ("split.no", True, '"split.no" is true, by the file name it should be 1'),
    ("split.no", "1\x1b", r'"split.no" is 1\\x1b, by the file name it should be 1'),
    ("split.count", [3, 3], r'"split.count" is \[3, 3\], by the file name it should be 3'),
    ("split.count", None, r'"split.count" is missing, by the file name it should be 3'),
])
def test_keys_of_a_part_that_are_no_numbers(parts, key, value, says):
    kv = {k: v for k, v in ({"split.no": Typed("u16", 1), "split.count": Typed("u16", 3)} | {key: value}).items() if v is not None}
    formats.write(parts[1], kv, {"t1": np.full(4, 1, np.float32)})
    with pytest.raises(GGUFError, match=says):
        formats.open(parts[0])


def test_a_count_of_tensors_that_is_no_number(parts):
    kv = {"split.no": Typed("u16", 0), "split.count": Typed("u16", 3), "split.tensors.count": [3, 3]}
    formats.write(parts[0], kv, {"t0": np.zeros(4, np.float32)})
    with pytest.raises(GGUFError, match=r'"split.tensors.count" is \[3, 3\], the parts hold 3 tensors'):
        formats.open(parts[0])


def test_renamed_part_says_how_to_name_it(parts):
    other = parts[0].with_name("other.gguf")
    parts[0].rename(other)
    with pytest.raises(GGUFError, match="one of 3 parts; name them NAME-00001-of-00003.gguf"):
        formats.open(other)


def test_info_shows_a_part_whose_siblings_are_missing(tmp_path, capsys):
    from pyggml import cli
    path = tmp_path / "m-00002-of-00003.gguf"
    formats.write(path, {"split.no": formats.Typed("u16", 1), "split.count": formats.Typed("u16", 3)}, {"w": np.zeros(8, np.float32)})
    assert cli.main(["info", "--tensors", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "this part alone is shown" in shown and "missing: " in shown and "m-00001-of-00003.gguf" in shown and "w       F32" in shown
    assert cli.main(["check", str(path)]) == 1
