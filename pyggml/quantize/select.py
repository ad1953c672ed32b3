"""Which type each tensor of a model gets: a recipe (recipes.py), the wishes of the caller, and what the shapes allow.

`select` looks only at names, shapes and metadata, so a plan for a 400 GB model costs milliseconds and can be shown before
anything is written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pyggml.errors import PyggmlError
from pyggml.formats import show
from pyggml.quantize import recipes
from pyggml.quantize.recipes import Recipe, Site
from pyggml.types import TensorType, tensor_type

_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class Wishes:
    """What the caller wants beside the recipe. Types are names; patterns are regular expressions searched in tensor names."""

    output_tensor_type: str = ""
    token_embedding_type: str = ""
    tensor_types: tuple[tuple[str, str], ...] = ()
    leave_output_tensor: bool = False
    pure: bool = False


@dataclass(frozen=True)
class Choice:
    """One tensor: what it is and what it becomes. `fallback_from` is the type that its rows do not divide into."""

    name: str
    shape: tuple[int, ...]
    before: Any                   # TensorType, or a type that this version cannot decode
    after: Any
    needs_imatrix: bool = False
    fallback_from: str = ""

    @property
    def copied(self) -> bool:
        return self.before.id == self.after.id

    @property
    def size(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return n


def layer_of(name: str) -> int:
    """The layer of a tensor, -1 for those outside the layers."""
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def order(names: Iterable[str]) -> list[str]:
    """The order llama.cpp writes tensors in: those outside the layers, then layer by layer, each by name."""
    return sorted(names, key=lambda name: (layer_of(name), name.encode("utf-8", "surrogateescape")))


def _number(kv: Mapping[str, Any], key: str, default: int = 0) -> int:
    """A metadata number; of a list with one for each layer, the first."""
    value = kv.get(key, default)
    if not isinstance(value, (str, bytes)) and hasattr(value, "__len__"):
        value = value[0] if len(value) else default
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise PyggmlError(f'key "{show.text(key)}" is {show.quoted(value)}; it must be a whole number') from None


def site(kv: Mapping[str, Any], path: str = "", *, imatrix: bool) -> tuple[Site, int]:
    """What rules may ask about a model, and its number of layers. path: of its file, for errors."""
    arch = str(kv.get("general.architecture", ""))
    try:
        heads = _number(kv, f"{arch}.attention.head_count")
        kv_heads = _number(kv, f"{arch}.attention.head_count_kv", heads)
        facts = Site(arch, heads // kv_heads if kv_heads else 0, _number(kv, f"{arch}.expert_count"), imatrix)
        return facts, _number(kv, f"{arch}.block_count")
    except PyggmlError as error:
        raise PyggmlError(f"{path}: {error}" if path else str(error)) from None


def kept(name: str, shape: Sequence[int], arch: str, wishes: Wishes) -> bool:
    """True for a tensor that quantization leaves as it is."""
    return (sum(d > 1 for d in shape[:-1]) == 0 or not name.endswith("weight") or name in recipes.KEEP_WHOLE
            or wishes.leave_output_tensor and name == recipes.OUTPUT
            or any(part in name for part in (*recipes.KEEP, *recipes.KEEP_OF_ARCH.get(arch, ()))))


class _Places:
    """The place of a tensor among those of its role, counted in file order, or read from the name where experts share a layer."""

    def __init__(self, names: Sequence[str], n_layers: int, n_expert: int) -> None:
        self.n_layers, self.n_expert = n_layers, n_expert
        self.n_values = sum(recipes.role(name) == "attn_v" for name in names)
        self.seen: Counter[str] = Counter()

    def next(self, name: str, role: str, recipe: Recipe) -> tuple[int, int]:
        i = self.seen[role]
        self.seen[role] += 1
        if role == "attn_v":
            return i, self.n_values
        by_name = self.n_expert > 1 and role.startswith("ffn_") and not recipe.counts_tensors
        return layer_of(name) if by_name else i, self.n_layers


def select(tensors: Mapping[str, Any], kv: Mapping[str, Any], recipe: Recipe, wishes: Wishes | None = None, *,
           imatrix: bool = False, path: str = "") -> list[Choice]:
    """The type of every tensor, in the order llama.cpp would write them.

    tensors: name -> anything with `type` and `shape` (numpy order). path: of the file, for errors. PyggmlError for an unknown type, a bad
    pattern, or a key that must be a number and is not.
    """
    wishes = wishes or Wishes()
    names = order(tensors)
    facts, n_layers = site(kv, path, imatrix=imatrix)
    places = _Places(names, n_layers, facts.n_expert)
    tied = recipes.OUTPUT not in tensors
    patterns = [(_pattern(p), tensor_type(t)) for p, t in wishes.tensor_types]
    wanted = {"output": wishes.output_tensor_type and tensor_type(wishes.output_tensor_type),
              "embedding": wishes.token_embedding_type and tensor_type(wishes.token_embedding_type)}
    choices = []
    for name in names:
        t = tensors[name]
        shape, role = tuple(t.shape), recipes.role(name)
        choice = Choice(name, shape, t.type, t.type)
        if not recipe.base or kept(name, shape, facts.arch, wishes):
            choices.append(choice)
            continue
        base = tensor_type(recipe.base)
        manual = next((kind for pattern, kind in patterns if pattern.search(name)), None)
        named = manual is not None and name == recipes.EMBEDDINGS[1]
        if wanted.get(role) and not named:
            choice = replace(choice, after=wanted[role])
        elif not base.quantized:
            choice = replace(choice, after=base)
        else:
            kind = manual
            if kind is None:
                kind = base if wishes.pure else tensor_type(_by_recipe(name, shape, role, recipe, facts, places, tied, wishes))
            choice = replace(choice, after=kind, fallback_from="")
            fitting = fallback(kind, shape[-1])
            if fitting is not kind:
                choice = replace(choice, after=fitting, fallback_from=kind.name)
        coarse = choice.after.name in recipes.NEEDS_IMATRIX or recipe.needs_imatrix and choice.after.name == recipe.base
        choices.append(replace(choice, needs_imatrix=coarse and role not in ("output", "embedding")))
    return choices


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise PyggmlError(f"--tensor-type: {text!r} is not a regular expression ({error}); write it like attn_v=q6_k") from None


def _by_recipe(name: str, shape: tuple[int, ...], role: str, recipe: Recipe, facts: Site, places: _Places, tied: bool,
               wishes: Wishes) -> str:
    """The recipe's type for a tensor, before its shape is considered."""
    base = recipe.base
    if name in recipe.tensors:
        return recipe.tensors[name]
    if any(part in name for part in recipes.AT_LEAST_Q8_0.get(facts.arch, ())):
        return "Q8_0"
    if role == "output" or tied and role == "embedding":
        if wishes.output_tensor_type:
            return wishes.output_tensor_type
        divides = facts.arch != "falcon" and shape[-1] % tensor_type(base).block == 0
        return recipe.output if divides else "Q8_0"
    if role == "embedding":
        return recipe.embedding or base
    stacked = len(shape) > 2 and shape[0] > 1 and role in recipes.EXPERT_ROLES.get(facts.arch, (role,))
    i, n = places.next(name, role, recipe)
    where = replace(facts, i=i, n=n, stacked=stacked)
    kind = recipes.choose(recipe.rule(role), where, base)
    shared = recipes.SHARED_VALUES.get(facts.arch) == places.n_layers and (facts.arch != "llama" or facts.gqa > 1)
    return recipes.SHARED_VALUES_GET.get(kind, kind) if role == "attn_v" and shared and recipe.raises_values else kind


def fallback(kind: TensorType, n: int) -> TensorType:
    """`kind`, or what stands in for it where rows of `n` weights do not divide into its blocks."""
    if n % kind.block == 0:
        return kind
    other = tensor_type(recipes.FALLBACK.get(kind.name, recipes.LAST_RESORT))
    return other if n % other.block == 0 else tensor_type(recipes.LAST_RESORT)
