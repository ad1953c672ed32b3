"""What the planner hands to the kernels: views of device memory, steps over them, and the scratch that steps share.

Steps are those of native/engine.h ("what the steps mean"), with the same sources and numbers, except that activations are not
prepared by a step of their own: `i[1]` (format) and `i[2]` (prepared) are 0, and `i[0]` (act_id) names the prepared form of x.
Steps of one plan with the same act_id read the same activations, normed and quantized alike, and such steps stand side by
side: a launch that finds its act_id in `scratch.prepared` may use what `scratch.act` holds instead of preparing it again.
merge.py lets one launch do what several steps, or a step and the quantizing of what it makes, would take several for.

Three steps are the device's own, for decoding without the host (B rows of logits, B tokens a step):
    argmax      dst ids i32 (B)            src logits (B, V)                           the lowest id among equals
    top_k       dst ids i32 (B, k)         src logits (B, V), values f32 (B, k) written   largest first, lower id among equals
    advance     dst tokens i32 (B)         src ids i32 (B), pos, cell i32 (B), history i32 (N, B), count i32 (1)
                history[count] = ids; tokens = ids; pos, cell, count each one more

A family module exports `LAUNCHES`, keyed by step, and `NEEDS`, for the steps that use scratch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyggml.backends.cuda.layout import RelaidWeight


@dataclass(frozen=True)
class DeviceView:
    """A value in device memory: floats or integers one after another, contiguous in `shape` (numpy order).

    array     1-D device array: float32, int32, float16, or uint8 for block types (caches of Q8_0 are rows of ggml blocks)
    shape     sizes; where the value's first axis is symbolic, its largest size
    slot      index into the run's `slots` of the size that replaces axis 0, or -1
    weight    the re-laid form of a weight that a matrix product or get_rows reads (array is then its memory), else None
    """

    array: Any
    type: str
    shape: tuple[int, ...]
    slot: int = -1
    weight: RelaidWeight | None = None


@dataclass(frozen=True)
class HandOn:
    """How a launch leaves its dst for the product that reads it next too: as act.py would prepare it under this act_id, in this form
    (INT8 or FLOAT), normed where there is a norm."""

    act_id: int
    kind: int
    norm: DeviceView | None = None
    eps: float = 0


@dataclass(frozen=True)
class Settle:
    """What the launch that makes queries, keys and values does with every head of them: what `step`, an attention_step, does before it
    attends (cachestore.py), and before it the two rms_norm steps of the queries' and the keys' heads, if there are any."""

    step: DeviceStep
    norms: tuple[DeviceStep, ...] = ()


@dataclass(frozen=True)
class DeviceStep:
    """One step: `op` writes `dst` (and what engine.h says) from `src`, whose absent members are None.

    number     its place in the plan
    beside     steps of the same kind that its launch does too
    hands_on   how the launch leaves dst in `scratch.handed` too
    settles    of three products beside one another: they are a token's queries, keys and values
    settled    of an attention_step: the launch before has settled them
    """

    op: str
    dst: DeviceView
    src: tuple[DeviceView | None, ...]
    i: tuple[int, ...] = ()
    f: tuple[float, ...] = ()
    number: int = -1
    beside: tuple[DeviceStep, ...] = ()
    hands_on: HandOn | None = None
    settles: Settle | None = None
    settled: bool = False


@dataclass
class Scratch:
    """Device memory that the steps of a plan share, each only while it runs, except for what one leaves for the next.

    act          prepared activations (uint8), which stay until the next step with another act_id
    handed       activations that a step left prepared for the next (uint8)
    handing      where a step leaves them, which may read `handed` meanwhile (uint8)
    roped        queries that the launch of q/k/v left roped for attention (float32)
    temp         anything else (uint8); garbage between steps
    cells        no token of this run sees a cell from this number on: the bucket that sizes the grid of attention
    prepared     (act_id, kind) of what `act` holds; the launch that fills it sets this
    handed_form  (act_id, kind) of what `handed` holds
    """

    act: Any
    handed: Any
    handing: Any
    roped: Any
    temp: Any
    cells: int
    prepared: tuple[int, int] = (-1, -1)
    handed_form: tuple[int, int] = (-1, -1)

    def begin(self) -> None:
        """A run begins, with other activations."""
        self.prepared = self.handed_form = (-1, -1)

    def hand_on(self, how: HandOn | None) -> None:
        """What was enqueued last left its dst in `handing`, if it hands on at all."""
        if how is not None:
            self.handed, self.handing, self.handed_form = self.handing, self.handed, (how.act_id, how.kind)


# enqueues the step's kernels on a stream; reads run-time sizes from `slots` (device int32, SYMBOLS of shapes.py) only on the device
Launch = Callable[[Any, Any, DeviceStep, Scratch], None]
# bytes of (act, temp) that a step wants, for views of the largest sizes and this number of cells
Needs = Callable[[DeviceStep, int], tuple[int, int]]
