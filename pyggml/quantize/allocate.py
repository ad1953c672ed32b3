"""A mix of types made for one model and one size: what each tensor loses in each type is measured, and bits go where they save most.

    measure    the divergence when one tensor alone is quantized, for a few probe types; for the types between them it is taken as
               proportional to the weighted squared error of the weights, which is exact for small errors
    allocate   tensors add up, so minimizing the sum under a limit on bytes is a Lagrangian problem: for a price per byte every
               tensor picks its own best type, and the price is found by bisection (Everett 1963); what is left over is spent greedily
    save       the mix is a recipe: a .json for `pyggml quantize IN OUT MIX.json`, or a .txt for llama-quantize's --tensor-type-file
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyggml import formats
from pyggml.context import Model
from pyggml.errors import PyggmlError
from pyggml.formats.atomic import replacing
from pyggml.formats.writer import NewTensor, header
from pyggml.measure.chunks import split, tokenize
from pyggml.measure.lockstep import Yardstick, in_memory
from pyggml.quantize import recipes
from pyggml.quantize.encode import Encoder, decode, pieces
from pyggml.quantize.options import Options, Progress, tell
from pyggml.quantize.pipeline import Job, plan
from pyggml.quantize.recipes import Recipe
from pyggml.types import tensor_type

# Types to choose from, and the ones whose loss is measured (the rest lies between). With an importance matrix also the second row.
TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
IMATRIX_TYPES = ("IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
PROBES = ("Q2_K", "Q4_K", "Q6_K")


@dataclass(frozen=True)
class Option:
    """A type that a tensor may get: bytes, and the divergence it is thought to cause."""

    type: str
    nbytes: int
    kld: float


@dataclass
class Allocation:
    """A mix: the recipe, the chosen option of every tensor, and the divergence that is expected of them together."""

    recipe: Recipe
    chosen: dict[str, Option]
    size: int                    # bytes of all tensors
    n_weights: int
    model: str

    @property
    def kld(self) -> float:
        return sum(o.kld for o in self.chosen.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.size / self.n_weights

    def table(self) -> str:
        """The mix as text: a line for each type, and where the loss is."""
        lines = [f"{self.recipe.name}: {self.bits_per_weight:.3f} bits per weight, {self.size / 2**20:.2f} MiB, expected KLD {self.kld:.5f}"]
        for name, option in self.chosen.items():
            lines.append(f"  {name:<40} {option.type:<8} {option.nbytes / 1024:12.1f} KiB   KLD {option.kld:.6f}")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """As a recipe (.json), or as a --tensor-type-file (.txt)."""
        types = {name: o.type for name, o in self.chosen.items()}
        if os.fspath(path).endswith(".txt"):
            text = "".join(f"^{name.replace('.', chr(92) + '.')}$={kind.lower()}\n" for name, kind in types.items())
        else:
            text = json.dumps({"recipe": self.recipe.name, "id": self.recipe.id, "base": self.recipe.base, "model": os.path.basename(self.model),
                               "bits_per_weight": round(self.bits_per_weight, 4), "expected_kld": self.kld, "tensors": types}, indent=1) + "\n"
        with replacing(path) as out:
            out.write(text.encode())


def load(path: str | os.PathLike[str]) -> Recipe:
    """A saved mix as a recipe."""
    try:
        data = json.loads(Path(path).read_text())
        return Recipe(str(data["recipe"]), int(data["id"]), tensor_type(data["base"]).name,
                      tensors={str(name): tensor_type(kind).name for name, kind in data["tensors"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PyggmlError(f"{os.fspath(path)}: cannot be read as a recipe ({type(error).__name__}: {error}); "
                          "make one with `pyggml quantize --target-bpw`") from None


def allocate(source: str | os.PathLike[str], text: str, *, size: int | None = None, bits_per_weight: float | None = None,
             types: Sequence[str] | None = None, imatrix: Any = None, n_ctx: int = 512, n_chunks: int = 8, n_threads: int = 0,
             progress: Progress | None = None) -> Allocation:
    """The mix with the least expected divergence whose file has at most `size` bytes, or whose tensors have `bits_per_weight`.

    types: what may be chosen. Progress counts measured tensors. PyggmlError when even the smallest types are too large.
    """
    if (size is None) == (bits_per_weight is None):
        raise PyggmlError("give a size or bits per weight, one of them")
    types = tuple(types or (*TYPES, *(IMATRIX_TYPES if imatrix is not None else ())))
    file = formats.open(source)
    job = plan(file, Options(recipe="Q8_0", imatrix=imatrix, pure=True, allow_requantize=True))
    tensors = [c.name for c in job.choices if not c.copied or c.before.name == "Q8_0"]
    options = measure(job, tensors, text, types, n_ctx=n_ctx, n_chunks=n_chunks, n_threads=n_threads, progress=progress)
    fixed = sum(job.nbytes(c) for c in job.choices if c.name not in options)
    if bits_per_weight is not None:
        budget = int(bits_per_weight * job.n_weights / 8)
        found = _result(job, choose(options, budget - fixed), fixed, f"{bits_per_weight:g}bpw")
    else:
        assert size is not None
        budget, excess = size, 0
        for _ in range(4):                       # the header's length depends on the mix, a little
            budget -= excess
            found = _result(job, choose(options, budget - fixed), fixed, f"{size / 2**20:.0f}M")
            excess = file_size(job, found.recipe) - size
            if excess <= 0:
                break
    return found


def file_size(job: Job, recipe: Recipe) -> int:
    """Bytes of the whole file that a recipe makes of a model."""
    made = plan(job.file, Options(recipe=recipe, imatrix=job.imatrix, allow_requantize=True))
    tensors = [NewTensor(c.name, c.after, c.shape, np.empty(0), made.nbytes(c)) for c in made.choices]
    head, alignment = header(made.kv, tensors)
    return len(head) + sum(-(-t.nbytes // alignment) * alignment for t in tensors)


def _result(job: Job, chosen: dict[str, Option], fixed: int, label: str) -> Allocation:
    weight: Counter[str] = Counter()
    for option in chosen.values():
        weight[option.type] += option.nbytes
    base = weight.most_common(1)[0][0]
    near = next((r for r in recipes.RECIPES if r.base == base), recipes.find("Q8_0"))
    recipe = Recipe(f"mix-{label}", near.id, base, tensors={name: o.type for name, o in chosen.items()})
    return Allocation(recipe, chosen, fixed + sum(o.nbytes for o in chosen.values()), job.n_weights, job.file.path)


# ---- measuring --------------------------------------------------------------------------------------------------------------

def measure(job: Job, names: Sequence[str], text: str, types: Sequence[str], *, n_ctx: int, n_chunks: int, n_threads: int,
            progress: Progress | None) -> dict[str, list[Option]]:
    """What every type would cost each tensor. Weights are multiplied exactly, so that nothing but the weights' error is seen."""
    model = Model(job.file)
    chunks = split(tokenize(model, text, n_ctx), n_ctx, n_chunks)
    yardstick = Yardstick(model, chunks, exact=True, n_threads=n_threads or None)
    found = {}
    with Encoder(n_threads or None, search=False) as encoder:        # every type of every tensor: the quick search ranks them as well
        for i, name in enumerate(names):
            tell(progress, i, len(names), name)
            found[name] = _options(job, name, types, encoder, yardstick)
    tell(progress, len(names), len(names), "")
    return found


def _options(job: Job, name: str, types: Sequence[str], encoder: Encoder, yardstick: Yardstick) -> list[Option]:
    tensor = job.sources[name]
    importance = job.imatrix.importance(name, tensor.shape) if job.imatrix is not None else None
    unknown = job.imatrix is not None and importance is None
    rows = [tensor_type(t) for t in types if tensor.shape[-1] % tensor_type(t).block == 0
            and not (unknown and t in recipes.NEEDS_IMATRIX and recipes.role(name) not in ("output", "embedding"))]
    if not rows:
        rows = [tensor_type("F16")]
    blocks = {row.name: np.concatenate([b.reshape(-1) for b in encoder.encode(tensor, row, importance)]) for row in rows}
    errors = {row.name: _error(tensor, row, blocks[row.name], importance) for row in rows}
    probes = {t: float(yardstick.with_tensors({name: in_memory(name, tensor_type(t), tensor.shape, blocks[t])}).kld.mean())
              for t in (PROBES if set(PROBES) & set(blocks) else list(blocks)) if t in blocks}
    return [Option(row.name, blocks[row.name].nbytes, probes.get(row.name, expected(errors, probes, row.name))) for row in rows]


def expected(errors: Mapping[str, float], probes: Mapping[str, float], kind: str) -> float:
    """The divergence of a type from those of the probes: ln(divergence) is a line in ln(error) through the two nearest ones."""
    if errors[kind] <= 0 or any(errors[p] <= 0 or kld <= 0 for p, kld in probes.items()):
        return 0.0
    x = np.log(errors[kind])
    near = sorted(probes, key=lambda p: abs(np.log(errors[p]) - x))[:2]
    points = sorted((float(np.log(errors[p])), float(np.log(probes[p]))) for p in near)
    slope = 1.0
    if len(points) == 2 and points[1][0] - points[0][0] > 1e-6:
        slope = float(np.clip((points[1][1] - points[0][1]) / (points[1][0] - points[0][0]), 0.5, 1.5))
    anchor = (float(np.log(errors[near[0]])), float(np.log(probes[near[0]])))
    return float(np.exp(anchor[1] + slope * (x - anchor[0])))


def _error(tensor: Any, row: Any, blocks: np.ndarray, importance: np.ndarray | None) -> float:
    """Squared error of the weights, each column weighted by its importance."""
    total, raw = 0.0, blocks.reshape(-1, row.row_bytes(tensor.shape[-1]))
    for matrix, start, end in pieces(tensor.shape):
        difference = decode(raw[start:end], row) - decode(tensor.raw[start:end], tensor.type)
        columns = np.einsum("rc,rc->c", difference, difference, dtype=np.float64)
        total += float(columns.sum() if importance is None else columns @ importance[matrix])
    return total


# ---- choosing ---------------------------------------------------------------------------------------------------------------

def choose(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """One option for each tensor: the least sum of divergence with at most `budget` bytes."""
    def at(price: float) -> dict[str, Option]:
        return {name: min(own, key=lambda o: (o.kld + price * o.nbytes, o.nbytes)) for name, own in options.items()}

    def cost(chosen: Mapping[str, Option]) -> int:
        return sum(o.nbytes for o in chosen.values())

    smallest = {name: min(own, key=lambda o: (o.nbytes, o.kld)) for name, own in options.items()}
    if cost(smallest) > budget:
        raise PyggmlError(f"the smallest types take {cost(smallest)} bytes for these tensors, and {max(0, budget)} are left for them; "
                          "ask for a larger size, or give an imatrix, which allows smaller types")
    low, high = 1e-20, 1.0                   # divergence per byte
    best = smallest
    for _ in range(100):
        price = float(np.sqrt(low * high))
        chosen = at(price)
        if cost(chosen) <= budget:
            best, high = chosen, price
        else:
            low = price
    return _spend(best, options, budget - cost(best))


def _spend(chosen: dict[str, Option], options: Mapping[str, Sequence[Option]], left: int) -> dict[str, Option]:
    """Use up what the prices left over: the upgrade that saves most per byte among those that fit, again and again."""
    chosen = dict(chosen)
    rate: Callable[[tuple[str, Option]], float] = lambda u: (chosen[u[0]].kld - u[1].kld) / (u[1].nbytes - chosen[u[0]].nbytes)  # noqa: E731
    while True:
        upgrades = [(name, o) for name, own in options.items() for o in own
                    if 0 < o.nbytes - chosen[name].nbytes <= left and o.kld < chosen[name].kld]
        if not upgrades:
            return chosen
        name, option = max(upgrades, key=rate)
        left -= option.nbytes - chosen[name].nbytes
        chosen[name] = option
