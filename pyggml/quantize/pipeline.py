"""A model file to a smaller one: `plan` decides and refuses, `run` makes the blocks, `quantize_file` writes them.

    plan            names, shapes and metadata only: types, sizes, new metadata; every refusal comes from here, before a byte is written
    run             tensor by tensor, piece by piece: memory stays at the pieces under way, whatever the size of the model
    quantize_file   one atomic file (or one for each part); a cancelled run is continued by the next
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pyggml import __version__, formats
from pyggml.errors import PyggmlError
from pyggml.formats import NewTensor, Typed
from pyggml.formats.atomic import Output, replacing
from pyggml.formats.shards import part_path
from pyggml.formats.tensorfile import OpaqueType
from pyggml.formats.writer import header
from pyggml.quantize import provenance, recipes
from pyggml.quantize.encode import Encoder
from pyggml.quantize.imatrix import Imatrix
from pyggml.quantize.options import Options, Progress, tell
from pyggml.quantize.select import Choice, Wishes, layer_of, select

log = logging.getLogger("pyggml")

SPLIT = ("split.no", "split.count", "split.tensors.count")
GOES_ON = "; the same call goes on from there"
_LAYER = re.compile(r"^blk\.\d+\.")


@dataclass
class Job:
    """A decided quantization. `sources` are the tensors by their new names (pruning renumbers layers)."""

    file: Any
    options: Options
    choices: list[Choice]
    kv: dict[str, Typed]
    sources: dict[str, Any]
    imatrix: Imatrix | None
    notes: list[str] = field(default_factory=list)

    def nbytes(self, c: Choice) -> int:
        """Bytes of a tensor after quantization."""
        if c.copied:
            return self.sources[c.name].nbytes
        return int(np.prod(c.shape[:-1], dtype=np.int64)) * c.after.row_bytes(c.shape[-1])

    @property
    def size_before(self) -> int:
        return sum(t.nbytes for t in self.sources.values())

    @property
    def size_after(self) -> int:
        return sum(self.nbytes(c) for c in self.choices)

    @property
    def n_weights(self) -> int:
        return sum(c.size for c in self.choices)

    @property
    def missing_imatrix(self) -> list[Choice]:
        """Tensors whose new type is too coarse without the importance matrix that is not there."""
        known = self.imatrix.entries if self.imatrix is not None else {}
        return [c for c in self.choices if c.needs_imatrix and not c.copied and self.sources[c.name].name not in known]


# ---- deciding -------------------------------------------------------------------------------------------------------------------

def plan(file: Any, options: Options, *, dry_run: bool = False) -> Job:
    """Decide everything about quantizing an open model file. PyggmlError for what cannot be done or would give rubbish.

    dry_run: a missing importance matrix is not refused; it is in Job.missing_imatrix.
    """
    recipe = options.recipe if isinstance(options.recipe, recipes.Recipe) else recipes.find(options.recipe)
    imatrix = _imatrix(options)
    sources = _pruned(file.tensors, options.prune_layers)
    wishes = Wishes(options.output_tensor_type, options.token_embedding_type, options.tensor_types, options.leave_output_tensor, options.pure)
    choices = select(sources, file.kv, recipe, wishes, imatrix=imatrix is not None)
    if options.keep_split and len(file.sources) > 1:
        part = {id(s): i for i, s in enumerate(file.sources)}
        choices.sort(key=lambda c: (part[id(sources[c.name].source)], sources[c.name].offset))
    job = Job(file, options, choices, {}, sources, imatrix)
    _refuse(job, dry_run)
    job.kv = _metadata(job, recipe)
    for c in choices:
        if c.fallback_from:
            job.notes.append(f"{c.name}: rows of {c.shape[-1]} do not divide into {c.fallback_from} blocks: {c.after.name} instead")
    return job


def _imatrix(options: Options) -> Imatrix | None:
    if not options.imatrix:
        return None
    found = options.imatrix if isinstance(options.imatrix, Imatrix) else Imatrix.load(options.imatrix)
    if options.include_weights and options.exclude_weights:
        raise PyggmlError("--include-weights and --exclude-weights cannot be used together")
    found = found.filtered(options.include_weights, options.exclude_weights)
    return found if found.entries else None


def _pruned(tensors: dict[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """Tensors without those of `layers`, the layers above renumbered."""
    if not layers:
        return dict(tensors)
    there = sorted({layer_of(name) for name in tensors} - {-1})
    missing = set(layers) - set(there)
    if missing or len(set(layers)) == len(there):
        raise PyggmlError(f"--prune-layers {','.join(map(str, layers))}: the model has the layers {there[0]} to {there[-1]}, and some must stay"
                          if there else "--prune-layers: the model has no layers")
    number = {old: new for new, old in enumerate(x for x in there if x not in layers)}
    return {_LAYER.sub(f"blk.{number[layer_of(name)]}.", name) if layer_of(name) >= 0 else name: t
            for name, t in tensors.items() if layer_of(name) not in layers}


def _refuse(job: Job, dry_run: bool) -> None:
    path, options, imatrix = job.file.path, job.options, job.imatrix
    if not job.choices:
        raise PyggmlError(f"{path}: the file holds no tensors, so there is nothing to quantize")
    for c in job.choices:
        if c.copied:
            continue
        if isinstance(c.before, OpaqueType):
            raise PyggmlError(f'{path}: tensor "{c.name}": {c.before.why()}; it can only be copied (recipe COPY)')
        if not c.after.for_weights:
            raise PyggmlError(f'tensor "{c.name}": {c.after.name} is not a type for weights; choose another with --tensor-type')
        if c.before.quantized and not options.allow_requantize:
            raise PyggmlError(f'{path}: tensor "{c.name}" is already {c.before.name}; quantize from the F16, BF16 or F32 file, '
                              "or accept a worse result with --allow-requantize")
    if imatrix is None and job.missing_imatrix and not dry_run:
        c = job.missing_imatrix[0]
        raise PyggmlError(f'tensor "{c.name}": {c.after.name} needs an importance matrix to be any good; '
                          "make one with `pyggml imatrix` and give it with --imatrix")
    if imatrix is None:
        return
    weights = {t.name for t in job.file.tensors.values()}
    if not weights & set(imatrix.entries):
        raise PyggmlError(f'{imatrix.path or "imatrix"}: none of its {len(imatrix.entries)} entries ("{next(iter(imatrix.entries))}", ...) '
                          f"is a tensor of {path}; it is of another model")
    for c in job.choices:
        if not c.copied:
            _importance(job, c)                     # of another model: refused here
    if job.missing_imatrix:
        c = job.missing_imatrix[0]
        raise PyggmlError(f'{imatrix.path or "imatrix"}: nothing is known about the tensor "{c.name}", and {c.after.name} needs it; '
                          "use an imatrix of the whole model, or give the tensor another type with --tensor-type")


def _importance(job: Job, c: Choice) -> np.ndarray | None:
    """float32 (matrices, columns) for a tensor; a token table may have columns of another model's output, and then goes without."""
    if job.imatrix is None:
        return None
    try:
        return job.imatrix.importance(job.sources[c.name].name, c.shape)
    except PyggmlError:
        if recipes.role(c.name) == "embedding":
            return None
        raise


def _metadata(job: Job, recipe: recipes.Recipe) -> dict[str, Typed]:
    """The new file's metadata, in the order llama.cpp writes it."""
    options, imatrix = job.options, job.imatrix
    kv = {k: v for k, v in job.file.kv.typed().items() if k not in SPLIT and not k.startswith(provenance.PREFIX)}

    def put(key: str, type: str, value: Any) -> None:
        kv.pop(key, None)
        kv[key] = Typed(type, value)

    put("general.quantization_version", "u32", 2)
    if recipe.base:
        put("general.file_type", "u32", recipe.id)
    for key, type, value in options.override_kv:
        put(key, type, value)
    if imatrix is not None:
        put("quantize.imatrix.file", "str", imatrix.path)
        if imatrix.datasets:
            put("quantize.imatrix.dataset", "str", imatrix.datasets[0])
        put("quantize.imatrix.entries_count", "u32", len(imatrix.entries))
        if imatrix.n_chunks > 0:
            put("quantize.imatrix.chunks_count", "u32", imatrix.n_chunks)
    if options.prune_layers:
        arch = str(job.file.kv.get("general.architecture", ""))
        put(f"{arch}.block_count", "u32", len({layer_of(n) for n in job.sources} - {-1}))
    if not options.compat:
        kv |= provenance.keys(options, job.file.path, imatrix.sha256 if imatrix is not None else "")
    return kv


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
    blocks = _copied(tensor) if c.copied else encoder.encode(tensor, c.after, _importance(job, c))
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
    refuse_input(file, parts)
    hashing = provenance.Hashing([s.name for s in file.sources]) if not job.options.compat else None
    try:
        for path, (kv, names) in parts.items():
            _write(job, path, kv, names, hashing, progress)
    finally:
        if hashing is not None:
            hashing.stop()
    return Result(tuple(parts), job.size_before, job.size_after, job.n_weights, tuple(job.notes))


def refuse_input(file: Any, targets: Iterable[str]) -> None:
    """PyggmlError when one of `targets` is a file that `file` is read from."""
    for path in targets:
        if os.path.exists(path) and any(os.path.samefile(s.name, path) for s in file.sources):
            raise PyggmlError(f"{path}: the output is the input; write to another path")


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
