"""What a model is: one file per architecture, found by its name in `general.architecture`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from pyggml.errors import ModelError
from pyggml.formats import show

# same graph, other name: their differences are found in the file
ALIASES: dict[str, str] = {"mistral": "llama", "qwen3": "qwen2", "granitemoe": "granite"}
_SHARED = {"blocks", "config"}


def names() -> list[str]:
    """Every architecture name that can run; dashes in it are underscores in its file's."""
    return sorted({m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__)} - _SHARED | set(ALIASES))


def find(name: str, path: Any) -> Callable[..., Any]:
    """The graph function of an architecture; ModelError names what is known."""
    if name not in names():
        raise ModelError(f'{path}: the architecture "{show.text(name)}" is not known; pyggml runs {", ".join(names())}')
    return importlib.import_module(f"pyggml.arch.{ALIASES.get(name, name).replace('-', '_')}").graph
