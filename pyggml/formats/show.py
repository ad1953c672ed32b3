"""Metadata values and sizes as text for people and as JSON for programs. Everything from a file is escaped; JSON is ASCII."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyggml.formats.tensorfile import Tensor
from pyggml.formats.values import Typed, printable

SHOWN_ITEMS, SHOWN_TEXT = 8, 160
SHOWN_JSON = 1 << 20            # characters of a text in JSON
WIDEST = 64                     # columns are aligned up to this width
SHOWN_LINES = 20                # of a list of warnings


def amount(n: float, unit: str = "B") -> str:
    """1234567 -> "1.23 MB"."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(n) < 999.5 or prefix == "T":
            break
        n /= 1000
    return f"{n:.3g} {prefix}{unit}" if n < 100 else f"{n:.0f} {prefix}{unit}"


def text(value: Any, items: int = SHOWN_ITEMS, length: int = SHOWN_TEXT) -> str:
    """A metadata value on one line; arrays after `items` elements and text after `length` characters end in how much is left out."""
    if isinstance(value, Typed):
        value = value.value
    kind = type(value)
    if kind is str:
        return f"({len(value)} blanks)" if len(value) > 1 and not value.strip(" ") else _shorten(value, length)
    if kind is int:
        return str(value)
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (float, np.floating)):
        return f"{value:.7g}"
    if not hasattr(value, "__len__"):
        return str(value)
    elements = (value[i] for i in range(min(items, len(value))))
    shown = [f'"{_shorten(v, length)}"' if isinstance(v, str) else text(v, items, length) for v in elements]
    left = len(value) - len(shown)
    return f"[{', '.join(shown)}{f', ... {left} more' if left else ''}]"


def quoted(value: Any) -> str:
    """A metadata value in a sentence: text in quotes; long text and arrays are cut short."""
    short = not hasattr(value, "__len__") or isinstance(value, str) and len(value) <= SHOWN_TEXT
    return repr(value) if short else f'"{text(value)}"' if isinstance(value, str) else text(value, length=SHOWN_TEXT // SHOWN_ITEMS)


def _shorten(value: str, length: int) -> str:
    if len(value) <= length:
        return printable(value)
    return f"{printable(value[:length])}... ({len(value)} characters)"


def json_value(value: Any, items: int | None = None) -> Any:
    """A metadata value for JSON: at most `items` elements of an array, and then texts not longer than SHOWN_JSON; numbers that JSON
    lacks (NaN, infinities) become text."""
    if isinstance(value, Typed):
        value = value.value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str) and items is not None:
        return value[:SHOWN_JSON]
    if isinstance(value, str | bool | int | float):
        return value
    part = value[:items] if items is not None else value
    if isinstance(part, np.ndarray):
        part = part.tolist()
    return [json_value(v, items) for v in part]


def json_text(document: Any) -> str:
    return json.dumps(document, indent=2, allow_nan=False)


def shape(t: Tensor) -> str:
    """Rows before columns, as numpy has them."""
    return " x ".join(map(str, t.shape)) or "scalar"


def json_tensor(t: Tensor) -> dict[str, Any]:
    return {"name": t.name, "type": t.type.name, "shape": list(t.shape), "offset": t.offset, "bytes": t.nbytes}


def columns(rows: Sequence[tuple[str, ...]], right: frozenset[int] = frozenset()) -> str:
    """Rows as aligned columns, two blanks apart; the columns in `right` are aligned to the right."""
    widths = [min(WIDEST, max(map(len, column))) for column in zip(*rows, strict=True)]
    line = "  ".join(f"{{:{'>' if i in right else '<'}{w}}}" for i, w in enumerate(widths))
    return "\n".join(line.format(*row).rstrip() for row in rows)


def some(lines: Sequence[str], what: str, where: str) -> list[str]:
    """The first SHOWN_LINES lines, and how many more there are: `what` they are, `where` to see them."""
    left = len(lines) - SHOWN_LINES
    return [*lines[:SHOWN_LINES], f"{left} more {what}; {where}"] if left > 0 else list(lines)
