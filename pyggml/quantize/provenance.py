"""Where a quantized file comes from: keys that pyggml writes into it, and running the same quantization again from them.

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
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from pyggml import __version__, formats
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


@dataclass(frozen=True)
class Reproduction:
    """What came of running a quantization again: `difference` names the first tensor that differs, "" when all bytes are the same."""

    recipe: str
    source: str
    n_tensors: int
    difference: str = ""

    @property
    def same(self) -> bool:
        return not self.difference


def recorded(kv: Mapping[str, Any], path: str) -> dict[str, str]:
    """The provenance keys of a file, without their prefix; PyggmlError when it has none."""
    found = {key[len(PREFIX):]: str(kv[key]) for key in kv if key.startswith(PREFIX)}
    if "recipe" not in found:
        raise PyggmlError(f'{path}: the key "{PREFIX}recipe" is missing: the file was not made by `pyggml quantize`, or with --compat')
    return found


def _beside(path: str, name: str, what: str, given: str | None) -> str:
    """`given`, or the file called `name` in the folder of `path`."""
    candidate = given or os.path.join(os.path.dirname(path) or ".", name)
    if not os.path.exists(candidate):
        raise PyggmlError(f"{path}: its {what} {name} is not at {candidate}; name it with --{what}")
    return candidate


def reproduce(path: str | os.PathLike[str], source: str | None = None, imatrix: str | None = None, *, n_threads: int = 0,
              progress: Any = None) -> Reproduction:
    """Quantize the recorded source again and compare every tensor of `path` with the result. Nothing is written.

    source, imatrix: where they are now; by default in the same folder (source), or where they were (imatrix).
    PyggmlError when they are missing or are not the recorded ones.
    """
    from pyggml.quantize.pipeline import plan, run

    path = os.fspath(path)
    made = formats.open(path)
    record = recorded(made.kv, path)
    source = _beside(path, record["source"], "source", source)
    if "imatrix.sha256" in record:
        imatrix = _beside(path, str(made.kv.get("quantize.imatrix.file", "imatrix.gguf")), "imatrix", imatrix or made.kv.get("quantize.imatrix.file"))
    file = formats.open(source)
    found = Hashing([s.name for s in file.sources]).hexdigest()
    if found != record["source.sha256"]:
        raise PyggmlError(f'{source}: its SHA-256 is {found}, {path} was made from {record["source.sha256"]}; this is not the same source')
    saved: dict[str, Any] = {k: tuple(map(tuple, v)) if k in ("tensor_types", "override_kv") else tuple(v) if isinstance(v, list) else v
             for k, v in json.loads(record["options"]).items()}
    recipe: str | Recipe = record["recipe"]
    if "tensors" in saved:
        recipe = Recipe(record["recipe"], int(made.kv["general.file_type"]), saved.pop("base"), tensors=saved.pop("tensors"))
    job = plan(file, Options(recipe=recipe, imatrix=imatrix, n_threads=n_threads, **saved))
    if job.imatrix is not None and job.imatrix.sha256 != record.get("imatrix.sha256"):
        raise PyggmlError(f"{imatrix}: its SHA-256 is {job.imatrix.sha256}, {path} was made with {record.get('imatrix.sha256')}")
    difference, types = "", {c.name: c.after for c in job.choices}
    for name, blocks in run(job, progress=progress):
        there = made.tensors.get(name)
        if not _equal(there, types[name], blocks):
            difference = difference or name
    for opened in (made, file):
        opened.verify()
    return Reproduction(record["recipe"], source, len(job.choices), difference)


def _equal(tensor: Any, kind: Any, blocks: Any) -> bool:
    """`tensor` has this type and these blocks. Takes all of them."""
    at, same = 0, tensor is not None and tensor.type.id == kind.id
    raw = tensor.raw.reshape(-1) if same else np.empty(0, np.uint8)
    for block in blocks:
        flat = block.reshape(-1)
        same = same and np.array_equal(raw[at:at + flat.size], flat)
        at += flat.size
    return same and at == raw.size
