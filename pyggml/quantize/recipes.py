"""Every recipe of llama-quantize as data: which tensor gets which type in `pyggml quantize IN OUT Q4_K_M`.

A recipe names a base type and, for the tensors that deserve more or fewer bits, a rule. A rule is read from left to right and the
first entry whose conditions hold decides; `a+b:TYPE` needs both, `!a` needs the opposite, an entry without a condition always
holds, and `base` is the recipe's base type. Where no entry holds, the base type stays.

    Recipe("Q2_K", 10, "Q2_K", attn_v="gqa4:Q4_K Q3_K", ffn_down="Q3_K")

How the rules are applied to the tensors of a model is in select.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pyggml.errors import PyggmlError
from pyggml.types import BY_NAME as TYPE_BY_NAME

# ---- roles: broad kinds of tensors, the first whose fragment is in the name -----------------------------------------------------

ROLES: tuple[tuple[str, str], ...] = (
    ("attn_qkv.weight", "attn_v"),          # fused matrices are treated as the most sensitive part of them
    ("attn_kv_b.weight", "attn_v"),
    ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"),
    ("attn_q.weight", "attn_q"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_down", "ffn_down"),
)
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
OUTPUT = "output.weight"


def role(name: str) -> str:
    """`output`, `embedding`, a role of ROLES, or "" for a tensor without a rule of its own."""
    if name == OUTPUT:
        return "output"
    if name in EMBEDDINGS:
        return "embedding"
    return next((role for fragment, role in ROLES if fragment in name), "")


# ---- conditions -----------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Site:
    """Where a rule is applied: the model's facts, and the tensor's place `i` among the `n` of its role."""

    arch: str
    gqa: int                  # heads per key/value head
    n_expert: int
    imatrix: bool             # an importance matrix is used
    i: int = 0
    n: int = 0
    stacked: bool = False     # a three-dimensional tensor: the experts of a layer


def more_bits(s: Site) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return s.i < s.n // 8 or s.i >= 7 * s.n // 8 or (s.i - s.n // 8) % 3 == 2


CONDITIONS: dict[str, Callable[[Site], bool]] = {
    "gqa4": lambda s: s.gqa >= 4,
    "experts4": lambda s: s.n_expert >= 4,
    "experts8": lambda s: s.n_expert == 8,
    "falcon": lambda s: s.arch == "falcon",
    "imatrix": lambda s: s.imatrix,
    "first2": lambda s: s.i < 2,
    "first4": lambda s: s.i < 4,
    "sixteenth": lambda s: s.i < s.n // 16,
    "eighth": lambda s: s.i < s.n // 8,
    "middle": lambda s: s.n // 8 <= s.i < 7 * s.n // 8,
    "more_bits": more_bits,
    "stacked": lambda s: s.stacked,
}


def choose(rule: str, site: Site, base: str) -> str:
    """The type that a rule gives at a site."""
    for entry in rule.split():
        conditions, _, kind = entry.rpartition(":")
        if all(CONDITIONS[c.lstrip("!")](site) != c.startswith("!") for c in conditions.split("+") if c):
            return base if kind == "base" else kind
    return base


# ---- recipes --------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Recipe:
    """One recipe. `id` is written as general.file_type; `base` is the type of every tensor without a rule ("" copies the file)."""

    name: str
    id: int
    base: str
    about: str = ""
    output: str = "Q6_K"          # of output.weight, and of the token table when it is also the output
    embedding: str = ""           # of a token table beside an output.weight
    needs_imatrix: bool = False   # Q2_K in this recipe is too coarse without an importance matrix
    rest: str = ""                # a rule for every tensor that is neither output nor embedding
    rules: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)   # types of single tensors: a recipe made for one model (allocate.py)
    counts_tensors: bool = False  # a layer's place is counted by tensors even where experts share a layer
    raises_values: bool = True    # SHARED_VALUES apply

    def rule(self, role: str) -> str:
        return self.rest or self.rules.get(role, "")


def recipe(name: str, id: int, base: str, about: str, *, output: str = "Q6_K", embedding: str = "", needs_imatrix: bool = False,
           rest: str = "", two_bit: bool = False, **rules: str) -> Recipe:
    """A row of RECIPES. Keys and values are a small part of a model with 8 experts: they get Q8_0, except in the smallest recipes."""
    if not two_bit:
        rules["attn_v"] = f"experts8:Q8_0 {rules.get('attn_v', '')}"
        rules["attn_k"] = f"experts8:Q8_0 {rules.get('attn_k', '')}"
    return Recipe(name, id, base, about, output, embedding, needs_imatrix, rest, rules, counts_tensors=two_bit, raises_values=not two_bit)


def two_bit(name: str, id: int, base: str, about: str, *, spare: str, embedding: str, attn_output: str = "base") -> Recipe:
    """The recipes of about two bits and below share their rules; `spare` is the type of what they spare."""
    return recipe(name, id, base, about, output="Q5_K", embedding=embedding, two_bit=True, attn_v=f"gqa4:Q4_K experts4:Q4_K {spare}",
                  attn_k="experts8:Q4_K", ffn_down=f"eighth:{spare}", attn_output=f"experts8:Q5_K {attn_output}")


EXPERTS = "!falcon+experts8:Q5_K"        # attention output of a model with 8 experts

RECIPES: tuple[Recipe, ...] = (
    recipe("Q1_0", 40, "Q1_0", "1.125 bpw, signs and a scale for 128 weights"),
    recipe("Q2_0", 41, "Q2_0", "2.25 bpw, 64 weights and a scale", embedding="Q4_K"),
    recipe("Q4_0", 2, "Q4_0", "4.50 bpw, 32 weights and a scale", ffn_down="imatrix+eighth:Q4_1"),
    recipe("Q4_1", 3, "Q4_1", "5.00 bpw, 32 weights, a scale and a minimum"),
    recipe("MXFP4_MOE", 38, "MXFP4", "4.25 bpw experts, 8.5 bpw the rest", output="Q8_0", embedding="Q8_0", rest="stacked:MXFP4 Q8_0"),
    recipe("Q5_0", 8, "Q5_0", "5.50 bpw, 32 weights and a scale", ffn_down="imatrix+eighth:Q5_1"),
    recipe("Q5_1", 9, "Q5_1", "6.00 bpw, 32 weights, a scale and a minimum"),
    two_bit("IQ2_XXS", 19, "IQ2_XXS", "2.06 bpw, needs an imatrix", spare="Q2_K", embedding="Q2_K"),
    two_bit("IQ2_XS", 20, "IQ2_XS", "2.31 bpw, needs an imatrix", spare="Q2_K", embedding="Q2_K"),
    two_bit("IQ2_S", 28, "IQ2_XS", "2.5 bpw, needs an imatrix", spare="IQ3_S", embedding="IQ3_S", attn_output="IQ3_S"),
    two_bit("IQ2_M", 29, "IQ2_S", "2.7 bpw, needs an imatrix", spare="IQ3_S", embedding="IQ3_S", attn_output="IQ3_S"),
    two_bit("IQ1_S", 24, "IQ1_S", "1.56 bpw, needs an imatrix", spare="Q2_K", embedding="Q2_K", attn_output="IQ2_XXS"),
    two_bit("IQ1_M", 31, "IQ1_M", "1.75 bpw, needs an imatrix", spare="Q2_K", embedding="Q2_K", attn_output="IQ2_XXS"),
    recipe("TQ1_0", 36, "TQ1_0", "1.69 bpw, ternary weights", embedding="Q4_K"),
    recipe("TQ2_0", 37, "TQ2_0", "2.06 bpw, ternary weights", embedding="Q4_K"),
    recipe("Q2_K", 10, "Q2_K", "2.6 bpw, mixed with Q3_K and Q4_K",
           attn_v="gqa4:Q4_K Q3_K", ffn_down="Q3_K", attn_output=f"{EXPERTS} falcon:base Q3_K"),
    recipe("Q2_K_S", 21, "Q2_K", "2.6 bpw, needs an imatrix", needs_imatrix=True, attn_v="gqa4:Q4_K", ffn_down="eighth:Q4_K"),
    recipe("IQ3_XXS", 23, "IQ3_XXS", "3.06 bpw, needs an imatrix", output="Q5_K", embedding="IQ3_S",
           attn_v="gqa4:Q4_K !imatrix:IQ3_S", attn_k="IQ2_S", attn_q="IQ2_S", ffn_down="imatrix:base eighth:Q4_K Q3_K",
           attn_output=f"{EXPERTS} falcon:base IQ3_S"),
    recipe("IQ3_S", 26, "IQ3_S", "3.44 bpw", attn_v="gqa4:Q4_K", attn_output=EXPERTS),
    recipe("IQ3_M", 27, "IQ3_S", "3.66 bpw, mixed with Q4_K", attn_v="Q4_K", ffn_down="eighth:Q4_K experts8+more_bits:Q4_K",
           attn_output=f"{EXPERTS} falcon:base Q4_K"),
    recipe("IQ3_XS", 22, "IQ3_S", "3.3 bpw, mixed with IQ3_XXS, needs an imatrix", attn_v="gqa4:Q4_K", attn_k="IQ3_XXS", attn_q="IQ3_XXS",
           attn_output=EXPERTS, ffn_gate="middle:IQ3_XXS", ffn_up="middle:IQ3_XXS"),
    recipe("Q3_K_S", 11, "Q3_K", "3.44 bpw", attn_output=EXPERTS),
    recipe("Q3_K_M", 12, "Q3_K", "3.9 bpw, mixed with Q4_K and Q5_K", attn_v="first2:Q5_K Q4_K",
           ffn_down="sixteenth:Q5_K !falcon:Q4_K more_bits:Q4_K", attn_output=f"{EXPERTS} falcon:base Q4_K"),
    recipe("Q3_K_L", 13, "Q3_K", "4.3 bpw, mixed with Q5_K", attn_v="Q5_K", ffn_down="falcon:Q4_K Q5_K",
           attn_output="falcon:Q4_K experts8:base Q5_K"),
    recipe("IQ4_NL", 25, "IQ4_NL", "4.50 bpw, 32 weights from a table", attn_v="gqa4:Q5_K", ffn_down="!imatrix+eighth:Q5_K",
           attn_output=EXPERTS),
    recipe("IQ4_XS", 30, "IQ4_XS", "4.25 bpw, 256 weights from a table", attn_v="gqa4:Q5_K", ffn_down="!imatrix+eighth:Q5_K",
           attn_output=EXPERTS),
    recipe("Q4_K_S", 14, "Q4_K", "4.6 bpw", attn_v="first4:Q5_K", ffn_down="!falcon+eighth:Q5_K", attn_output=EXPERTS),
    recipe("Q4_K_M", 15, "Q4_K", "4.85 bpw, mixed with Q6_K: the usual choice", attn_v="more_bits:Q6_K",
           ffn_down="falcon+sixteenth:Q6_K falcon+more_bits:Q5_K falcon:base more_bits:Q6_K", attn_output=EXPERTS),
    recipe("Q5_K_S", 16, "Q5_K", "5.5 bpw"),
    recipe("Q5_K_M", 17, "Q5_K", "5.7 bpw, mixed with Q6_K", attn_v="more_bits:Q6_K", ffn_down="more_bits:Q6_K"),
    recipe("Q6_K", 18, "Q6_K", "6.56 bpw"),
    recipe("Q8_0", 7, "Q8_0", "8.50 bpw", output="Q8_0"),
    recipe("F16", 1, "F16", "16 bits"),
    recipe("BF16", 32, "BF16", "16 bits, the range of F32"),
    recipe("F32", 0, "F32", "32 bits"),
    Recipe("COPY", 0, "", "copies every tensor as it is"),
)

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
BY_NAME = {r.name: r for r in RECIPES}


def find(which: str | int) -> Recipe:
    """A recipe by name (any case) or by its general.file_type number. PyggmlError names the known ones."""
    text = str(which).strip().upper()
    name = ALIASES.get(text, text)
    found = BY_NAME.get(name) or next((r for r in RECIPES if r.base and text == str(r.id)), None)
    own = TYPE_BY_NAME.get(text)
    if found is None and own is not None and own.user_defined:
        return Recipe(own.name, own.id, own.name, "a type defined in Python", output=own.name)
    if found is None:
        raise PyggmlError(f"the recipe {which!r} is unknown; known are {', '.join(BY_NAME)}")
    return found


# ---- what no recipe touches, and what depends on more than the recipe --------------------------------------------------------------

# Fragments of names of matrices that stay as they are: routers, positions, and matrices that are too small to gain anything.
KEEP = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj", "ssm_conv1d",
    "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight",
    *(f"time_mix_{part}.weight" for part in ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2", "decay_w1",
                                             "decay_w2", "lerp_fused")),
    ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook",
    "mm.a.code_embd",
)
KEEP_WHOLE = ("position_embd.weight", "token_types.weight")
KEEP_OF_ARCH = {
    "glm5-next": ("hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate", "indexer_compressor_ape",
                  "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight", "ssm_beta.weight", "attn_kv_a_mqa.weight",
                  "attn_k_b.weight", "attn_v_b.weight"),
}
AT_LEAST_Q8_0 = {"glm5-next": ("attn_q_a", "attn_q_b", "nextn.eh_proj")}
# Three-dimensional tensors are experts, except in architectures that also stack other matrices.
EXPERT_ROLES = {"bailingmoe3": ("ffn_up", "ffn_gate", "ffn_down")}

# Large models whose value matrices are small, because many heads share them: architecture -> layers.
SHARED_VALUES = {"llama": 80, "deci": 80, "jais2": 68, "olmo": 80, "qwen2": 80}
SHARED_VALUES_GET = {"Q3_K": "Q5_K", "Q4_K": "Q5_K"}

# What a type becomes when the rows of a tensor do not divide into its blocks; F16 when they do not divide into these either.
FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q1_0", "Q2_0", "NVFP4", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}
LAST_RESORT = "F16"

# Types too coarse to be chosen without knowing which columns matter (not for the token table and the output).
NEEDS_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
