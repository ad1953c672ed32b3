"""Compiled kernels on disk, for the next process: compiling one takes seconds, and a model needs dozens.

A kernel's file is named by its function and a hash of all that it is made of: the sources of this package, the compiler's version, the GPU's compute
capability, the types of its arguments, and the constants that its functions are closed over. It is a zip file, whose checksums tell a
broken one; whatever cannot be read is compiled again. Files appear whole, so that processes can share a folder, and can be deleted any time;
those that nobody has used for a season, as after an update, are deleted here.

`PYGGML_KERNEL_CACHE` names another folder than the user's cache (~/.cache/pyggml/kernels); `PYGGML_KERNEL_CACHE=0` keeps nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import tempfile
import time
import types
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numba.core.types import Type

log = logging.getLogger("pyggml")
COMPILERS = ("numba", "numba-cuda", "llvmlite", "cuda-bindings")       # the last is as new as the CUDA that makes machine code
MEMBERS = ("entry", "ptx", "cubin")
UNUSED = 90 * 24 * 3600         # seconds after which a kernel that nobody loaded is deleted


def folder() -> Path | None:
    """Where kernels are kept; None: nowhere."""
    chosen = os.environ.get("PYGGML_KERNEL_CACHE", "")
    if chosen == "0":
        return None
    home = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return Path(chosen) if chosen else Path(home or Path.home() / ".cache") / "pyggml" / "kernels"


@cache
def delete_unused(where: Path) -> None:
    """Delete the kernels in a folder that nobody has used for long; once in a process."""
    for path in where.glob("*.zip"):
        with contextlib.suppress(OSError):      # another process was first
            if path.stat().st_mtime < time.time() - UNUSED:
                path.unlink()


# ---- names ------------------------------------------------------------------------------------------------------------------------------

@cache
def origin() -> str:
    """What every kernel here is made of."""
    made = hashlib.sha256(" ".join(importlib.metadata.version(name) for name in COMPILERS).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        made.update(source.name.encode() + source.read_bytes())
    return made.hexdigest()


def description(value: Any) -> str:
    """A function with the constants that it is closed over, or such a constant; what its source says is not in it. TypeError for anything else."""
    if (instruction := getattr(value, "instruction", None)) is not None:        # intrinsics.instruction
        return description(instruction)
    if (function := getattr(value, "py_func", value)) is not None and isinstance(function, types.FunctionType):
        closed = ", ".join(description(cell.cell_contents) for cell in function.__closure__ or ())
        return f"{function.__module__}.{function.__qualname__}:{function.__code__.co_firstlineno}({closed})"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(description, value))})"
    if value is None or isinstance(value, (bool, int, float, str, type, np.generic, Type)):
        return repr(value)
    raise TypeError(f"a kernel is closed over {value!r}, which has no name that lasts")


# ---- what numba-cuda asks ------------------------------------------------------------------------------------------------------------------

class KernelCache:
    """The cache of one kernel, in the place of numba-cuda's own, which does not see constants and other files change."""

    def __init__(self, function: Callable) -> None:
        self._function = function

    @property
    def cache_path(self) -> str:
        return str(folder() or "")

    def _path(self, argument_types: Any, capability: tuple) -> Path | None:
        where = folder()
        name = f"{origin()} {description(self._function)} {argument_types} {capability}"
        return where / f"{self._function.__name__}-{hashlib.sha256(name.encode()).hexdigest()[:40]}.zip" if where is not None else None

    def load_overload(self, argument_types: Any, target_context: Any) -> Any:
        """The kernel for these types, or None."""
        path = None
        try:
            from numba.cuda.codegen import CUDACodeLibrary

            library = CUDACodeLibrary(target_context.codegen(), self._function.__name__)
            capability = library._ensure_cc(None)
            path = self._path(argument_types, capability)
            if path is None or not path.exists():
                return None
            with zipfile.ZipFile(path) as file:
                entry, ptx, cubin = (file.read(member) for member in MEMBERS)
            with contextlib.suppress(OSError):  # a folder of somebody else's
                os.utime(path)
            return _kernel(library, capability, argument_types, entry.decode(), ptx.decode(), cubin)
        except Exception as error:      # noqa: BLE001  whatever is wrong with a file, or with this numba-cuda, the kernel can be compiled
            log.debug("%s cannot be used: %s", path or "the cache of kernels", error)
            return None

    def save_overload(self, argument_types: Any, kernel: Any) -> None:
        """Keep a kernel that was compiled, if that can be: a folder may not be written, and another numba-cuda may hold its code elsewhere."""
        try:
            library = kernel._codelibrary
            capability = library._ensure_cc(None)
            path = self._path(argument_types, capability)
            if path is None:
                return
            content = dict(zip(MEMBERS, (kernel.entry_name, library.get_asm_str(cc=capability), library.get_cubin(cc=capability).code), strict=True))
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as beside:
                aside = Path(beside) / path.name
                with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
                    for member, data in content.items():
                        archive.writestr(member, data)
                os.replace(aside, path)
            delete_unused(path.parent)
        except Exception as error:      # noqa: BLE001  the kernel is there all the same
            log.debug("the compiled %s cannot be kept: %s", self._function.__name__, error)

    def flush(self) -> None:
        """Nothing is deleted."""


def _kernel(library: Any, capability: tuple, argument_types: Any, entry: str, ptx: str, cubin: bytes) -> Any:
    """A kernel as numba-cuda makes one after it compiled it."""
    from cuda.core import ObjectCode
    from numba.core.typing import signature
    from numba.cuda.dispatcher import _Kernel
    from numba.types import void

    library._entry_name, library._finalized = entry, True
    library._ptx_cache[capability], library._cubin_cache[capability] = [ptx], ObjectCode.from_cubin(cubin)
    return _Kernel._rebuild(cooperative=False, name=entry, signature=signature(void, *argument_types), codelibrary=library, debug=False,
                            lineinfo=False, call_helper=None, extensions=[])
