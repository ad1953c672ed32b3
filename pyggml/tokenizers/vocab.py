"""What a GGUF file says about its vocabulary, read and validated once: texts, scores, types, special tokens, options.

Everything that comes from outside is checked here; the tokenizers trust it. Rules that GGUF leaves to the reader (which
texts end a generation, which types count as control) follow llama.cpp, whose files these are.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntFlag
from typing import Any

import numpy as np

from pyggml.errors import ModelError
from pyggml.formats.show import SHOWN_TEXT, quoted
from pyggml.tokenizers.table import Strings, make_table, strings

PREFIX = "tokenizer.ggml."


class Attr(IntFlag):
    """What a token is. LSTRIP and RSTRIP: text around it loses the white space on that side."""

    UNKNOWN, UNUSED, NORMAL, CONTROL, USER_DEFINED, BYTE, LSTRIP, RSTRIP = (1 << i for i in range(8))


# tokenizer.ggml.token_type -> Attr; any other number counts as undefined (0)
TOKEN_TYPES = {1: Attr.NORMAL, 2: Attr.UNKNOWN, 3: Attr.CONTROL, 4: Attr.USER_DEFINED, 5: Attr.UNUSED, 6: Attr.BYTE}

# Special token -> the key that names it (the later one wins), and the texts that mean it when no key does (first come, first served).
SPECIAL: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bos": (("bos_token_id",), ()),
    "eos": (("eos_token_id",), ()),
    "eot": (("eot_token_id",), (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]",
        "<｜end▁of▁sentence｜>", "<end_of_utterance>")),
    "eom": (("eom_token_id",), ("<|eom_id|>",)),
    "unk": (("unknown_token_id",), ()),
    "sep": (("seperator_token_id",), ()),           # the key is spelled so in GGUF
    "pad": (("padding_token_id",), ()),
    "mask": (("mask_token_id",), ()),
    "fim_pre": (("fim_pre_token_id", "prefix_token_id"), (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>", "<|prefix|>")),
    "fim_suf": (("fim_suf_token_id", "suffix_token_id"), (
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>")),
    "fim_mid": (("fim_mid_token_id", "middle_token_id"), (
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>", "<|middle|>")),
    "fim_pad": (("fim_pad_token_id",), ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")),
    "fim_rep": (("fim_rep_token_id",), ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")),
    "fim_sep": (("fim_sep_token_id",), ("<|file_sep|>",)),
}
# Texts that end a generation wherever they appear in a vocabulary, beside the special tokens of END_SPECIAL
END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>", "</s>",
    "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~[")
END_SPECIAL = ("fim_pad", "fim_rep", "fim_sep", "eos", "eot", "eom")
# Messages of gpt-oss have structure that its users parse: these are text, not control
ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
# A text that does not end generations where one text of every group on the left does, and the attribute it then has
NOT_ENDS = (((("<|return|>", "<|flush|>"), ("<|call|>", "<|calls|>")), "<|end|>", Attr.USER_DEFINED),
            ((("<|tool_response>", "<|plamo:eos|>"),), "</s>", Attr.NORMAL))


class Vocab:
    """The vocabulary of one file.

    tokens: texts by id, as stored; table: text -> id; scores float32 (n,); attrs uint8 (n,) of Attr bits;
    special: name of SPECIAL -> id or None; eog: ids that end a generation; options: booleans such as add_bos.
    """

    def __init__(self, kv: Mapping[str, Any], special: Mapping[str, int], options: Mapping[str, bool]) -> None:
        """special and options: the model's defaults, which the file's keys override."""
        self.kv = kv
        self.tokens = self._read_tokens()
        self.table, duplicate = make_table(self.tokens)
        if duplicate >= 0:
            text = self.tokens[duplicate]
            first = self.table.find(text)
            raise ModelError(f"{PREFIX}tokens: {text[:SHOWN_TEXT]!r} stands for both id {first} and {duplicate}; the vocabulary is damaged")
        self.scores = self._read_scores()
        self.attrs = self._read_types()
        self.options = {name: self._flag(name, default) for name, default in options.items()}
        self.special = {name: self._special_id(name, special.get(name)) for name in SPECIAL}
        self._complete_special()
        self.eog = self._end_of_generation()
        self._strip_rules()
        for flag, name in (("add_bos", "bos"), ("add_eos", "eos"), ("add_sep", "sep")):
            if self.options.get(flag) and self.special[name] is None:
                raise ModelError(f"{PREFIX}{flag}_token is true but {PREFIX}{SPECIAL[name][0][0]} is missing; set that key in the file")

    def __len__(self) -> int:
        return len(self.tokens)

    def find(self, text: str | bytes) -> int | None:
        """The id of the token with this text, or None."""
        found = self.table.find(text.encode() if isinstance(text, str) else text)
        return None if found < 0 else found

    def ids_with(self, attr: int) -> list[int]:
        """Ids of the tokens that have any of these attributes, rising."""
        return np.flatnonzero(self.attrs & attr).tolist()

    def byte_value(self, id: int) -> int:
        """The byte that a token of type BYTE stands for; its text is `<0xHH>`."""
        text = self.tokens[id]
        digits = text[3:5]
        if len(text) == 6 and text[:3] == b"<0x" and text[5:] == b">" and digits.isalnum():
            try:
                return int(digits, 16)
            except ValueError:
                pass
        raise ModelError(f"{PREFIX}tokens: id {id} is of type byte, but {text[:SHOWN_TEXT]!r} is not one of <0x00> to <0xFF>; "
                         "the vocabulary is damaged")

    # ---- reading -------------------------------------------------------------------------------------------------------------
    def array(self, key: str, what: str) -> Any:
        """A required array of the vocabulary; `what` is said when it is missing."""
        value = self.kv.get(PREFIX + key)
        if value is None:
            raise ModelError(f"{PREFIX}{key} is missing: {what}; convert the model again, or use a file that has its vocabulary")
        return value

    def _read_tokens(self) -> Strings:
        tokens = strings(self.array("tokens", "the file has no vocabulary"), PREFIX + "tokens")
        empty = np.flatnonzero(tokens.sizes() == 0)
        if len(empty):                              # an empty text cannot be told from its neighbours: give it a name of its own
            named = tokens.tolist()
            for i in empty.tolist():
                named[i] = b"[EMPTY_%d]" % i
            tokens = strings(named, PREFIX + "tokens")
        if not len(tokens):
            raise ModelError(f"{PREFIX}tokens is empty; convert the model again")
        return tokens

    def _numbers(self, key: str, kinds: str, dtype: type, default: float) -> np.ndarray:
        """An optional array of one number per token. kinds: numpy types that the file's array may have, as in `f4 i4`."""
        value = self.kv.get(PREFIX + key)
        n = len(self.tokens)
        if value is None:
            return np.full(n, default, dtype)
        array = np.asarray(value)
        found = array.dtype.newbyteorder("=").str[1:]
        allowed = kinds.split() if isinstance(value, np.ndarray) else [kind[0] + "8" for kind in kinds.split()]     # a list: 8 bytes
        if array.ndim != 1 or found not in allowed:
            raise ModelError(f"{PREFIX}{key} holds {array.dtype} values, not one number per token ({kinds.replace(' ', ' or ')}); "
                             "the vocabulary is damaged")
        if len(array) < n:
            raise ModelError(f"{PREFIX}{key} has {len(array)} entries for {n} tokens; the vocabulary is damaged")
        return np.ascontiguousarray(array[:n].astype(dtype))

    def _read_scores(self) -> np.ndarray:
        scores = self._numbers("scores", "f4 i4", np.float32, 0.0)
        bad = np.flatnonzero(np.isnan(scores))
        if len(bad):
            raise ModelError(f"{PREFIX}scores: the score of id {bad[0]} is not a number; the vocabulary is damaged")
        return scores

    def _read_types(self) -> np.ndarray:
        attr_of = np.zeros(256, np.uint8)
        for number, attr in TOKEN_TYPES.items():
            attr_of[number] = attr
        types = self._numbers("token_type", "i4 u4", np.int64, 1)
        return attr_of[np.where((types >= 0) & (types < 256), types, 0)]

    def _flag(self, name: str, default: bool) -> bool:
        value = self.kv.get(PREFIX + OPTION_KEYS.get(name, name), default)
        if not isinstance(value, (bool, np.bool_, int, np.integer)):
            raise ModelError(f"{PREFIX}{OPTION_KEYS.get(name, name)} is {quoted(value)}, not true or false; correct that key in the file")
        return bool(value)

    def _special_id(self, name: str, default: int | None) -> int | None:
        """The id that the keys name; the default when they name none, or one outside the vocabulary."""
        n, chosen = len(self.tokens), default
        if chosen is not None and chosen >= n:
            chosen = None
        for key in SPECIAL[name][0]:
            value = self.kv.get(PREFIX + key)
            if isinstance(value, (int, np.integer)) and 0 <= value < n:
                chosen = int(value)
        return chosen

    # ---- rules the file leaves to its reader -----------------------------------------------------------------------------------
    def _complete_special(self) -> None:
        for name, (_, texts) in SPECIAL.items():
            if self.special[name] is None:
                self.special[name] = next((id for text in texts if (id := self.find(text)) is not None), None)
                if self.special[name] is not None:
                    self.attrs[self.special[name]] |= Attr.CONTROL

    def _end_of_generation(self) -> frozenset[int]:
        present = {text: id for text in END_TEXTS if (id := self.find(text)) is not None}
        for id in present.values():
            self.attrs[id] |= Attr.CONTROL
        for text in ALWAYS_SHOWN:
            if (id := self.find(text)) is not None:
                self.attrs[id] = Attr.USER_DEFINED
        ends = {*present.values(), *(id for name in END_SPECIAL if (id := self.special[name]) is not None)}
        end_texts = {self.tokens[id].decode("utf-8", "replace"): id for id in ends}
        for groups, text, attr in NOT_ENDS:
            if text in end_texts and all(any(other in end_texts for other in group) for group in groups):
                ends.discard(end_texts[text])
                self.attrs[end_texts[text]] = attr
        return frozenset(ends)

    def _strip_rules(self) -> None:
        """Files do not say which special tokens swallow white space around them: it is known by name."""
        pre, arch = str(self.kv.get(PREFIX + "pre", "")), str(self.kv.get("general.architecture", ""))
        name = str(self.kv.get("general.name", "")).lower()
        if any(known in pre for known in ("jina-v2-de", "jina-v2-es", "jina-v2-code")) or any(
                known in arch for known in ("nomic-bert-moe", "jina-bert-v3")):
            self._set(Attr.LSTRIP, "<mask>")
        elif "phi-3" in name or "phi3" in name:
            self.attrs[self.ids_with(Attr.CONTROL | Attr.USER_DEFINED | Attr.UNKNOWN)] |= np.uint8(Attr.RSTRIP)
            self._set(Attr.RSTRIP, "</s>")
            for text in ("<unk>", "<s>", "<|endoftext|>"):
                if (id := self.find(text)) is not None:
                    self.attrs[id] &= ~np.uint8(Attr.RSTRIP)
        elif "modern-bert" in name:
            self._set(Attr.LSTRIP, "[MASK]")

    def _set(self, attr: Attr, text: str) -> None:
        if (id := self.find(text)) is not None:
            self.attrs[id] |= attr


# Option -> its key under tokenizer.ggml., where that is not the option's own name
OPTION_KEYS = {"add_bos": "add_bos_token", "add_eos": "add_eos_token", "add_sep": "add_sep_token", "lowercase": "normalizer.lowercase",
               "strip_accents": "normalizer.strip_accents"}
