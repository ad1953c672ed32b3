"""The fuzzer's finds stay fixed, and a short run of it finds nothing new. Its seed is printed; `tools/fuzz/reader.py --seed` repeats it."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "tools" / "fuzz"
_spec = importlib.util.spec_from_file_location("fuzz_reader", FOLDER / "reader.py")
reader = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reader)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("finds/*.bin")), ids=lambda p: p.stem)
def test_finds(path):
    reader.one_input(path.read_bytes())


def test_a_short_run(monkeypatch, tmp_path):
    monkeypatch.setattr(reader, "HERE", tmp_path)           # a find of this run is shown, not added to the repository
    (tmp_path / "finds").mkdir()
    assert reader.run(seconds=2, runs=1 << 30, seed=reader.random.SystemRandom().getrandbits(32)) == 0


def test_the_rule_is_enforced():
    with pytest.MonkeyPatch.context() as patch:
        from pyggml.errors import GGUFError
        from pyggml.formats import gguf

        def broken(*args):
            raise GGUFError("x: two\nlines")
        patch.setattr(gguf, "read", broken)
        with pytest.raises(AssertionError, match="not one line"):
            reader.one_input(b"GGUF")
