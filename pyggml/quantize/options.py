"""What can be asked of a quantization, with llama-quantize's names."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyggml.errors import Cancelled
from pyggml.quantize.recipes import Recipe

# Called with (done, total, what is being done) of some unit; returning False cancels the work.
Progress = Callable[[int, int, str], Any]

# Tokens of a chunk that a mix is measured on: over one of 64 tensors rank as well as over one of 128, over 32 they do not.
CHUNK = 64


def tell(progress: Progress | None, done: int, total: int, what: str, after: str = "") -> None:
    """Report progress; Cancelled when the callback returns False. `after` says what a cancelled run is good for."""
    if progress is not None and progress(done, total, what) is False:
        raise Cancelled(f"cancelled at {what or 'the end'}, {100 * done // max(1, total)}% done{after}")


@dataclass(frozen=True)
class Options:
    """
    recipe                a name or file_type number (recipes.py), or the path of a saved recipe (allocate.py)
    imatrix               an importance matrix: a path, or an Imatrix
    include_weights       use the imatrix only for tensors whose name contains one of these
    exclude_weights       ... for all but these
    output_tensor_type    type of output.weight
    token_embedding_type  type of the token table
    tensor_types          ((pattern, type), ...): the first regular expression found in a tensor's name decides its type
    leave_output_tensor   keep output.weight as it is
    pure                  every tensor gets the recipe's base type
    allow_requantize      the source may be quantized already
    keep_split            write as many parts as the source has
    prune_layers          layers to leave out
    override_kv           ((key, type, value), ...): metadata to change
    compat                ggml's own choices of scales, and none of pyggml's keys: the bytes that llama-quantize writes
    n_threads             0: one for each CPU
    """

    recipe: str | Recipe = "Q8_0"
    imatrix: Any = None
    include_weights: tuple[str, ...] = ()
    exclude_weights: tuple[str, ...] = ()
    output_tensor_type: str = ""
    token_embedding_type: str = ""
    tensor_types: tuple[tuple[str, str], ...] = ()
    leave_output_tensor: bool = False
    pure: bool = False
    allow_requantize: bool = False
    keep_split: bool = False
    prune_layers: tuple[int, ...] = ()
    override_kv: tuple[tuple[str, str, Any], ...] = ()
    compat: bool = False
    n_threads: int = 0

    @property
    def recipe_name(self) -> str:
        return self.recipe.name if isinstance(self.recipe, Recipe) else os.path.basename(str(self.recipe))
