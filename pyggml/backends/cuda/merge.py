"""Fewer launches: steps that one launch can do, of a plan's steps in order.

Each launch costs more than a small kernel computes, so that queries, keys and values are made by one, and what a step makes for the next
product to read as INT8 is quantized by the blocks that made it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pyggml.backends.cuda import attention, matmul
from pyggml.backends.cuda.act import INT8
from pyggml.backends.cuda.base import DeviceStep
from pyggml.backends.cuda.factors import factor
from pyggml.backends.cuda.matmul import by_columns, columns_of

# whether a step can leave its result quantized
CAN_HAND_ON: dict[str, Callable[[DeviceStep], bool]] = {
    "glu_mat": matmul.can_hand_on, "attention": attention.can_hand_on, "attention_step": attention.can_hand_on,
}


def merged(steps: Sequence[DeviceStep]) -> list[DeviceStep]:
    """The same steps, some of them inside of others."""
    out: list[DeviceStep] = []
    at = 0
    while at < len(steps):
        three = steps[at:at + 3]
        if len(three) == 3 and _one_product(three):
            out.append(replace(three[0], beside=tuple(three[1:])))
            at += 3
        else:
            out.append(steps[at])
            at += 1
    return [_handing(step, reader) for step, reader in zip(out, [*out[1:], None], strict=True)]


def _one_product(steps: Sequence[DeviceStep]) -> bool:
    """Are these products of the same few columns, prepared alike, with nothing but biases behind them?"""
    first = steps[0]
    if any(s.op != "mul_mat" or s.src[1] is not first.src[1] or s.src[2] is not first.src[2] or s.src[4] is not None or s.f[1] != 1 for s in steps):
        return False
    types = [s.src[0].type for s in steps if s.src[0] is not None]
    return all(by_columns(t, columns_of(first)) and factor(t).act == factor(types[0]).act for t in types)


def _handing(step: DeviceStep, reader: DeviceStep | None) -> DeviceStep:
    """The step as it is, or handing on what it makes to the product that reads it next."""
    if reader is None or reader.op != "mul_mat" or reader.src[1] is not step.dst or reader.src[2] is not None or step.op not in CAN_HAND_ON:
        return step
    assert reader.src[0] is not None
    as_int8 = by_columns(reader.src[0].type, columns_of(reader)) and factor(reader.src[0].type).act == INT8
    return replace(step, hands_on=reader.i[0]) if as_int8 and CAN_HAND_ON[step.op](step) else step
