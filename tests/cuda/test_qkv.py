"""Queries, keys and values made by one launch, which may also rope and store them, against numpy."""

import os

import numpy as np
import pytest
from device_case import Numbers, cache_numbers, cache_view, eight_bits, nmse, run, view, weight

from pyggml.backends.cuda.base import DeviceStep, Settle
from pyggml.ops import OPS
from pyggml.ops.rope import MODES

EPS, TOKENS, HEADS, KV, D, CELLS = 1e-5, 2, 4, 2, 32, 12
rng = np.random.default_rng(10)
FORMS = [                                               # types of the matrices and of the cache, mode, rotated numbers, norms, biases
    (("Q4_0", "Q4_0", "Q6_K"), ("F16", "Q8_0"), "norm", 32, False, True),
    (("Q8_0", "Q8_0", "Q8_0"), ("Q4_0", "BF16"), "neox", 16, True, False),
    (("F16", "F16", "F32"), ("F32", "F16"), "neox", 32, False, False),
]


def numbers(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def product(matrices, outs, x, norm, biases) -> list[DeviceStep]:
    """The steps of three products of the same x."""
    x_, n = view(x, 0), view(norm)
    return [DeviceStep("mul_mat", view(out, 0), (w, x_, n, None if b is None else view(b), None), (2, 0, 0), (EPS, 1.0, 0.0))
            for (w, _), out, b in zip(matrices, outs, biases, strict=True)]


def run_together(steps, **options):
    return run("mul_mat", steps[0].dst, steps[0].src, steps[0].i, steps[0].f, beside=steps[1:], **options)


def seen_by(name: str, x: np.ndarray) -> np.ndarray:
    return x if name == "F16" else eight_bits(x.astype(np.float32))


@pytest.mark.parametrize("types,columns", [(("Q4_0", "Q4_0", "Q6_K"), 3), (("F16", "F16", "BF16"), 1)])
def test_three_products_in_one_launch(types, columns):
    x, norm, k = numbers(columns, 256), numbers(256), 256
    matrices = [weight(numbers(m, k), name) for m, name in zip((6, 3, 5), types, strict=True)]
    outs = [np.full((columns, w.shape[0]), 7, np.float32) for w, _ in matrices]
    biases = [numbers(6), None, numbers(5)]
    run_together(product(matrices, outs, x, norm, biases), tokens=max(1, columns - 1))
    seen = seen_by(types[0], OPS["rms_norm"].reference(x, norm, EPS))
    for (_, numeric), out, bias in zip(matrices, outs, biases, strict=True):
        want = seen @ numeric.T + (bias if bias is not None else 0)
        assert nmse(out[:max(1, columns - 1)], want[:max(1, columns - 1)]) < 1e-7
        assert (out[max(1, columns - 1):] == 7).all()


@pytest.mark.parametrize("types,cache,mode,rotated,normed,biased", FORMS if "PYGGML_PTX" not in os.environ else FORMS[:2])
def test_heads_are_settled_by_the_launch_that_makes_them(types, cache, mode, rotated, normed, biased):
    """And attention finds them settled."""
    sizes = (HEADS, KV, KV)
    x, norm = numbers(TOKENS, 256), numbers(256)
    matrices = [weight(numbers(n * D, 256), name) for n, name in zip(sizes, types, strict=True)]
    biases = [numbers(n * D) if biased else None for n in sizes]
    outs = [np.zeros((TOKENS, n * D), np.float32) for n in sizes]
    q, k, v = (out.reshape(TOKENS, n, D) for out, n in zip(outs, sizes, strict=True))
    keys, values = (cache_view(name, np.zeros((KV, CELLS, D), np.float32)) for name in cache)
    cell, first = np.array([3, 4], np.int32), np.array([3, 3], np.int32)
    table = OPS["rope_table"].reference(np.array([50, 9], np.int32), 100.0 ** -np.arange(rotated // 2, dtype=np.float32), 1.0)
    out = np.zeros((TOKENS, HEADS * D), np.float32)
    sources = (view(q, 0), keys, values, view(cell, 0), view(first, 0), view(k, 0), view(v, 0), view(table, 0))
    attend = DeviceStep("attention_step", view(out, 0), sources, (0, MODES.index(mode), rotated, 0), (0.3, 0.0))
    head_norms = [numbers(D), numbers(D)]
    norms = tuple(DeviceStep("rms_norm", view(a), (view(a), view(n), None), f=(EPS,)) for a, n in zip((q, k), head_norms, strict=True) if normed)
    left = run_together(product(matrices, outs, x, norm, biases), tokens=TOKENS, settles=Settle(attend, norms))
    seen = seen_by(types[0], OPS["rms_norm"].reference(x, norm, EPS))
    want_q, want_k, want_v = ((seen @ numeric.T + (0 if b is None else b)).reshape(TOKENS, n, D).astype(np.float32)
                              for (_, numeric), b, n in zip(matrices, biases, sizes, strict=True))
    if normed:
        want_q, want_k = (OPS["rms_norm"].reference(a, n, EPS) for a, n in zip((want_q, want_k), head_norms, strict=True))
    want_q, want_k = (OPS["rope"].reference(a, table, mode) for a in (want_q, want_k))
    assert nmse(left.roped[:want_q.size].reshape(want_q.shape), want_q) < 1e-7
    rounding = {"F32": 1e-7, "F16": 1e-6, "BF16": 1e-5, "Q8_0": 1e-4, "Q4_0": 2e-2}
    for tensor, want in ((keys, want_k), (values, want_v)):
        got = cache_numbers(tensor)
        assert nmse(got[:, cell], want.transpose(1, 0, 2)) < rounding[tensor.type]
        assert not np.delete(got, cell, axis=1).any()
    run("attention_step", attend.dst, attend.src, attend.i, attend.f, tokens=TOKENS, shared=left, settled=True)
    assert nmse(out, OPS["attention"].reference(want_q, Numbers(keys), Numbers(values), cell, first, scale=0.3, softcap=0.0, window=0)) < 3e-6
