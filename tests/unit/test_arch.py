"""Architectures: what their keys mean for each layer, what they miss, and which of their parts are steps of their own."""

from pathlib import Path

import numpy as np
import pytest

from pyggml import formats
from pyggml.arch import gemma2, gemma3
from pyggml.arch.config import Config, Keys
from pyggml.arch.gemma import query_scale
from pyggml.backends.cpu import WeightStore
from pyggml.context import Context
from pyggml.errors import ModelError
from pyggml.formats import Typed
from pyggml.graph import walk
from pyggml.model import Model
from pyggml.native import lib
from pyggml.plan import SMALL, Schedule
from pyggml.quantize.calibrate import Collector
from pyggml.shapes import OUTPUTS, TOKENS

GOLDEN = Path(__file__).parents[1] / "golden" / "models"


def altered(path, name, keys=None, without=()):
    """A golden model with these keys (None: without), and without these tensors."""
    file = formats.open(GOLDEN / f"{name}.gguf")
    kv = {**file.kv.typed(), **(keys or {})}
    formats.write(path, {k: v for k, v in kv.items() if v is not None}, [t for n, t in file.tensors.items() if n not in without])
    return Model.load(path)


def nodes(model, op):
    return [t for t in walk([Context(model, n_ctx=64).output]) if t.op == op]


@pytest.mark.parametrize(("pattern", "slides"), [
    (3, (True, True, False, True)), (1, (False,) * 4), (0, (True,) * 4), (np.array([True, False, False, True]), (True, False, False, True))])
def test_which_layers_slide(pattern, slides):
    assert Keys("m", {"a.attention.sliding_window_pattern": pattern}, "a").sliding(4, period=2) == slides
    assert Keys("m", {}, "a").sliding(4, period=2) == (True, False, True, False)


@pytest.mark.parametrize("pattern", [-1, 1.5, True, [1, 0], ["yes"] * 4])
def test_a_pattern_that_is_none_is_refused(pattern):
    with pytest.raises(ModelError, match="sliding_window_pattern"):
        Keys("m", {"a.attention.sliding_window_pattern": pattern}, "a").sliding(4, period=2)


def test_a_model_of_experts_needs_their_size_alone():
    file = formats.open(GOLDEN / "gpt-oss.mxfp4.gguf")
    config = Config.read("m", {k: v for k, v in file.kv.items() if k != "gpt-oss.feed_forward_length"}, "gpt-oss")
    assert config.n_ff == config.n_ff_expert == (32, 32)


def test_layers_of_gemma_3():
    found = nodes(Model.load(GOLDEN / "gemma3.q4_0.gguf"), "attention")
    assert [t.attrs["window"] for t in found] == [52, 52, 52, 52, 52, 0, 52]
    tables = [t.srcs[0].srcs[1] for t in found]                 # of the queries' rope
    assert len({id(t) for t in tables}) == 2 and tables[0] is tables[6] is not tables[5]
    local, everywhere = (tables[i].srcs[1].data for i in (0, 5))
    np.testing.assert_allclose(local[1], 10000 ** (-1 / 16), rtol=1e-6)
    np.testing.assert_allclose(everywhere[1], 1e6 ** (-1 / 16) / 8, rtol=1e-6)


def test_a_gemma_3_without_window_has_one_rope_table(tmp_path):
    model = altered(tmp_path / "m.gguf", "gemma3.q4_0", {"gemma3.attention.sliding_window": Typed("u32", 0)})
    assert {t.attrs["window"] for t in nodes(model, "attention")} == {0} and len(nodes(model, "rope_table")) == 1


@pytest.mark.parametrize(("name", "layers", "scale"), [("gemma2.q8_0", 46, 10**-0.5), ("gemma2.q8_0", 3, 32**-0.5), ("gemma3.q4_0", 62, 10**-0.5)])
def test_the_largest_gemma_scales_its_queries_otherwise(name, layers, scale):
    file = formats.open(GOLDEN / f"{name}.gguf")
    arch = file.kv["general.architecture"]
    config = Config.read("m", {**file.kv, f"{arch}.block_count": layers}, arch)
    assert query_scale(config, {"gemma2": gemma2, "gemma3": gemma3}[arch].LAYERS_OF_27B) == pytest.approx(scale)


def test_layers_that_know_no_positions():
    tables = [t.srcs[0].srcs[1] for t in nodes(Model.load(GOLDEN / "smollm3.iq4_nl.gguf"), "attention")]
    assert [bool(t.srcs[1].data.any()) for t in tables] == [True, True, True, False]
    assert {t.attrs["mscale"] for t in tables} == {1.0}


@pytest.mark.parametrize(("finetuned", "turns"), [(None, True), (True, True), (False, False)])
def test_granite_without_positions(tmp_path, finetuned, turns):
    key = "granite.rope.scaling.finetuned"
    model = altered(tmp_path / "m.gguf", "granite.q8_0", {key: None if finetuned is None else Typed("bool", finetuned)})
    assert [bool(t.srcs[1].data.any()) for t in nodes(model, "rope_table")] == [turns]


@pytest.mark.parametrize(("name", "tensor"), [("gemma2.q8_0", "blk.1.post_attention_norm.weight"), ("gemma2.q8_0", "blk.2.post_ffw_norm.weight"),
                                              ("olmo2.bf16", "blk.0.attn_k_norm.weight"), ("gpt-oss.mxfp4", "blk.1.attn_sinks.weight"),
                                              ("gemma3.q4_0", "blk.0.attn_q_norm.weight"), ("gemma3.q4_0", "blk.6.attn_k_norm.weight")])
def test_what_is_missing_is_named(tmp_path, name, tensor):
    with pytest.raises(ModelError, match=tensor):
        nodes(altered(tmp_path / "m.gguf", name, without=[tensor]), "attention")


@pytest.mark.parametrize("type", [{}, {"gemma.rope.scaling.type": "longrope"}])
def test_a_factor_slows_without_a_type_too(type):
    file = formats.open(GOLDEN / "gemma.f16.gguf")
    rope = Config.read("m", {**file.kv, **type, "gemma.rope.scaling.factor": 4.0}, "gemma").rope
    plain = Config.read("m", file.kv, "gemma").rope
    np.testing.assert_allclose(rope.frequencies()[0], plain.frequencies()[0] / 4)


@pytest.mark.parametrize(("n_ctx", "length"), [(64, "short"), (65, "long")])
def test_factors_for_short_and_long_contexts(n_ctx, length):
    model = Model.load(GOLDEN / "phi3.q4_1.gguf")
    tables = {t.srcs[1].data.tobytes() for t in walk([Context(model, n_ctx=n_ctx).output]) if t.op == "rope_table"}
    plain = 10000.0 ** (-np.arange(6) / 6)
    assert tables == {(plain / model.file[f"rope_factors_{length}.weight"].numpy()).astype(np.float32).tobytes()}


@pytest.mark.parametrize(("name", "columns", "rows"), [("blk.0.attn_qkv.weight", 32, (32, 48)), ("blk.1.ffn_up.weight", 32, (64, 128))])
def test_rows_of_a_tensor(name, columns, rows):
    whole = formats.open(GOLDEN / "phi3.q4_1.gguf")[name]
    part = whole.rows(*rows)
    assert part.shape == (rows[1] - rows[0], columns) and part.whole == name != part.name
    np.testing.assert_array_equal(part.dequantize(), whole.dequantize()[slice(*rows)])


@pytest.mark.parametrize(("name", "beside"), [("phi3.q4_1", set()), ("qwen2moe.q5_0", {f"blk.{i}.ffn_gate_inp_shexp.weight" for i in range(2)})])
def test_importance_is_kept_under_the_names_of_the_file(name, beside):
    model = Model.load(GOLDEN / f"{name}.gguf")
    collector = Collector(model.file)
    Context(model, n_ctx=64, watch=collector).eval(range(3, 20))
    assert set(collector.entries) == {n for n, t in model.file.tensors.items() if n.startswith("blk.") and len(t.shape) > 1} | beside


@pytest.mark.parametrize(("key", "value", "rows"), [
    ("expert_feed_forward_length", None, 32), ("expert_feed_forward_length", Typed("u32", 40), 40), ("expert_used_count", Typed("u32", 4), 16)])
def test_the_size_of_an_expert(tmp_path, key, value, rows):
    keys = {"qwen3moe.expert_feed_forward_length": None, f"qwen3moe.{key}": value}
    model = altered(tmp_path / "m.gguf", "qwen3moe.q5_1", keys)
    if rows == 32:
        assert [t.srcs[0].shape for t in nodes(model, "matmul_id")][:3] == [(6, 32, 32)] * 3
    else:
        with pytest.raises(ModelError, match=rf"ffn_gate_exps.* ask for \[6, {rows}, 32\]"):
            nodes(model, "matmul_id")


@pytest.mark.skipif(lib is None, reason="steps are those of the kernels")
@pytest.mark.parametrize("limit", [SMALL, 64])
@pytest.mark.parametrize("name", ["gemma.f16", "gemma2.q8_0", "gemma3.q4_0", "phi3.q4_1", "smollm3.iq4_nl", "granite.q8_0", "olmo2.bf16",
                                  "gpt-oss.mxfp4"])
def test_scales_caps_and_residuals_are_no_steps(name, limit):
    steps = Schedule([Context(Model.load(GOLDEN / f"{name}.gguf"), n_ctx=64).output], WeightStore(), {TOKENS: limit, OUTPUTS: SMALL}).steps
    assert not {s.op for s in steps} & {"scale", "softcap", "add", "mul"}
