"""What every tensor of a model loses in every type: the divergence that its quantization causes alone.

It is measured for a few probe types by running the model with one tensor replaced. The types between them follow from the squared
error of the weights, each column weighted by its importance: for small errors the divergence is proportional to it. In a large model
most tensors are run in one type only: by how much the divergence grows with the error is then learned from others of their role.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyggml import quants
from pyggml.measure.yardstick import Yardstick, in_memory
from pyggml.quantize import recipes
from pyggml.quantize.encode import Encoder, check, decode
from pyggml.quantize.job import Job
from pyggml.quantize.options import Progress, tell
from pyggml.types import TensorType, tensor_type

PROBES = ("Q2_K", "Q4_K", "Q6_K")
BUDGET = 10e12           # multiplications to spend: a minute or two on two cores
MOST_CHUNKS = 32
EVERY = 4                # of the tensors of a role in a large model one so many, and the last, gets the second probe too
CONTEXT = 8              # an eighth of a chunk is there for context alone, the rest is scored
CODEBOOK = ("IQ1", "IQ2", "IQ3")
SAMPLE = 1 << 18         # weights of a tensor whose errors are taken for all of them


@dataclass(frozen=True)
class Option:
    """A type that a tensor may get: bytes, and the divergence it is thought to cause."""

    type: str
    nbytes: int
    kld: float


@dataclass(frozen=True)
class Effort:
    """How much is measured: chunks of text, and the types that tensors are tried in: every so manieth of a role in all, the rest in the first."""

    n_chunks: int
    probes: tuple[str, ...]
    every: int = 1


def effort(n_weights: int, n_tensors: int, n_ctx: int, bits_per_weight: float, n_chunks: int = 0) -> Effort:
    """All probes over as many chunks as the budget allows; for a large model the two probes that enclose the wanted size, over one,
    and the second of them for some tensors only.

    Few tokens rank tensors as well as many do; one probe alone does not do, because what a type costs far below it is no longer in
    proportion to its error. n_chunks: 0, or as many whatever it costs.
    """
    chunk = n_tensors * n_ctx * n_weights           # of one probe: two operations a weight, half of the model on average
    probes: tuple[str, ...] = PROBES
    if max(1, n_chunks) * len(PROBES) * chunk > BUDGET:
        middle = PROBES[1]
        probes = (middle, PROBES[0] if bits_per_weight < tensor_type(middle).bits_per_weight + 0.75 else PROBES[2])
    every = EVERY if max(1, n_chunks) * len(probes) * chunk > BUDGET else 1
    return Effort(n_chunks or min(MOST_CHUNKS, max(1, int(BUDGET / (len(probes) * chunk)))), probes, every)


def thorough(names: Sequence[str], every: int) -> list[str]:
    """The first, every so manieth and the last tensor of each role."""
    of_role: dict[str, list[str]] = {}
    for name in names:
        of_role.setdefault(recipes.role(name), []).append(name)
    return [name for own in of_role.values() for i, name in enumerate(own) if i % every == 0 or i == len(own) - 1]


def measure(job: Job, names: Sequence[str], yardstick: Yardstick, types: Sequence[str], effort: Effort, *, n_threads: int = 0,
            progress: Progress | None = None) -> dict[str, list[Option]]:
    """What every one of `types` would cost each of the tensors `names`. Progress counts tensors."""
    first = thorough(names, effort.every)
    order = [*first, *sorted(set(names) - set(first), key=list(names).index)]
    found: dict[str, list[Option]] = {}
    slopes: dict[str, list[float]] = {}
    with Encoder(n_threads or None, search=False) as encoder:        # ggml's choices rank types as well as a search does, in a third of the time
        for i, name in enumerate(order):
            tell(progress, i, len(order), name)
            own = slopes.setdefault(recipes.role(name), [])
            probes = effort.probes if i < len(first) else effort.probes[:1]
            found[name], errors, klds = _options(job, name, types, probes, float(np.median(own or [1.0])), encoder, yardstick)
            if len(klds) > 1:
                own.append(slope(errors, klds, list(klds)[:2]))
    tell(progress, len(order), len(order), "")
    return {name: found[name] for name in names}


def _options(job: Job, name: str, types: Sequence[str], probes: Sequence[str], steepness: float, encoder: Encoder,
             yardstick: Yardstick) -> tuple[list[Option], dict[str, float], dict[str, float]]:
    """The options of a tensor, with its errors in each type and the divergences that were measured."""
    tensor = job.sources[name]
    importance = job.imatrix.importance(name, tensor.shape) if job.imatrix is not None else None
    unknown = job.imatrix is not None and importance is None
    rows = [tensor_type(t) for t in types if tensor.shape[-1] % tensor_type(t).block == 0
            and not (unknown and t in recipes.NEEDS_IMATRIX and recipes.role(name) not in ("output", "embedding"))]
    if not rows:
        rows = [tensor_type("F16")]
    tried = [tensor_type(t) for t in probes if tensor.shape[-1] % tensor_type(t).block == 0] or rows[:1]
    errors = sampled_errors(tensor, {row.name: row for row in (*rows, *tried)}, importance, encoder.n_threads)
    klds = {}
    for row in tried:
        blocks = np.concatenate([b.reshape(-1) for b in encoder.encode(tensor, row, importance)])
        klds[row.name] = float(yardstick.with_tensors({name: in_memory(name, row, tensor.shape, blocks)}).kld.mean())
    n_rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
    options = [Option(row.name, n_rows * row.row_bytes(tensor.shape[-1]), klds.get(row.name, expected(errors, klds, row.name, steepness)))
               for row in rows]
    return options, errors, klds


def sampled_errors(tensor: Any, rows: Mapping[str, TensorType], importance: np.ndarray | None, n_threads: int) -> dict[str, float]:
    """Squared error of the weights in each type, columns weighted by their importance, over evenly spaced rows of every matrix."""
    per_matrix, n_columns = tensor.shape[-2] if len(tensor.shape) > 1 else 1, tensor.shape[-1]
    n_matrices = max(1, len(tensor.raw) // per_matrix)
    wanted = min(per_matrix, -(-SAMPLE // (n_columns * n_matrices)))
    picked = np.linspace(0, per_matrix - 1, wanted).astype(np.int64)
    errors = dict.fromkeys(rows, 0.0)
    for matrix in range(n_matrices):
        weights = decode(np.ascontiguousarray(tensor.raw[matrix * per_matrix + picked]), tensor.type)
        columns = importance[matrix] if importance is not None else None
        for name, row in rows.items():
            check(weights, row, tensor, matrix * per_matrix)
            quickest = row.name.startswith(CODEBOOK)         # for these the search is the quicker one
            difference = decode(quants.quantize(weights, row, columns, search=quickest, threads=n_threads), row) - weights
            by_column = np.einsum("rc,rc->c", difference, difference, dtype=np.float64)
            errors[name] += float(by_column.sum() if columns is None else by_column @ columns)
    return errors


def slope(errors: Mapping[str, float], klds: Mapping[str, float], pair: Sequence[str]) -> float:
    """By how much ln(divergence) grows with ln(error) between two probes; 1 where they cannot tell."""
    if any(errors[p] <= 0 or klds[p] <= 0 for p in pair):
        return 1.0
    run, rise = (float(np.log(of[pair[1]] / of[pair[0]])) for of in (errors, klds))
    return float(np.clip(rise / run, 0.5, 1.5)) if abs(run) > 1e-6 else 1.0


def expected(errors: Mapping[str, float], probes: Mapping[str, float], kind: str, steepness: float = 1.0) -> float:
    """The divergence of a type from those of the probes: ln(divergence) is a line in ln(error) through the two nearest ones, or through
    a single one with the slope `steepness`."""
    if errors[kind] <= 0 or any(errors[p] <= 0 or kld <= 0 for p, kld in probes.items()):
        return 0.0
    x = np.log(errors[kind])
    near = sorted(probes, key=lambda p: abs(np.log(errors[p]) - x))[:2]
    if len(near) == 2:
        steepness = slope(errors, probes, near)
    return float(probes[near[0]] * np.exp(steepness * (x - np.log(errors[near[0]]))))
