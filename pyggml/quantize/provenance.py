"""Where a quantized file comes from: keys that pyggml writes into it (reproduce.py runs the same quantization again from them).

    pyggml.quant.version        of pyggml
    pyggml.quant.recipe         Q4_K_M, or the name of a saved recipe
    pyggml.quant.method         search (better scales than ggml's, see encode.py)
    pyggml.quant.options        what differs from the defaults, as JSON
    pyggml.quant.source         the file's name, and .sha256 of its bytes (all parts in order)
    pyggml.quant.imatrix.sha256 of the importance matrix; its path and text are in llama.cpp's keys quantize.imatrix.*

Other programs ignore them.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from pyggml import __version__
from pyggml.errors import PyggmlError
from pyggml.formats import Typed
from pyggml.formats.source import local
from pyggml.quantize.options import Options
from pyggml.quantize.recipes import Recipe

PREFIX = "pyggml.quant."
SHA256 = PREFIX + "source.sha256"
UNKNOWN = "0" * 64             # stands in the header until the hash is known
_READ = 4 << 20
# which options change the result; the rest says where files are and how to run
_SAVED = [f.name for f in fields(Options) if f.name not in ("recipe", "imatrix", "compat", "n_threads", "keep_split")]


def keys(options: Options, source: str, imatrix_sha256: str) -> dict[str, Typed]:
    """The provenance of a file that is about to be made; the source's hash is filled in later."""
    changed = {name: value for name, value in asdict(options).items() if name in _SAVED and value != getattr(Options(), name)}
    if isinstance(options.recipe, Recipe) and options.recipe.tensors:
        changed["tensors"], changed["base"] = options.recipe.tensors, options.recipe.base
    found = {"version": __version__, "recipe": options.recipe_name, "method": "search", "options": json.dumps(changed, sort_keys=True),
             "source": os.path.basename(source), "source.sha256": UNKNOWN}
    if imatrix_sha256:
        found["imatrix.sha256"] = imatrix_sha256
    return {PREFIX + key: Typed("str", value) for key, value in found.items()}


def recorded(kv: Mapping[str, Any], path: str) -> dict[str, str]:
    """The provenance keys of a file, without their prefix; PyggmlError when it has none."""
    found = {key[len(PREFIX):]: str(kv[key]) for key in kv if key.startswith(PREFIX)}
    if "recipe" not in found:
        raise PyggmlError(f'{path}: the key "{PREFIX}recipe" is missing: the file was not made by `pyggml quantize`, or with --compat')
    return found


class Hashing:
    """The SHA-256 of some files, computed beside other work. Reads on its own, so that no mapped page stays in memory for it."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths, self._stop, self._hash = list(paths), threading.Event(), hashlib.sha256()
        self._error: PyggmlError | None = None
        self._thread = threading.Thread(target=self._run, name="pyggml-sha256", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for path in self._paths:
                source = local(path, use_mmap=False)
                for at in range(0, source.size, _READ):
                    if self._stop.is_set():
                        return
                    self._hash.update(source.array(at, min(_READ, source.size - at)).data)
        except PyggmlError as error:
            self._error = error

    def stop(self) -> None:
        self._stop.set()

    def hexdigest(self) -> str:
        """Waits for the end."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._hash.hexdigest()
