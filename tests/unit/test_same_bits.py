"""Same tokens, same bits: small batches always agree with one token at a time; a deterministic context agrees with itself however its
tokens are batched, computed and laid out."""

from pathlib import Path

import numpy as np
import pytest

from pyggml import native
from pyggml.context import Context
from pyggml.errors import ParameterError
from pyggml.model import Model

if native.lib is None:
    pytest.skip("the same bits are promised by the kernels", allow_module_level=True)

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
ISAS = [name for name, usable in native.isa_names().items() if usable]
# blocks of 32 and 256, codebooks, halves, experts, heads that share and heads that do not, windows, caps
MODELS = ["llama_quant.q4_0", "llama_quant.q4_k", "llama_quant.iq4_xs", "llama_yarn.f16", "stories260K.bf16", "mixtral.q4_k_m_mix",
          "qwen2.q4_k_m_mix", "gemma2.q8_0", "gemma3.q4_0", "phi3.q4_1", "qwen2moe.q5_0", "gpt-oss.mxfp4"]
LENGTH = 90
ONES = (1,) * LENGTH


@pytest.fixture(autouse=True)
def chosen_isa():
    yield
    native.select_isa(native.isa)


def tokens_of(model):
    return np.random.default_rng(0).integers(3, model.n_vocab, LENGTH)


def logits(model, split, **options):
    """Of every token, evaluated in pieces of the sizes in `split`."""
    context = Context(model, **{"n_ctx": 128, **options})
    starts = np.cumsum([0, *split])
    return np.concatenate([context.eval(piece, "all").copy() for piece in np.split(tokens_of(model), starts[1:-1])])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", MODELS)
def test_small_batches(name, isa):
    native.select_isa(isa)
    model = Model.load(GOLDEN / f"{name}.gguf")
    alone = logits(model, ONES)
    for split in ((2,) * 45, (3,) * 30, (8,) * 11 + (2,), (1, 5, 7, 6, 4, 3) * 3 + (8, 4)):
        np.testing.assert_array_equal(logits(model, split), alone)


@pytest.mark.parametrize("repack", [True, False])
def test_small_batches_of_any_layout(repack):
    model = Model.load(GOLDEN / "llama_quant.q5_1.gguf")
    np.testing.assert_array_equal(logits(model, (5,) * 18, repack=repack), logits(model, ONES, repack=repack))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", MODELS)
def test_deterministic(name, isa):
    native.select_isa(isa)
    model = Model.load(GOLDEN / f"{name}.gguf")
    whole = logits(model, (LENGTH,), deterministic=True)
    for split, options in [((LENGTH,), {"n_threads": 1}), ((LENGTH,), {"n_threads": 3}), ((LENGTH,), {"n_threads": 7}), (ONES, {"n_threads": 2}),
                           ((40, 1, 9, 8, 32), {}), ((LENGTH,), {"n_ubatch": 17}), ((LENGTH,), {"repack": False}), ((50, 40), {"repack": False}),
                           ((11, 70, 9), {"n_ctx": 4096, "n_threads": 7})]:
        np.testing.assert_array_equal(logits(model, split, deterministic=True, **options), whole, err_msg=f"{split} {options}")


@pytest.mark.parametrize("cache", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_deterministic_caches(cache):
    model = Model.load(GOLDEN / "llama_quant.q8_0.gguf")
    types = {"type_k": cache, "type_v": cache, "deterministic": True}
    np.testing.assert_array_equal(logits(model, (33, 1, 8, 48), **types), logits(model, (LENGTH,), **types))


@pytest.mark.parametrize("name", ["llama_quant.q6_k", "gemma2.q8_0"])
@pytest.mark.parametrize("together", [2, 5])
def test_deterministic_beside_other_sequences(name, together):
    """A sequence that shares the cache and the batch with others, at whatever cell it starts."""
    model = Model.load(GOLDEN / f"{name}.gguf")
    alone = logits(model, (LENGTH,), deterministic=True)
    context = Context(model, n_ctx=together * 101, deterministic=True)
    rows = np.tile(tokens_of(model), (together, 1))
    rows[1:] = rows[1:, ::-1]
    order = np.roll(rows, together // 2, axis=0)                    # the one that is looked at lies in the middle
    for start, end in ((0, 70), (70, 71), (71, LENGTH)):
        out = context.sequences(order[:, start:end], start, range(end - start)).reshape(together, end - start, -1)
        np.testing.assert_array_equal(out[together // 2], alone[start:end])


def test_without_kernels_it_is_refused(monkeypatch):
    monkeypatch.setattr(native, "lib", None)
    with pytest.raises(ParameterError, match="deterministic"):
        Context(Model.load(GOLDEN / "llama_quant.q4_0.gguf"), deterministic=True)
