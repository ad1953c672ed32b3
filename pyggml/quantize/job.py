"""Deciding about a quantization: a `Job` says which tensor becomes what, with the new file's metadata.

Names, shapes and metadata only: no weight is read, and every refusal comes from here, before a byte is written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyggml.errors import PyggmlError
from pyggml.formats import Typed
from pyggml.formats.tensorfile import OpaqueType
from pyggml.quantize import provenance, recipes
from pyggml.quantize.imatrix import Imatrix
from pyggml.quantize.options import Options
from pyggml.quantize.select import Choice, Wishes, layer_of, select

SPLIT = ("split.no", "split.count", "split.tensors.count")
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

    def importance(self, c: Choice) -> np.ndarray | None:
        """float32 (matrices, columns) for a tensor; a token table may have columns of another model's output, and then goes without."""
        if self.imatrix is None:
            return None
        try:
            return self.imatrix.importance(self.sources[c.name].name, c.shape)
        except PyggmlError:
            if recipes.role(c.name) == "embedding":
                return None
            raise


def plan(file: Any, options: Options, *, dry_run: bool = False) -> Job:
    """Decide everything about quantizing an open model file. PyggmlError for what cannot be done or would give rubbish.

    dry_run: a missing importance matrix is not refused; it is in Job.missing_imatrix.
    """
    recipe = options.recipe if isinstance(options.recipe, recipes.Recipe) else recipes.find(options.recipe)
    imatrix = _imatrix(options)
    sources = _pruned(file.tensors, options.prune_layers)
    wishes = Wishes(options.output_tensor_type, options.token_embedding_type, options.tensor_types, options.leave_output_tensor, options.pure)
    choices = select(sources, file.kv, recipe, wishes, imatrix=imatrix is not None, path=file.path)
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
            job.importance(c)                      # of another model: refused here
    if job.missing_imatrix:
        c = job.missing_imatrix[0]
        raise PyggmlError(f'{imatrix.path or "imatrix"}: nothing is known about the tensor "{c.name}", and {c.after.name} needs it; '
                          "use an imatrix of the whole model, or give the tensor another type with --tensor-type")


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
