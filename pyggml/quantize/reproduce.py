"""Running a quantization again from what its file says of itself, to see that it gives the same bytes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyggml import formats
from pyggml.errors import PyggmlError
from pyggml.quantize.job import plan
from pyggml.quantize.options import Options
from pyggml.quantize.pipeline import run
from pyggml.quantize.provenance import Hashing, recorded
from pyggml.quantize.recipes import Recipe


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
