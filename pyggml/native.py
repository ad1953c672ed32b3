"""The native extension: loaded once, its instruction set chosen once.

`lib` is the C library and `ffi` its cffi interface. Without a compiled extension `lib` is None: block layouts still come
from the same header, and everything computes with numpy. `PYGGML_ISA` overrides the choice of instruction set.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from pyggml.errors import PyggmlError

_HERE = Path(__file__).parent
_HEADER_FOLDERS = (_HERE / "_headers", _HERE.parent / "native")     # installed; a checkout


def header(name: str) -> str:
    """The text of a shared C header, from the installed package or the checkout."""
    for folder in _HEADER_FOLDERS:
        if (folder / name).exists():
            return (folder / name).read_text()
    raise PyggmlError(f"the header {name} is missing from {_HERE}; reinstall pyggml")


def _layouts_only() -> Any:
    """A cffi interface that knows the block layouts but no functions."""
    import cffi

    ffi = cffi.FFI()
    ffi.cdef("\n".join(line for line in header("blocks.h").splitlines() if not line.startswith("#")), packed=True)
    return ffi


ffi: Any
lib: Any
try:
    if os.environ.get("PYGGML_NO_NATIVE"):
        raise ImportError("PYGGML_NO_NATIVE is set")
    from pyggml._native import ffi, lib  # type: ignore[no-redef]
    why_missing = ""
except ImportError as error:
    ffi, lib, why_missing = _layouts_only(), None, str(error)


def isa_names() -> dict[str, bool]:
    """Instruction sets in the extension, in rising order of preference, and whether this machine can run each."""
    if lib is None:
        return {}
    return {ffi.string(lib.pyg_isa_name(i)).decode(): bool(lib.pyg_isa_supported(i)) for i in range(lib.pyg_isa_count())}


def select_isa(name: str | None = None) -> str:
    """Choose the instruction set for every later call: the best supported one, or `name`. Returns the choice."""
    available = isa_names()
    if not available:
        return "numpy"
    choice = name or [isa for isa, ok in available.items() if ok][-1]
    if not available.get(choice):
        usable = ", ".join(isa for isa, ok in available.items() if ok)
        raise PyggmlError(f"PYGGML_ISA={choice} cannot run here; use one of: {usable}")
    lib.pyg_isa_select(list(available).index(choice))
    return choice


isa = select_isa(os.environ.get("PYGGML_ISA") or None)


def huge_zeros(n_bytes: int) -> np.ndarray:
    """Zeroed bytes that cost nothing until touched, on huge pages where the system has them."""
    if lib is None:
        return np.zeros(n_bytes, np.uint8)
    arena = lib.pyg_arena_new(n_bytes)
    if arena == ffi.NULL:
        raise PyggmlError(f"no memory for {n_bytes / 2**20:.0f} MB; use a smaller context (-c)")
    owner = ffi.gc(arena, lambda p: lib.pyg_arena_free(p, n_bytes))
    return np.frombuffer(ffi.buffer(owner, n_bytes), np.uint8)
