"""Fewer launches: steps that one launch can do, of a plan's steps in order.

Each launch costs more than a small kernel computes. So queries, keys and values are made by one, which also settles their heads (qkv.py);
and what a step makes for the next product is prepared, and normed, by the blocks that made it (tails.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pyggml.backends.cuda import attention, matmul, moe, norm
from pyggml.backends.cuda.act import FLOAT, HALF
from pyggml.backends.cuda.base import DeviceStep, DeviceView, HandOn, Settle
from pyggml.backends.cuda.matmul import form_of
from pyggml.backends.cuda.tails import COUNTERS

BETWEEN = 4         # steps behind q/k/v among which their attention is: norms of heads, and rows that are wanted
# whether a step can leave its result prepared, and normed
CAN_HAND_ON: dict[str, Callable[[DeviceStep, bool], bool]] = {
    "mul_mat": matmul.can_hand_on, "glu_mat": matmul.can_hand_on, "attention": attention.can_hand_on, "attention_step": attention.can_hand_on,
    "rms_norm": norm.can_hand_on, "glu_mat_id": moe.can_hand_on, "moe_sum": moe.can_hand_on,
}
# how a product reads its activations
FORMS: dict[str, Callable[[DeviceStep], int]] = {
    "mul_mat": matmul.form_of, "glu_mat": matmul.form_of, "mul_mat_id": moe.form_of, "glu_mat_id": moe.form_of,
}


def merged(steps: Sequence[DeviceStep], wanted: Sequence[Any] = ()) -> list[DeviceStep]:
    """The same steps, some of them inside of others; `wanted` are the arrays that a run gives out."""
    out, rest = [], list(steps)
    while rest:
        step = rest.pop(0)
        if len(rest) > 1 and _one_product((step, *rest[:2])):
            step = replace(step, beside=tuple(rest[:2]))
            del rest[:2]
            if (settle := _settle(step, rest[:BETWEEN], wanted)) is not None:
                step = replace(step, settles=settle)
                rest = [replace(s, settled=True) if s is settle.step else s for s in rest if all(s is not norm for norm in settle.norms)]
        out.append(step)
    return [_handing(step, reader) for step, reader in zip(out, [*out[1:], None], strict=True)]


def _one_product(steps: Sequence[DeviceStep]) -> bool:
    """Are these products of the same few columns, prepared alike, with nothing but biases behind them?"""
    first = steps[0]
    if any(s.op != "mul_mat" or s.src[1] is not first.src[1] or s.src[2] is not first.src[2] for s in steps):
        return False
    if any(s.src[4] is not None or s.f[1:] != (1, 0) for s in steps):
        return False
    return form_of(first) != HALF and all(form_of(s) == form_of(first) for s in steps)


def _settle(three: DeviceStep, following: Sequence[DeviceStep], wanted: Sequence[Any]) -> Settle | None:
    """How the launch of three products settles their heads, if they are what an attention_step close behind attends with."""
    step = next((s for s in following if s.op == "attention_step"), None)
    if step is None:
        return None
    (heads, dk), (kv_heads, _, dv) = step.src[0].shape[1:], step.src[2].shape       # type: ignore[union-attr]
    made = [step.src[n] for n in (0, 5, 6)]
    norms = [s for view in made[:2] for s in following if _norm_of(view, s)]
    if len(norms) == 2:
        made[:2] = (s.src[0] for s in norms)
    if any(_address(s.dst.array) == _address(array) for s in norms for array in wanted):
        return None
    if not all(map(_same, (s.dst for s in (three, *three.beside)), made)) or heads + 2 * kv_heads > COUNTERS or dk % 8 or dv % 8:
        return None
    return Settle(step, tuple(norms))       # type: ignore[arg-type]


def _norm_of(heads: DeviceView | None, step: DeviceStep) -> bool:
    """Is this the norm, with weights, of each of these heads?"""
    alone = step.op == "rms_norm" and step.src[1] is not None and step.src[2] is None
    return alone and heads is not None and step.dst.shape == heads.shape and _same(step.dst, heads)


def _same(a: DeviceView | None, b: DeviceView | None) -> bool:
    """Are these the same numbers, whatever their shapes? Where memory is only counted, any two may be."""
    return a is not None and b is not None and _address(a.array) == _address(b.array)


def _address(array: Any) -> int:
    if array is None:
        return 0
    array = getattr(array, "_ary", array)           # of the simulator's arrays
    return array.ctypes.data if hasattr(array, "ctypes") else array.device_ctypes_pointer.value


def _handing(step: DeviceStep, reader: DeviceStep | None) -> DeviceStep:
    """The step as it is, or handing on what it makes to the product that reads it next."""
    if reader is None or reader.op not in FORMS or reader.src[1] is not step.dst or step.op not in CAN_HAND_ON:
        return step
    form, after = FORMS[reader.op](reader), reader.src[2]
    if form == HALF or (form == FLOAT and after is None) or not CAN_HAND_ON[step.op](step, after is not None):
        return step
    return replace(step, hands_on=HandOn(reader.i[0], form, after, reader.f[0]))
