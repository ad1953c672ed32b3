"""The engine against golden logits: every instruction set, thread counts, layouts, the float path and the quantized path."""

from pathlib import Path

import numpy as np
import pytest
from distances import BOUNDS, distances, first_difference, misses, native_bound

from pyggml import native
from pyggml.context import Context
from pyggml.model import Model

FOLDER = Path(__file__).parent / "models"
NAMES = sorted(p.stem for p in FOLDER.glob("*.npz"))
ISAS = [isa for isa, usable in native.isa_names().items() if usable] or ["numpy"]


@pytest.fixture(params=ISAS)
def isa(request):
    """Run the test on one instruction set."""
    if request.param == "numpy":
        yield "numpy"
        return
    chosen = native.isa
    native.select_isa(request.param)
    yield request.param
    native.select_isa(chosen)


def check(name: str, *, strict: bool, **options) -> None:
    golden = np.load(FOLDER / f"{name}.npz")
    suffix = "_f32" if strict else ""
    options |= {"exact": True, "type_k": "F32", "type_v": "F32"} if strict else {}
    context = Context(Model.load(FOLDER / f"{name}.gguf"), n_ctx=256, **options)
    logits = context.eval(golden["tokens"], "all").copy()
    found = distances(golden[f"logits{suffix}"], logits)
    assert not misses(found, BOUNDS["strict" if strict else native_bound(name)])
    error = 2 * float(np.abs(golden[f"logits{suffix}"] - logits).max())
    ids = [int(logits[-1].argmax())]
    while len(ids) < len(golden[f"gen_ids{suffix}"]):
        ids.append(int(context.eval(ids[-1:])[0].argmax()))
    assert not first_difference(ids, golden[f"gen_margin{suffix}"], golden[f"gen_ids{suffix}"], error)


@pytest.mark.parametrize("name", NAMES)
def test_strict(name, isa):
    check(name, strict=True, n_threads=2)


@pytest.mark.parametrize("name", NAMES)
def test_native(name, isa):
    check(name, strict=False, n_threads=2)


@pytest.mark.parametrize("name", NAMES)
def test_native_from_raw_rows(name, isa):
    check(name, strict=False, n_threads=2, repack=False)


@pytest.mark.parametrize("n_threads", [1, 3, 7])
@pytest.mark.parametrize("name", ["llama_quant.q4_k", "mixtral.q4_k_m_mix", "qwen2.q4_k_m_mix", "gemma2.q8_0"])
def test_thread_counts(name, n_threads):
    check(name, strict=False, n_threads=n_threads)


@pytest.mark.parametrize("n_ubatch", [1, 5, 16])
def test_pieces_of_a_prompt_give_the_same_logits(n_ubatch):
    name = "llama_quant.q4_0"
    tokens = np.load(FOLDER / f"{name}.npz")["tokens"]
    model = Model.load(FOLDER / f"{name}.gguf")
    whole = Context(model, n_ctx=64, exact=True, type_k="F32", type_v="F32").eval(tokens, "all").copy()
    pieces = Context(model, n_ctx=64, n_ubatch=n_ubatch, exact=True, type_k="F32", type_v="F32").eval(tokens, "all")
    np.testing.assert_allclose(pieces, whole, atol=2e-4, rtol=0)
