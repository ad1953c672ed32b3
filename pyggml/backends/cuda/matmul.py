"""Products with weight matrices: which kernel a step takes, and what it needs.

Up to eight columns go through matvec.py, which reads the weights once at the memory's speed; more columns through the tensor cores
(gemm.py). Matrices of F32 (a router, a small head) keep their precision: always matvec, eight columns at a time.
"""

from __future__ import annotations

import math
from typing import Any

from pyggml.backends.cuda.act import HALF, act_bytes
from pyggml.backends.cuda.base import DeviceStep, DeviceView, Launch, Needs, Scratch
from pyggml.backends.cuda.factors import factor
from pyggml.backends.cuda.layout import FLOATS
from pyggml.backends.cuda.matvec import COLUMNS, matvec
from pyggml.backends.cuda.qkv import qkv
from pyggml.backends.cuda.tails import COUNTERS, HANDED, NORMED


def by_columns(type_name: str, columns: int) -> bool:
    """Does a product of this many columns go through matvec.py?"""
    return columns <= COLUMNS or type_name == "F32"


def columns_of(step: DeviceStep) -> int:
    x = step.src[1]
    assert x is not None
    return math.prod(x.shape[:-1])


def _weights(step: DeviceStep, at: int) -> Any:
    view = step.src[at]
    assert view is not None and view.weight is not None
    return view.weight


def _x(step: DeviceStep) -> DeviceView:
    assert step.src[1] is not None
    return step.src[1]


def mul_mat(stream: Any, slots: Any, step: DeviceStep, scratch: Scratch) -> None:
    if step.beside:
        qkv(step, slots, stream, scratch)
        return
    _, _, norm, bias, residual = step.src
    w, x = _weights(step, 0), _x(step)
    rest: dict[str, Any] = dict(act_id=step.i[0], eps=step.f[0], scale=step.f[1], softcap=step.f[2], bias=bias, residual=residual)
    if by_columns(w.type, columns_of(step)):
        matvec(w, None, x, norm, step.dst, slots, stream, scratch, hands_on=step.hands_on, **rest)
    else:
        from pyggml.backends.cuda.gemm import gemm

        gemm(w, x, norm, step.dst, slots, stream, scratch, **rest)


def glu_mat(stream: Any, slots: Any, step: DeviceStep, scratch: Scratch) -> None:
    _, _, norm, _, bias, bias_up = step.src
    w, up, x = _weights(step, 0), _weights(step, 3), _x(step)
    if _by_matvec(step):
        matvec(w, up, x, norm, step.dst, slots, stream, scratch, act_id=step.i[0], eps=step.f[0], bias=bias, bias_up=bias_up, glu=step.i[3],
               hands_on=step.hands_on)
    else:
        from pyggml.backends.cuda.gemm import gemm

        gemm(w, x, norm, step.dst, slots, stream, scratch, act_id=step.i[0], eps=step.f[0], bias=bias)
        gemm(up, x, norm, step.dst, slots, stream, scratch, act_id=step.i[0], eps=step.f[0], bias=bias_up, gate=step.dst, glu=step.i[3])


def _by_matvec(step: DeviceStep) -> bool:
    """Is this gated unit one of few columns, of matrices that read the same activations?"""
    w, up = step.src[0], step.src[3]
    assert w is not None and up is not None
    return by_columns(w.type, columns_of(step)) and (w.type in FLOATS) == (up.type in FLOATS)


def form_of(step: DeviceStep) -> int:
    """How a product's launch reads its activations: HALF, INT8 or FLOAT."""
    w = step.src[0]
    assert w is not None
    if not (_by_matvec(step) if step.op == "glu_mat" else by_columns(w.type, columns_of(step))):
        return HALF
    return factor(w.type).act


def can_hand_on(step: DeviceStep, normed: bool) -> bool:
    """Can this step leave what it makes prepared for the next? A gated unit does group by group, a product as a whole, with the norm."""
    m, columns = step.dst.shape[-1], columns_of(step)
    if step.op == "glu_mat":
        return not normed and _by_matvec(step) and columns <= COLUMNS and m % 32 == 0 and m <= HANDED * COUNTERS
    return normed and not step.beside and form_of(step) != HALF and columns * m <= NORMED and m % 8 == 0


def _needs(step: DeviceStep, cells: int) -> tuple[int, int]:
    """Room for x in the form that the step will ask for."""
    assert step.src[1] is not None
    return act_bytes(form_of(step), step.src[1].shape[-1], columns_of(step)), 0


LAUNCHES: dict[str, Launch] = {"mul_mat": mul_mat, "glu_mat": glu_mat}
NEEDS: dict[str, Needs] = {"mul_mat": _needs, "glu_mat": _needs}
