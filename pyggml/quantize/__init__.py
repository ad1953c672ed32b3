"""Quantizing model files. `quantize_file` is the whole; `plan` shows what it would do; recipes.py holds what is chosen."""

from pyggml.quantize.imatrix import Imatrix
from pyggml.quantize.options import Options, Progress
from pyggml.quantize.pipeline import Job, Result, plan, quantize_file
from pyggml.quantize.provenance import Reproduction, reproduce
from pyggml.quantize.recipes import RECIPES, Recipe

__all__ = ["RECIPES", "Imatrix", "Job", "Options", "Progress", "Recipe", "Reproduction", "Result", "plan", "quantize_file", "reproduce"]
