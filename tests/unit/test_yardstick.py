"""Variants of a model are computed from where they differ: the same numbers as the whole model, with numpy as without."""

import numpy as np
import pytest

import models
from pyggml import native
from pyggml.context import Context
from pyggml.formats import open as open_file
from pyggml.graph import walk
from pyggml.measure.chunks import split, tokenize
from pyggml.measure.lockstep import lockstep
from pyggml.measure.yardstick import Yardstick, computed, cut, in_memory, overlay, waists
from pyggml.model import Model
from pyggml.quants import quantize
from pyggml.types import tensor_type

CHANGED = ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_down.weight", "blk.1.attn_k.weight", "blk.1.ffn_up.weight", "output.weight")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return models.as_f16(tmp_path_factory.mktemp("source") / "f16.gguf")


def variant(file, name, kind="Q3_K"):
    tensor = file[name]
    return {name: in_memory(name, tensor_type(kind), tensor.shape, quantize(tensor.dequantize(), kind))}


def chunks_of(model, n=2, n_ctx=32):
    return split(tokenize(model, models.TEXT, n_ctx), n_ctx, n)


@pytest.mark.parametrize("compiled", [True, False])
def test_variants_are_those_of_the_whole_model(source, monkeypatch, compiled):
    if not compiled:
        monkeypatch.setattr(native, "lib", None)
    model = Model.load(source)
    chunks = chunks_of(model, 5) if compiled else chunks_of(model, 1, 8)
    own = Yardstick(model, chunks, n_ubatch=64, n_threads=1)
    for name in CHANGED if compiled else CHANGED[1:3]:
        if name not in model.file.tensors:
            continue
        changed = variant(model.file, name)
        *_, [expected] = lockstep(Model.load(source), [Model(overlay(model.file, changed))], chunks, exact=True, n_threads=1)
        found = own.with_tensors(changed)
        assert expected.kld.mean() > 1e-5, name
        np.testing.assert_allclose(found.kld, expected.kld, atol=1e-5, rtol=1e-3, err_msg=name)
        np.testing.assert_allclose(found.nll, expected.nll, atol=1e-4)
    if not compiled:
        return
    everything = {k: v for name in CHANGED if name in model.file.tensors for k, v in variant(model.file, name).items()}
    assert own.with_tensors(everything).kld.mean() > own.with_tensors(variant(model.file, CHANGED[1])).kld.mean()


@pytest.mark.parametrize("golden", ["llama_quant.q8_0", "mixtral.q4_k_m_mix"])
def test_everything_flows_through_a_waist(golden):
    """A graph cut at a waist needs nothing from before it, and a value beside the waist is no waist."""
    model = Model(open_file(models.GOLDEN / f"{golden}.gguf"))
    output = Context(model, n_ctx=32).output
    order = computed(output)
    found = waists(order)
    assert len(found) >= 2 * model.config.n_layers
    def left(i):
        """What a graph cut there still computes of what comes before."""
        rest = {id(node) for node in walk([cut(output, order[i])])}
        return [node for node in order[:i + 1] if id(node) in rest]

    assert not any(left(i) for i in found)
    assert left(next(i for i in range(len(order)) if i not in found and order[i].op == "rms_norm"))


def test_only_what_follows_the_change_is_computed(source, monkeypatch):
    model = Model.load(source)
    own = Yardstick(model, chunks_of(model), n_threads=1)
    sizes = {}
    prepare = own._prepare
    monkeypatch.setattr(own, "_prepare", lambda output, *a: sizes.setdefault("now", []).append(len(computed(output))) or prepare(output, *a))
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_up.weight", "blk.1.attn_q.weight", "blk.1.ffn_down.weight"):
        own.with_tensors(variant(model.file, name))
    assert sizes["now"] == sorted(sizes["now"], reverse=True) and sizes["now"][0] > 2 * sizes["now"][3]
