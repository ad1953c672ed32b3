"""What a plan needs of a backend: a store of weights, and a program that it fills with views and steps and then runs.

`pyggml/plan.py` decides which steps there are, in what order, and where values lie; a backend decides where memory is and how
steps run. backends/cpu.py and backends/cuda/ are the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from pyggml.graph import Tensor


class Input(NamedTuple):
    """A value that is given to each run: its largest shape, element type (int32 or float32), and the slot of its number of rows."""

    shape: tuple[int, ...]
    dtype: Any
    slot: int


class Program(Protocol):
    """Views and steps, and the memory under them. `slots` holds the run-time sizes, by Symbol.slot."""

    slots: np.ndarray
    aborted: np.ndarray                     # [0] is set to 1 from any thread: the run stops soon
    step_ns: np.ndarray | None              # nanoseconds of each step so far, where timing was asked for
    ahead: Any                              # what decodes without waiting for the host (backends/cuda/ahead.py), or None

    def memory(self, n_bytes: int) -> Any:
        """Memory for computed values; a slice of it, `[offset:]`, can be viewed."""

    def inputs(self, wanted: dict[str, Input]) -> dict[str, tuple[np.ndarray, Any]]:
        """For each input (the array that is filled before a run, what is viewed of it)."""

    def constant(self, array: np.ndarray) -> Any:
        """What is viewed of an array that never changes."""

    def view(self, array: Any, type: str, shape: Sequence[int], *, slot: int = -1) -> int:
        """A view of memory; where `slot` is not -1, axis 0 takes its length from slots[slot]."""

    def step(self, op: str, dst: int, src: Sequence[int], i: Sequence[int], f: Sequence[float], sync: bool) -> int:
        """A step over views; an absent source is -1."""

    def result(self, array: Any, type: str, shape: tuple[int, ...], slot: int) -> np.ndarray:
        """An array that holds these values after each run (as many rows as slots[slot] says)."""

    def finish(self, timing: bool) -> Any:
        """No view or step comes after this."""

    def run(self, pool: Any, alone: bool) -> bool:
        """Run the steps for the sizes in `slots`. False when it was aborted."""


class Weights(Protocol):
    """The weights of a model as a backend holds them, shared by its programs."""

    small: int                              # up to this many columns a matmul prepares its activations itself, beyond in a step of its own

    def act_format(self, weight: Tensor, fixed: bool) -> int:
        """A number that is the same for weights whose activations can be prepared together; fixed: one way for every batch."""

    def act_bytes(self, format: int, k: int, columns: int) -> int:
        """Bytes of activations prepared in a step of their own."""

    def keep_rows(self, name: str) -> None:
        """This weight's rows are also read one by one."""

    def program(self, n_slots: int) -> Program:
        """An empty program."""

    def view(self, program: Any, weight: Tensor, pack: bool) -> int:
        """Add a weight to a program; pack: a matrix product reads it."""
