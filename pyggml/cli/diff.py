"""`pyggml diff A B`: what differs between two models. Exit status 1 when something does, as diff(1) has it."""

from __future__ import annotations

import argparse
import math
from typing import Any

from pyggml import formats
from pyggml.formats import show
from pyggml.formats.diff import KeyChange, TensorChange, metadata, tensors
from pyggml.formats.values import Typed, printable

HELP = "compare metadata and weights of two models"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", help="a GGUF file, any part of a split model, or an address")
    parser.add_argument("b", help="the model to compare with it")
    parser.add_argument("--metadata", action="store_true", help="compare metadata and the list of tensors only, not the weights")
    parser.add_argument("-n", type=int, default=0, metavar="N", help="show the N most different tensors (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    a, b = formats.open(args.a, use_mmap=False), formats.open(args.b, use_mmap=False)
    keys = metadata(a, b)
    changes = listing(a, b) if args.metadata else tensors(a, b)
    if args.json:
        print(show.json_text({"a": args.a, "b": args.b, "metadata": [json_key(k) for k in keys], "tensors": [json_change(c) for c in changes]}))
    else:
        print_text(keys, changes, len(a.tensors), args)
    return int(bool(keys or changes))


def listing(a: formats.TensorFile, b: formats.TensorFile) -> list[TensorChange]:
    """Tensors that differ in presence, type or shape."""
    names = [*a.tensors, *(name for name in b.tensors if name not in a.tensors)]
    pairs = ((name, a.tensors.get(name), b.tensors.get(name)) for name in names)
    return [TensorChange(name, x, y) for name, x, y in pairs if x is None or y is None or (x.type, x.shape) != (y.type, y.shape)]


def print_text(keys: list[KeyChange], changes: list[TensorChange], total: int, args: argparse.Namespace) -> None:
    for key in keys:
        for sign, value in (("-", key.a), ("+", key.b)):
            if value is not None:
                print(f"{sign} {printable(key.key)} = {describe(value)}")
    lists: list[TensorChange] = []
    measured: list[TensorChange] = []
    for c in changes:
        (lists if c.a is None or c.b is None or c.a.shape != c.b.shape else measured).append(c)
    for c in lists:
        for sign, t in (("-", c.a), ("+", c.b)):
            if t is not None:
                print(f"{sign} tensor {printable(c.name)}: {t.type} {show.shape(t)}")
    if measured:
        rows: list[tuple[str, ...]] = [("tensor", "types", "rmse", "relative", "cosine", "max error")]
        for c in measured[:args.n or None]:
            assert c.a is not None and c.b is not None
            types = str(c.a.type) if c.a.type == c.b.type else f"{c.a.type} -> {c.b.type}"
            numbers = [f"{c.rmse:.4g}", f"{100 * c.relative:.3g}%", f"{c.cosine:.6f}", f"{c.max_error:.4g}"]
            rows.append((printable(c.name), types, *(["-"] * 4 if math.isnan(c.rmse) else numbers)))
        print(("\n" if keys or lists else "") + show.columns(rows, frozenset((2, 3, 4, 5))))
    if not keys and not changes:
        print("no difference" + (" in metadata and tensor list" if args.metadata else ""))
    else:
        differ = f"{len(keys)} key{'s' * (len(keys) != 1)} and {len(changes)} tensor{'s' * (len(changes) != 1)} differ"
        print(f"\n{differ}; {total - len([c for c in changes if c.a])} tensors are equal")


def describe(value: Typed) -> str:
    return f"({value.type}{f', {len(value.value)} elements' if value.type.endswith('[]') else ''}) {show.text(value)}"


def json_key(change: KeyChange) -> dict[str, Any]:
    def side(value: Typed | None) -> Any:
        return value and {"type": value.type, "value": show.json_value(value, show.SHOWN_ITEMS)}
    return {"key": change.key, "a": side(change.a), "b": side(change.b)}


def json_change(c: TensorChange) -> dict[str, Any]:
    numbers = {name: show.json_value(getattr(c, name)) for name in ("rmse", "relative", "cosine", "max_error")}
    return {"name": c.name, "a": c.a and show.json_tensor(c.a), "b": c.b and show.json_tensor(c.b),
            **(numbers if not math.isnan(c.rmse) else {})}
