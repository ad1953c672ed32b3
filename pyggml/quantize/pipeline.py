"""A model file to a smaller one: job.plan decides and refuses, `run` makes the blocks, `quantize_file` writes them.

    run             tensor by tensor, piece by piece: memory stays at the pieces under way, whatever the size of the model
    quantize_file   one atomic file (or one for each part); a cancelled run is continued by the next
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pyggml import __version__, formats
from pyggml.errors import PyggmlError
from pyggml.formats import NewTensor, Typed
from pyggml.formats.atomic import Output, refuse_input, replacing
from pyggml.formats.shards import part_path
from pyggml.formats.writer import header
from pyggml.quantize import provenance, recipes
from pyggml.quantize.encode import Encoder
from pyggml.quantize.job import Job, plan
from pyggml.quantize.options import Options, Progress, tell
from pyggml.quantize.select import Choice

log = logging.getLogger("pyggml")

GOES_ON = "; the same call goes on from there"


# ---- making ---------------------------------------------------------------------------------------------------------------------

def run(job: Job, names: Sequence[str] | None = None, progress: Progress | None = None) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
    """(name, its blocks piece by piece) of every tensor, or of `names`, in the order of the new file. Take all pieces before going on."""
    total = job.size_before
    done = sum(job.sources[c.name].nbytes for c in job.choices if names is not None and c.name not in names)
    with Encoder(job.options.n_threads, search=not job.options.compat) as encoder:
        for c in job.choices:
            if names is not None and c.name not in names:
                continue
            tensor = job.sources[c.name]
            tell(progress, done, total, c.name, GOES_ON)
            yield c.name, _watched(job, c, encoder, done, total, progress)
            done += tensor.nbytes
            job.file.advise(tensor, mmap.MADV_DONTNEED)         # the source's pages do not pile up in memory
    tell(progress, total, total, "")


def _watched(job: Job, c: Choice, encoder: Encoder, done: int, total: int, progress: Progress | None) -> Iterator[np.ndarray]:
    tensor = job.sources[c.name]
    blocks = _copied(tensor) if c.copied else encoder.encode(tensor, c.after, job.importance(c))
    rows, all_rows = 0, max(1, int(np.prod(c.shape[:-1], dtype=np.int64)))
    for block in blocks:
        yield block
        rows += len(block)
        tell(progress, done + tensor.nbytes * min(rows, all_rows) // all_rows, total, c.name, GOES_ON)


def _copied(tensor: Any) -> Iterator[np.ndarray]:
    raw = tensor.raw
    step = max(1, (8 << 20) // max(1, raw.shape[-1]))
    for start in range(0, len(raw), step):
        yield raw[start:start + step]


# ---- writing --------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Result:
    """What was written: paths, bytes of the tensors before and after, weights, and notes about fallbacks."""

    paths: tuple[str, ...]
    size_before: int
    size_after: int
    n_weights: int
    notes: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.size_after / self.n_weights


def quantize_file(source: str | os.PathLike[str], target: str | os.PathLike[str], recipe: str | recipes.Recipe = "Q8_0", *,
                  progress: Progress | None = None, **options: Any) -> Result:
    """Quantize the model file `source` into `target`. Options are those of options.Options.

    progress(done, total, tensor) is called with bytes of the source; returning False cancels (Cancelled), and the next call with the
    same arguments goes on where it stopped. Whatever else fails leaves nothing behind, and an old `target` as it was.
    """
    source, target = os.fspath(source), os.fspath(target)
    file = formats.open(source)
    job = plan(file, Options(recipe=recipe, **options))
    parts = _parts(job, target)
    refuse_input(parts, file.paths)
    hashing = provenance.Hashing([s.name for s in file.sources]) if not job.options.compat else None
    try:
        for path, (kv, names) in parts.items():
            _write(job, path, kv, names, hashing, progress)
    finally:
        if hashing is not None:
            hashing.stop()
    return Result(tuple(parts), job.size_before, job.size_after, job.n_weights, tuple(job.notes))


def _parts(job: Job, target: str) -> dict[str, tuple[dict[str, Typed], list[str]]]:
    """Path -> (metadata, tensors) of every file to write."""
    names = [c.name for c in job.choices]
    count = len(job.file.sources)
    if not job.options.keep_split or count == 1:
        return {target: (job.kv, names)}
    parts = {}
    for i, s in enumerate(job.file.sources):
        kv = {"split.no": Typed("u16", i), "split.count": Typed("u16", count), "split.tensors.count": Typed("i32", len(names))}
        parts[part_path(target.removesuffix(".gguf"), i + 1, count)] = (job.kv | kv if i == 0 else kv,
                                                                        [n for n in names if job.sources[n].source is s])
    return parts


def _write(job: Job, path: str, kv: dict[str, Typed], names: Sequence[str], hashing: provenance.Hashing | None, progress: Progress | None) -> None:
    wanted = set(names)
    tensors = [NewTensor(c.name, c.after, c.shape, np.empty(0), job.nbytes(c)) for c in job.choices if c.name in wanted]
    head, alignment = header(kv, tensors)
    final = [head]
    ends = np.cumsum([len(head), *(-(-t.nbytes // alignment) * alignment for t in tensors)]).tolist()

    def check(out: Output) -> None:
        if out.tell() != ends[-1] or out.read(0, len(head)) != final[0]:
            raise PyggmlError(f"{out.path}: the header read back is not what was written; the disk or its file system is damaged")

    with replacing(path, ends[-1], check, _key(job, head)) as out:
        whole = max((i for i, end in enumerate(ends) if end <= out.tell()), default=-1)      # tensors that an earlier run has completed
        out.restart(ends[whole] if whole >= 0 else 0)
        if whole < 0:
            out.write(head)
        elif whole:
            log.info("%s: going on after %d of %d tensors that a cancelled run has written", path, whole, len(tensors))
        for (name, blocks), end in zip(run(job, [t.name for t in tensors[max(0, whole):]], progress), ends[max(0, whole) + 1:], strict=True):
            for block in blocks:
                out.write(np.ascontiguousarray(block))
            out.pad(alignment)
            if out.tell() != end:
                raise PyggmlError(f'tensor "{name}": it ends at {out.tell()} instead of {end}; this is a fault of pyggml, please report it')
        job.file.verify()
        if hashing is not None and provenance.SHA256 in kv:
            known = replace(kv[provenance.SHA256], value=hashing.hexdigest())
            final[0] = header(kv | {provenance.SHA256: known}, tensors)[0]
            out.overwrite(0, final[0])


def _key(job: Job, head: bytes) -> str:
    """Stands for everything that goes into the file: a part with the same key can be continued."""
    sources = [(os.path.realpath(s.name), s.size, os.stat(s.name).st_mtime_ns) for s in job.file.sources]
    imatrix = job.imatrix.sha256 if job.imatrix is not None else ""
    return hashlib.sha256(repr((head, sources, imatrix, job.options.compat, __version__)).encode()).hexdigest()[:16]
