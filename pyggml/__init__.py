"""Read, inspect, rewrite, quantize and run GGUF models.

The names below are loaded when they are first used, so that importing pyggml costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Llama": "pyggml.llama", "LogitsProcessorList": "pyggml.arguments", "StoppingCriteriaList": "pyggml.arguments",
    "Model": "pyggml.model", "Context": "pyggml.context",
    "PromptLookup": "pyggml.speculate",
    "Sampler": "pyggml.sampling", "SamplingParams": "pyggml.sampling",
    "open": "pyggml.formats", "TensorFile": "pyggml.formats",
    "PyggmlError": "pyggml.errors",
}

_MODULES = ("formats", "quants")      # gguf.quants.quantize is pyggml.quants.quantize

__all__ = [*_HOME, "__version__"]     # noqa: PLE0604

if TYPE_CHECKING:
    from pyggml.arguments import LogitsProcessorList as LogitsProcessorList
    from pyggml.arguments import StoppingCriteriaList as StoppingCriteriaList
    from pyggml.context import Context as Context
    from pyggml.errors import PyggmlError as PyggmlError
    from pyggml.formats import TensorFile as TensorFile
    from pyggml.formats import open as open
    from pyggml.llama import Llama as Llama
    from pyggml.model import Model as Model
    from pyggml.sampling import Sampler as Sampler
    from pyggml.sampling import SamplingParams as SamplingParams
    from pyggml.speculate import PromptLookup as PromptLookup


def __getattr__(name: str) -> Any:
    import importlib

    home = _HOME.get(name)
    if name in _MODULES:
        return importlib.import_module(f"pyggml.{name}")
    if home is None:
        raise AttributeError(f"module 'pyggml' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
