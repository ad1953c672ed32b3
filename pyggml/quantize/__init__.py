"""Quantizing model files. `quantize_file` is the whole; `plan` shows what it would do; recipes.py holds what is chosen."""

from pyggml.quantize.imatrix import Imatrix
from pyggml.quantize.job import Job, plan
from pyggml.quantize.options import Options, Progress
from pyggml.quantize.pipeline import Result, quantize_file
from pyggml.quantize.recipes import RECIPES, Recipe
from pyggml.quantize.reproduce import Reproduction, reproduce

__all__ = ["RECIPES", "Imatrix", "Job", "Options", "Progress", "Recipe", "Reproduction", "Result", "plan", "quantize_file", "reproduce"]
