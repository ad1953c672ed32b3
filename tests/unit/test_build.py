"""The build of the native extension (native/build.py), without building."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def build():
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "native" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_instruction_sets_by_name(build, monkeypatch):
    monkeypatch.setenv("PYGGML_MACHINE", "x86_64")
    monkeypatch.setenv("PYGGML_ISAS", "avx512,avx2")
    assert list(build.isas()) == ["scalar", "avx2", "avx512"]
    monkeypatch.setenv("PYGGML_ISAS", "")
    assert list(build.isas()) == list(build.ISAS["x86_64"])


def test_unknown_instruction_set_is_refused(build, monkeypatch):
    monkeypatch.setenv("PYGGML_MACHINE", "x86_64")
    monkeypatch.setenv("PYGGML_ISAS", "avx512 avx2")
    with pytest.raises(SystemExit, match="PYGGML_ISAS names 'avx512 avx2', which x86_64 does not have; use some of scalar,avx2"):
        build.isas()
