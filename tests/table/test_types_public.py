"""quantize() and dequantize() as users call them: shapes, errors, importance stacks, types of their own, no extension."""

import os
import subprocess
import sys

import numpy as np
import pytest

from pyggml import quants
from pyggml.errors import PyggmlError
from pyggml.types import BY_ID, BY_NAME, tensor_type


def test_shapes():
    x = np.random.default_rng(0).normal(size=(2, 3, 512))
    blocks = quants.quantize(x, "q4_k")
    assert blocks.shape == (2, 3, 288) and blocks.dtype == np.uint8
    assert quants.dequantize(blocks, 12).shape == x.shape
    assert quants.quantize(x[0, 0], "Q8_0").shape == (544,)
    assert quants.dequantize(quants.quantize(x[:, :0], "Q6_K"), "Q6_K").shape == (2, 0, 512)
    assert (quants.quantize(x[:, ::2, ::2], "Q8_0") == quants.quantize(x[:, ::2, ::2].copy(), "Q8_0")).all()
    assert (quants.dequantize(np.float16([[1, 2]]), "F16") == [[1, 2]]).all()


@pytest.mark.parametrize("kind", ["Q4_K", "F16", "F64"])
def test_into_the_callers_array(kind):
    x = np.random.default_rng(0).normal(size=(2, 3, 256)).astype(np.float32)
    blocks, weights = np.full_like(quants.quantize(x, kind), 1), np.ones_like(x)
    assert quants.quantize(x, kind, out=blocks) is blocks and (blocks == quants.quantize(x, kind)).all()
    assert quants.dequantize(blocks, kind, out=weights) is weights and (weights == quants.dequantize(blocks, kind)).all()


def test_one_importance_row_per_expert():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 3, 256)), rng.uniform(0, 9, (2, 256))
    together = quants.quantize(x, "Q3_K", w)
    assert (together[1] == quants.quantize(x[1], "Q3_K", w[1])).all()
    assert (together[0] != quants.quantize(x[0], "Q3_K", w[1])).any()


@pytest.mark.parametrize("call, words", [
    (lambda: quants.quantize(np.zeros((2, 40)), "Q4_0"), ["40", "Q4_0", "32"]),
    (lambda: quants.dequantize(np.zeros((2, 19), np.uint8), "Q4_0"), ["19", "Q4_0", "18"]),
    (lambda: quants.quantize(np.array(1.0), "Q4_0"), ["single number", "Q4_0"]),
    (lambda: quants.quantize(np.full((2, 32), np.nan), "Q4_0"), ["nan", "[0, 0]", "Q4_0"]),
    (lambda: quants.quantize(np.zeros((2, 32)), "Q4_0", np.ones(31)), ["(31,)", "(2, 32)"]),
    (lambda: quants.quantize(np.zeros((2, 32)), "Q4_0", -np.ones(32)), ["importance", "negative"]),
    (lambda: quants.quantize(np.zeros((2, 32)), "Q4_9"), ["Q4_9", "Q4_0"]),
    (lambda: quants.quantize(np.zeros((2, 32)), "Q4_0", out=np.zeros((2, 32), np.uint8)), ["(2, 32)", "(2, 18)"]),
    (lambda: quants.dequantize(np.zeros((2, 18), np.uint8), "Q4_0", out=np.zeros((4, 64), np.float32)[::2, ::2]), ["contiguous"]),
    (lambda: quants.dequantize(np.zeros((2, 18), np.uint8), "Q4_0", out=np.zeros((2, 32))), ["float64", "float32"]),
    (lambda: quants.dequantize(np.zeros((2, 32), np.uint8), 4), ["Q4_2", "removed"]),
])
def test_errors_say_what_and_where(call, words):
    with pytest.raises(PyggmlError) as caught:
        call()
    assert all(word in str(caught.value) for word in words)


@pytest.fixture
def tenths():
    """A type defined as a user would: weights in tenths of a block scale, 64 a block."""
    class TENTHS(quants.Codec):
        id, block = 1001, 64
        layout = [("d", "<f4"), ("q", "i1", 64)]

        def decode(self, b):
            return b["d"][:, None] * b["q"] / np.float32(10)

        def encode(self, x, w):
            d = np.abs(x).max(axis=1, keepdims=True) / np.float32(12.7)
            return self.blocks(len(x), d=d[:, 0], q=np.rint(x * 10 / np.where(d > 0, d, 1)))

    yield quants.register(TENTHS)
    del BY_ID[1001], BY_NAME["TENTHS"], quants.CODECS["TENTHS"]


def test_a_type_of_ones_own(tenths):
    x = np.random.default_rng(0).normal(size=(3, 2, 128)).astype(np.float32)
    blocks = quants.quantize(x, "tenths", threads=2)
    assert blocks.shape == (3, 2, 136) and tensor_type(1001).bits_per_weight == 8.5
    assert np.abs(quants.dequantize(blocks, "TENTHS") - x).max() < np.abs(x).max() / 127
    with pytest.raises(PyggmlError, match="taken"):
        quants.register(type("TENTHS2", (tenths,), {"id": 1001}))
    with pytest.raises(PyggmlError, match="belong to ggml"):
        quants.register(type("TENTHS3", (tenths,), {"id": 44}))


def test_without_the_extension_numpy_does_the_same():
    script = ("import numpy as np, sys; from pyggml import native, quants; assert native.lib is None\n"
              "x = np.random.default_rng(0).normal(size=(2, 256)).astype(np.float32)\n"
              "for name in ('Q4_0', 'Q8_0', 'Q4_K', 'MXFP4', 'IQ4_XS'):\n"
              "    b = quants.quantize(x, name); sys.stdout.write(f'{name} {np.abs(quants.dequantize(b, name) - x).max()}\\n')\n")
    env = {**os.environ, "PYGGML_NO_NATIVE": "1"}
    out = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True).stdout
    errors = {name: float(error) for name, error in map(str.split, out.splitlines())}
    assert len(errors) == 5 and errors["Q8_0"] < 0.02 and max(errors.values()) < 1


def test_threads_after_a_fork():
    """The helpers of large arrays are threads, which a child process does not have: it makes its own."""
    x = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    want = quants.quantize(x, "Q8_0", threads=3)
    pid = os.fork()
    if pid == 0:
        os._exit(int(not np.array_equal(quants.quantize(x, "Q8_0", threads=3), want)))
    assert os.waitpid(pid, 0)[1] == 0
