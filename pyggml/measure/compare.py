"""Quantized files against the file they come from: size, divergence, and whether the difference between two of them means anything."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from pyggml.errors import Cancelled
from pyggml.measure.chunks import split, tokenize
from pyggml.measure.lockstep import lockstep
from pyggml.measure.scores import Mean, Tokens, mean, summary
from pyggml.measure.yardstick import Yardstick
from pyggml.model import Model

SIGNIFICANT = 2.0        # standard errors that a difference must exceed


@dataclass(frozen=True)
class Measured:
    """One file with its scores."""

    path: str
    nbytes: int              # of its tensors
    n_weights: int
    tokens: Tokens

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.n_weights

    @property
    def statistics(self) -> dict[str, Any]:
        return summary(self.tokens)


@dataclass(frozen=True)
class Pair:
    """The difference of two files' divergence over the same tokens: `first` minus `second`."""

    first: str
    second: str
    difference: Mean

    @property
    def verdict(self) -> str:
        if abs(self.difference.value) <= SIGNIFICANT * self.difference.error:
            return "no difference seen"
        better, worse = (self.first, self.second) if self.difference.value < 0 else (self.second, self.first)
        return f"{better} is closer than {worse}"


@dataclass(frozen=True)
class Part:
    """What the quantization of one tensor, or of one layer, does alone."""

    name: str
    type: str                # of the tensor in the quantized file; "" for a layer
    nbytes: int
    kld: Mean


@dataclass(frozen=True)
class Comparison:
    reference: str
    n_chunks: int
    n_ctx: int
    files: tuple[Measured, ...]

    @property
    def pairs(self) -> list[Pair]:
        """Every two files, the difference taken token by token, which is far sharper than comparing two means."""
        return [Pair(a.name, b.name, mean(a.tokens.kld - b.tokens.kld)) for a, b in combinations(self.files, 2)]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; a mean is [value, standard error]."""
        def plain(x: Mean | float) -> Any:
            return list(x) if isinstance(x, Mean) else x

        return {
            "reference": self.reference, "chunks": self.n_chunks, "n_ctx": self.n_ctx,
            "tokens": len(self.files[0].tokens) if self.files else 0,
            "files": [{"path": f.path, "bytes": f.nbytes, "bits_per_weight": f.bits_per_weight,
                       **{k.strip(): plain(v) for k, v in f.statistics.items()}} for f in self.files],
            "pairs": [{"first": p.first, "second": p.second, "KLD difference": plain(p.difference), "verdict": p.verdict} for p in self.pairs],
        }


def compare(reference: str | os.PathLike[str], files: Sequence[str | os.PathLike[str]], text: str, *, n_ctx: int = 512, n_chunks: int = -1,
            progress: Callable[[int, int, list[Tokens]], Any] | None = None, **options: Any) -> Comparison:
    """Measure `files` against `reference` over a text. Options are those of chunks.Evaluator.

    progress(done, total, scores so far) is called after each group of chunks; returning False cancels.
    """
    base = Model.load(reference)
    models = [Model.load(path) for path in files]
    chunks = split(tokenize(base, text, n_ctx), n_ctx, n_chunks)
    scores: list[Tokens] = []
    per_chunk = n_ctx - 1 - n_ctx // 2
    for scores in lockstep(base, models, chunks, **options):
        done = len(scores[0]) // per_chunk if scores else 0
        if progress is not None and progress(done, len(chunks), scores) is False:
            raise Cancelled(f"stopped after {done} of {len(chunks)} chunks")
    measured = tuple(Measured(os.fspath(path), m.nbytes, m.n_params, t) for path, m, t in zip(files, models, scores, strict=True))
    return Comparison(os.fspath(reference), len(chunks), n_ctx, measured)


def contributions(reference: str | os.PathLike[str], file: str | os.PathLike[str], text: str, *, by_layer: bool = False, n_ctx: int = 512,
                  n_chunks: int = 4, progress: Callable[[int, int, str], Any] | None = None, **options: Any) -> list[Part]:
    """What each tensor (or layer) of a quantized file costs alone: the reference with only that part replaced, largest loss first."""
    base, other = Model.load(reference), Model.load(file)
    chunks = split(tokenize(base, text, n_ctx), n_ctx, n_chunks)
    yardstick = Yardstick(base, chunks, **options)
    groups: dict[str, list[str]] = {}
    for name, tensor in other.file.tensors.items():
        if tensor.type.id != base.file[name].type.id:
            layer = re.match(r"blk\.\d+", name)
            groups.setdefault(layer[0] if by_layer and layer else name, []).append(name)
    parts = []
    for done, (label, names) in enumerate(groups.items()):
        if progress is not None and progress(done, len(groups), label) is False:
            raise Cancelled(f"stopped at {label}, {done} of {len(groups)}")
        tensors = {name: other.file[name] for name in names}
        kinds = {t.type.name for t in tensors.values()}
        parts.append(Part(label, kinds.pop() if len(kinds) == 1 else "", sum(t.nbytes for t in tensors.values()),
                          mean(yardstick.with_tensors(tensors).kld)))
    return sorted(parts, key=lambda p: -p.kld.value)


def table(found: Comparison) -> str:
    """The comparison as lines of text."""
    head = ["file", "MiB", "bpw", "mean KLD", "± SE", "median", "99% KLD", "ln PPL ratio", "± SE", "RMS Δp %", "same top %"]
    rows = [head]
    for f in found.files:
        s = f.statistics
        kld, ratio, rms, top = (s[k] for k in ("Mean KLD", "Mean ln(PPL(Q)/PPL(base))", "RMS Δp", "Same top p"))
        rows.append([f.name, f"{f.nbytes / 2**20:.2f}", f"{f.bits_per_weight:.3f}", f"{kld.value:.6f}", f"{kld.error:.6f}",
                     f"{s['Median KLD']:.6f}",
                     f"{s['99.0% KLD']:.5f}", f"{ratio.value:+.5f}", f"{ratio.error:.5f}", f"{rms.value:.3f}", f"{top.value:.2f}"])
    lines = _aligned(rows)
    pairs = [p for p in found.pairs if np.isfinite(p.difference.value)]
    if pairs:
        lines += ["", *_aligned([["pair", "KLD difference", "± SE", ""],
                                 *[[f"{p.first} - {p.second}", f"{p.difference.value:+.6f}", f"{p.difference.error:.6f}", p.verdict]
                                   for p in pairs]])]
    return "\n".join(lines)


def parts_table(parts: Sequence[Part]) -> str:
    total = sum(p.kld.value for p in parts) or 1.0
    rows = [["part", "type", "KiB", "mean KLD", "± SE", "share"]]
    rows += [[p.name, p.type, f"{p.nbytes / 1024:.1f}", f"{p.kld.value:.6f}", f"{p.kld.error:.6f}", f"{100 * p.kld.value / total:.1f}%"]
             for p in parts]
    return "\n".join(_aligned(rows))


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns of text: the first and the last to the left where they are words, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) if i == 0 or cell[:1].strip("+-0123456789") else cell.rjust(w)
                      for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]
