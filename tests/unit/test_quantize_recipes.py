"""The recipes, tensor by tensor, against what llama-quantize chooses for models of many shapes (golden/recipes.json)."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyggml.errors import PyggmlError
from pyggml.quantize import recipes
from pyggml.quantize.recipes import choose
from pyggml.quantize.select import Wishes, fallback, order, select
from pyggml.types import BY_NAME, tensor_type

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "recipes.json").read_text())


def model(arch, L, d, ff, heads, kv, vocab=512, experts=0, tied=False, qkv=False, shexp=False):
    """Names and shapes of a model: what `select` looks at."""
    shapes = {"token_embd.weight": (vocab, d), "output_norm.weight": (d,)}
    if not tied:
        shapes["output.weight"] = (vocab, d)
    n_kv = kv * (d // heads)
    for i in range(L):
        layer = {"attn_norm": (d,), "ffn_norm": (d,), "attn_output": (d, d)}
        layer |= {"attn_qkv": (d + 2 * n_kv, d)} if qkv else {"attn_q": (d, d), "attn_k": (n_kv, d), "attn_v": (n_kv, d)}
        names = ["up", "down"] if qkv else ["gate", "up", "down"]
        stacks = [("_exps", (experts,))] * bool(experts) + [("_shexp", ())] * (shexp or not experts)
        for suffix, stack in stacks:
            for name in names:
                layer[f"ffn_{name}{suffix if experts else ''}"] = (*stack, d, ff) if name == "down" else (*stack, ff, d)
        if experts:
            layer["ffn_gate_inp"] = (experts, d)
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    tensors = {name: SimpleNamespace(shape=shape, type=tensor_type("F16" if len(shape) > 1 else "F32")) for name, shape in shapes.items()}
    return tensors, {"general.architecture": arch, f"{arch}.block_count": L, f"{arch}.expert_count": experts,
                     f"{arch}.attention.head_count": heads, f"{arch}.attention.head_count_kv": kv}


def unpack(text):
    """'Q6_K*2 Q4_K' -> ['Q6_K', 'Q6_K', 'Q4_K']"""
    return [kind for item in text.split() for kind, _, n in [item.partition("*")] for _ in range(int(n or 1))]


CASES = [(shape, key) for shape, golden in GOLDEN.items() for key in golden["types"]]


@pytest.mark.parametrize(("shape", "key"), CASES, ids=lambda v: v)
def test_types_are_those_of_llama_quantize(shape, key):
    name, _, imatrix = key.partition("+")
    recipe = recipes.find(name)
    if recipe.base not in BY_NAME:
        pytest.fail(f"the type {recipe.base} is missing from the type table")
    tensors, kv = model(**GOLDEN[shape]["shape"])
    chosen: dict[str, list[str]] = {}
    for c in select(tensors, kv, recipe, imatrix=bool(imatrix)):
        part = c.name.removesuffix(".weight").split(".", 2)[-1] if c.name.startswith("blk.") else c.name.removesuffix(".weight")
        if not part.endswith("_norm"):
            chosen.setdefault(part, []).append(c.after.name)
    assert chosen == {part: unpack(kinds) for part, kinds in GOLDEN[shape]["types"][key].items()}


def kinds(recipe, wishes=None, shape="llama-6", **options):
    tensors, kv = model(**GOLDEN[shape]["shape"])
    return {c.name: c.after.name for c in select(tensors, kv, recipes.find(recipe), wishes, **options)}


def test_wishes():
    plain = kinds("Q4_K_M", shape="llama-22")
    assert plain["output.weight"] == "Q6_K" and plain["token_embd.weight"] == "Q4_K"
    assert kinds("Q4_K_M", Wishes(pure=True), "llama-22")["output.weight"] == "Q4_K"
    assert kinds("Q4_K_M", Wishes(leave_output_tensor=True), "llama-22")["output.weight"] == "F16"
    assert kinds("Q4_K_M", Wishes(output_tensor_type="q8_0"), "llama-22")["output.weight"] == "Q8_0"
    assert kinds("Q4_K_M", Wishes(token_embedding_type="q5_1"), "llama-22")["token_embd.weight"] == "Q5_1"
    first_wins = Wishes(tensor_types=(("blk.3.attn_v", "q8_0"), ("attn_(k|v)", "q5_K")))
    chosen = kinds("Q4_K_M", first_wins, "llama-22")
    assert (chosen["blk.3.attn_v.weight"], chosen["blk.4.attn_v.weight"], chosen["blk.4.attn_k.weight"]) == ("Q8_0", "Q5_K", "Q5_K")
    assert kinds("F16", first_wins, "llama-22")["blk.3.attn_v.weight"] == "F16"      # overrides are for quantizing recipes only


def test_tied_table_takes_the_output_type():
    assert kinds("Q4_K_M")["token_embd.weight"] == "Q6_K"
    assert kinds("Q4_K_M", Wishes(output_tensor_type="q5_K"))["token_embd.weight"] == "Q5_K"


def test_copy_changes_nothing():
    assert set(kinds("COPY").values()) == {"F16", "F32"}


def test_imatrix_needs():
    tensors, kv = model(**GOLDEN["llama-6"]["shape"])
    needs = {name: [c.name for c in select(tensors, kv, recipes.find(name)) if c.needs_imatrix] for name in ("IQ2_XS", "Q2_K", "Q2_K_S", "IQ4_XS")}
    assert needs["Q2_K"] == needs["IQ4_XS"] == []
    assert "blk.2.attn_q.weight" in needs["IQ2_XS"] and "token_embd.weight" not in needs["IQ2_XS"]
    assert "blk.2.attn_q.weight" in needs["Q2_K_S"]


def test_fallback_is_told():
    tensors, kv = model(**GOLDEN["odd"]["shape"])
    told = {c.name: (c.fallback_from, c.after.name) for c in select(tensors, kv, recipes.find("Q4_K_M")) if c.fallback_from}
    assert told["blk.0.attn_q.weight"] == ("Q4_K", "Q5_0")
    assert fallback(tensor_type("Q6_K"), 100).name == "F16"


def test_find():
    assert recipes.find("q4_k") is recipes.find(15) is recipes.find("Q4_K_M")
    with pytest.raises(PyggmlError, match="known are"):
        recipes.find("Q4_K_XXL")
    with pytest.raises(PyggmlError, match="not a regular expression"):
        kinds("Q4_0", Wishes(tensor_types=(("(", "q8_0"),)))


def test_rules_name_only_conditions_and_types_that_exist():
    for r in recipes.RECIPES:
        for rule in (r.rest, *r.rules.values()):
            for entry in rule.split():
                conditions, _, kind = entry.rpartition(":")
                assert {c.lstrip("!") for c in conditions.split("+") if c} <= set(recipes.CONDITIONS), (r.name, entry)
                assert kind == "base" or kind in BY_NAME, (r.name, entry)


def test_first_entry_that_holds_decides():
    site = recipes.Site("llama", 4, 0, False, i=0, n=32)
    assert choose("imatrix:Q8_0 gqa4+eighth:Q6_K Q5_K", site, "Q4_K") == "Q6_K"
    assert choose("!gqa4:Q8_0", site, "Q4_K") == "Q4_K"


def test_order_is_by_layer_then_name():
    assert order(["blk.10.a", "blk.9.b", "output.weight", "blk.9.a"]) == ["output.weight", "blk.9.a", "blk.9.b", "blk.10.a"]
