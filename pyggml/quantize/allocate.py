"""A mix of types made for one model and one size: what each tensor loses in each type is measured, and bits go where they save most.

    measure    (sensitivity.py) the divergence when one tensor alone is quantized
    choose     tensors add up, so minimizing the sum under a limit on bytes is a Lagrangian problem: for a price per byte every
               tensor picks its own best type, and the price is found by bisection (Everett 1963); what is left over is spent greedily
    verify     the divergence of the finished file, on the part of the text that nothing was chosen by
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
from pyggml.errors import PyggmlError
from pyggml.formats.atomic import replacing
from pyggml.formats.writer import NewTensor, header
from pyggml.measure.chunks import split, tokenize
from pyggml.measure.scores import Mean, mean
from pyggml.measure.yardstick import Yardstick
from pyggml.model import Model
from pyggml.quantize import recipes
from pyggml.quantize.job import Job, plan
from pyggml.quantize.options import CHUNK, Options, Progress
from pyggml.quantize.recipes import Recipe
from pyggml.quantize.select import Choice
from pyggml.quantize.sensitivity import CONTEXT, Option, effort, measure
from pyggml.types import tensor_type

# Types to choose from; with an importance matrix also the second row.
TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
IMATRIX_TYPES = ("IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")


@dataclass
class Allocation:
    """A mix: the recipe, the chosen option of every tensor, and the divergence that is expected of them together."""

    recipe: Recipe
    chosen: dict[str, Option]
    size: int                    # bytes of all tensors
    n_weights: int
    model: str
    n_chunks: int                # of the text, from its start, that the tensors were measured on
    n_ctx: int

    @property
    def kld(self) -> float:
        return sum(o.kld for o in self.chosen.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.size / self.n_weights

    def table(self) -> str:
        """The mix as text: a line for each type, and where the loss is."""
        lines = [f"{self.recipe.name}: {self.bits_per_weight:.3f} bits per weight, {self.size / 2**20:.2f} MiB, expected KLD {self.kld:.5f}",
                 f"  measured one by one over {self.n_chunks} chunks of {self.n_ctx} tokens:"]
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
             types: Sequence[str] | None = None, imatrix: Any = None, allow_requantize: bool = False, n_ctx: int = CHUNK,
             n_chunks: int = 0, n_threads: int = 0, progress: Progress | None = None) -> Allocation:
    """The mix with the least expected divergence whose file has at most `size` bytes, or whose tensors have `bits_per_weight`.

    types: what may be chosen. n_chunks: chunks of the text to measure on; 0: what sensitivity.effort finds worth its time.
    Progress counts measured tensors. PyggmlError when even the smallest types are too large.
    """
    if (size is None) == (bits_per_weight is None):
        raise PyggmlError("give a size or bits per weight, one of them")
    types = tuple(tensor_type(t).name for t in types or (*TYPES, *(IMATRIX_TYPES if imatrix is not None else ())))
    file = formats.open(source)
    job = plan(file, Options(recipe="Q8_0", imatrix=imatrix, pure=True, allow_requantize=allow_requantize))
    tensors = [c for c in job.choices if not c.copied or c.before.name == "Q8_0"]
    least = sum(_smallest(c, types) for c in tensors) + sum(job.nbytes(c) for c in job.choices if c not in tensors)
    wanted = bits_per_weight if bits_per_weight is not None else 8 * (size or 0) / job.n_weights
    if 8 * least > wanted * job.n_weights:          # known before anything is measured
        raise PyggmlError(f"{job.file.path}: its tensors take at least {least} bytes ({8 * least / job.n_weights:.2f} bits per weight) in "
                          f"{', '.join(types)}; ask for a larger size, or give an imatrix, which allows smaller types")
    model = Model(job.file)
    plenty = effort(sum(c.size for c in tensors), len(tensors), n_ctx, wanted, n_chunks)
    chunks = split(tokenize(model, text, n_ctx), n_ctx, plenty.n_chunks)
    yardstick = Yardstick(model, chunks, first=n_ctx // CONTEXT, n_threads=n_threads or None)
    options = measure(job, [c.name for c in tensors], yardstick, types, plenty, n_threads=n_threads, progress=progress)
    fixed = sum(job.nbytes(c) for c in job.choices if c.name not in options)
    if bits_per_weight is not None:
        budget = int(bits_per_weight * job.n_weights / 8)
        return _result(job, choose(options, budget - fixed), fixed, f"{bits_per_weight:g}bpw", len(chunks), n_ctx)
    assert size is not None
    budget, excess = size, 0
    for _ in range(4):                       # the header's length depends on the mix, a little
        budget -= excess
        found = _result(job, choose(options, budget - fixed), fixed, f"{size / 2**20:.0f}M", len(chunks), n_ctx)
        excess = file_size(job, found.recipe) - size
        if excess <= 0:
            break
    return found


def _smallest(c: Choice, types: Sequence[str]) -> int:
    """Bytes of a tensor in the smallest type that its rows divide into."""
    rows = [tensor_type(t) for t in types if c.shape[-1] % tensor_type(t).block == 0] or [tensor_type(recipes.LAST_RESORT)]
    return int(np.prod(c.shape[:-1], dtype=np.int64)) * min(row.row_bytes(c.shape[-1]) for row in rows)


def verify(found: Allocation, target: str | os.PathLike[str], text: str, *, n_threads: int = 0) -> Mean | None:
    """The divergence of the finished file `target` over chunks of the text that the mix was not chosen by; None when there are none."""
    model = Model.load(found.model)
    chunks = split(tokenize(model, text, found.n_ctx), found.n_ctx)[found.n_chunks:2 * found.n_chunks]
    if not len(chunks):
        return None
    made = formats.open(target)
    return mean(Yardstick(model, chunks, n_threads=n_threads or None).with_tensors(made.tensors).kld)


def file_size(job: Job, recipe: Recipe) -> int:
    """Bytes of the whole file that a recipe makes of a model."""
    made = plan(job.file, Options(recipe=recipe, imatrix=job.imatrix, allow_requantize=True))
    tensors = [NewTensor(c.name, c.after, c.shape, np.empty(0), made.nbytes(c)) for c in made.choices]
    head, alignment = header(made.kv, tensors)
    return len(head) + sum(-(-t.nbytes // alignment) * alignment for t in tensors)


def _result(job: Job, chosen: dict[str, Option], fixed: int, label: str, n_chunks: int, n_ctx: int) -> Allocation:
    weight: Counter[str] = Counter()
    for option in chosen.values():
        weight[option.type] += option.nbytes
    base = weight.most_common(1)[0][0]
    near = next((r for r in recipes.RECIPES if r.base == base), recipes.find("Q8_0"))
    recipe = Recipe(f"mix-{label}", near.id, base, tensors={name: o.type for name, o in chosen.items()})
    return Allocation(recipe, chosen, fixed + sum(o.nbytes for o in chosen.values()), job.n_weights, job.file.path, n_chunks, n_ctx)


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
