"""Quantizing model files. `quantize_file` is the whole; `plan` shows what it would do; recipes.py holds what is chosen."""

import sys
from types import ModuleType
from typing import Any

from pyggml.quantize.imatrix import Imatrix
from pyggml.quantize.options import Options, Progress
from pyggml.quantize.pipeline import Job, Result, plan, quantize_file
from pyggml.quantize.provenance import Reproduction, reproduce
from pyggml.quantize.recipes import RECIPES, Recipe

__all__ = ["RECIPES", "Imatrix", "Job", "Options", "Progress", "Recipe", "Reproduction", "Result", "plan", "quantize_file", "reproduce"]


class _Callable(ModuleType):
    """`pyggml.quantize(array, type)` encodes an array. Importing this package binds the same name in `pyggml`, so it answers to both."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from pyggml.quants import quantize

        return quantize(*args, **options)


sys.modules[__name__].__class__ = _Callable
