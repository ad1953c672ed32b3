"""How byte-level BPE cuts text into words before merging: a row per `tokenizer.ggml.pre`.

A row is a list of regular expressions (syntax of the `regex` package). Each cuts every piece that the ones before it left into
its matches and what lies between them. The expressions are those that the models' own tokenizers publish, in the form that
llama.cpp gives them: where it simplifies one (cases of non-ASCII letters, say), GGUF users see the simplified words.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import regex

from pyggml.errors import ModelError
from pyggml.formats import show

# ---- parts of expressions --------------------------------------------------------------------------------------------------------
ENGLISH = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"                 # contractions, either case
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"                                    # a word and the one character before it
SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"                                     # the last space before a word stays with the word
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{ENGLISH}|{LETTERS}|\p{{N}}{{1,3}}|{SYMBOLS}|{SPACES}"
QWEN2 = rf"{ENGLISH}|{LETTERS}|\p{{N}}|{SYMBOLS}|{SPACES}"
# A run of upper case then a run of lower case; letters outside ASCII count as both
UPPER, LOWER = r"[\p{L}--[a-z]]", r"[\p{L}--[A-Z]]"
UPPER_M, LOWER_M = r"[[\p{L}\p{M}]--[a-z]]", r"[[\p{L}\p{M}]--[A-Z]]"


def _camel(upper: str, lower: str, after: str = "") -> str:
    return rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{after}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{after}"


GPT4O_REST = rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
GPT4O = rf"{_camel(UPPER, LOWER, f'(?:{ENGLISH})?')}|{GPT4O_REST}"
ANY_CASE = r"[\p{L}\p{M}]"
PUNCTUATION_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
KANJI_KANA = r"[\u4e00-\u9fa5\u3040-\u30ff]+"
DEEPSEEK3 = [r"\p{N}{1,3}", KANJI_KANA, rf"{PUNCTUATION_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}"]
# Digits in threes counted from the right; what stands before the first group stays with it until the next expression
THOUSANDS = r"(?:(?<!\p{N})|\P{N}++)\p{N}{1,2}(?=(?:\p{N}{3})++(?!\p{N}))|\P{N}*+\p{N}{1,3}|\P{N}+"
# Cuts only before groups of three ASCII digits counted from the right: what is between two such runs stays with the run before it
_GROUPS = r"(?=(?:[0-9]{3})++(?![0-9]))"
_BETWEEN = rf"(?:[^0-9]++[0-9]{{1,2}}(?![0-9]))*+(?:[^0-9]++(?:[0-9]{{1,2}}{_GROUPS})?)?"
ASCII_THOUSANDS = rf"(?<![0-9])[0-9]{{1,2}}{_GROUPS}|[0-9]{{3}}(?=[0-9])|[0-9]{{3}}{_BETWEEN}|[0-9]{{1,2}}{_BETWEEN}|(?=[^0-9]){_BETWEEN}"
LINES = r"[^\n]+|\n+"
SENTENCES = r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
HAN = r"[\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002ebef\uf900-\ufaff\U0002f800-\U0002fa1f]"
NOT_HAN = rf"[\p{{L}}--{HAN}]"
CASED = (                       # Latin, Greek, Cyrillic, Georgian, Cherokee and other cased letters, as deepseek-llm lists them
    r"A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f"
    r"\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    r"\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    r"\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    r"\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184"
    r"\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    r"\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    r"\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943")
ASIAN_SCRIPTS = (
    r"[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff"
    r"\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+")
HANGUL_KANJI = r"[[\u0800-\u9fa5\uac00-\ud7ff]--\s]+"        # white space is never part of a range


# ---- the table -------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PreTokenizer:
    """How text becomes words, and what goes with it.

    patterns: see above. whole_words: which words that are tokens are those tokens, whatever the merges say. clean_spaces: decoding
    closes up the space before `? ! . ,` and some contractions. byte_level: words are bytes in GPT-2's alphabet; otherwise
    characters, with U+2581 for a space when escape_spaces. adds: add_bos and its like, true unless the file says otherwise.
    """

    patterns: Sequence[str]
    whole_words: str = "never"
    clean_spaces: bool = True
    byte_level: bool = True
    escape_spaces: bool = False
    adds: tuple[str, ...] = ()


def _row(*patterns: str, clean_spaces: bool = False, **options: object) -> PreTokenizer:
    return PreTokenizer(patterns, clean_spaces=clean_spaces, **options)  # type: ignore[arg-type]


_GPT2 = _row(GPT2, clean_spaces=True)
_DIGITS = _row(r"\p{N}", GPT2, clean_spaces=True)
_LLAMA3 = _row(LLAMA3, clean_spaces=True, whole_words="always", adds=("add_bos",))
_QWEN2 = _row(QWEN2)
_GPT4O = _row(GPT4O)

_ROWS: dict[str, PreTokenizer] = {
    "default": _row(r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]", clean_spaces=True),
    "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert mpt olmo jais exaone4": _GPT2,
    "jina-v1-en jina-v2-code roberta-bpe": _row(GPT2, clean_spaces=True, adds=("add_sep",)),
    "trillion granite-docling": _row(GPT2),
    "starcoder refact codeshell exaone minerva-7b mellum2": _DIGITS,
    "command-r smollm": _row(r"\p{N}", GPT2),
    "falcon": _row(r"[\p{P}$+<=>^~|`]+", GPT2, r"[0-9][0-9][0-9]", clean_spaces=True),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": _LLAMA3,
    "dbrx smaug-bpe glm4 chatglm-bpe": _row(LLAMA3, clean_spaces=True),
    "jais-2": _row(rf"{ENGLISH}|{LETTERS}|\p{{N}}{{1,3}}|{SYMBOLS}|\s*[\r\n]+|" + "|".join(
        rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s", clean_spaces=True),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 hunyuan solar-open grok-2": _QWEN2,
    "stablelm2 megrez": _row(QWEN2, clean_spaces=True),
    "qwen35": _row(rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}"),
    "ufakzeka": _row(rf"{LETTERS}|\p{{N}}|{SYMBOLS}|{SPACES}"),
    "laguna": _row(LINES, QWEN2),
    "seed-coder": _row(rf"{ENGLISH}|{LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}"),
    "bailingmoe bailingmoe2 llada-moe": _row(rf"{ENGLISH}|{LETTERS}|\p{{N}}|{SYMBOLS}|\s*[\r\n]|\s+(?!\S)|\s+"),
    "exaone-moe": _row(rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?"
                       r"|\s*[\r\n]|\s+(?!\S)|\s+", clean_spaces=True),
    "minicpm5": _row(r"\p{N}{1,3}", rf"{ENGLISH}|{LETTERS}|\p{{N}}+|{SYMBOLS}|{SPACES}", clean_spaces=True, whole_words="always"),
    "gpt-4o llama4 kanana2 talkie minimax-m2": _GPT4O,
    "granite-embed-multi-97m": _row(rf"{_camel(UPPER_M, LOWER_M, f'(?:{ENGLISH})?')}|{GPT4O_REST}", whole_words="always"),
    "tekken": _row(rf"{_camel(UPPER, LOWER)}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}", whole_words="always", adds=("add_bos",)),
    "tiny_aya cohere2moe": _row(THOUSANDS, rf"{_camel(ANY_CASE, ANY_CASE, f'(?:{ENGLISH})?')}|{GPT4O_REST}"),
    "youtu": _row(r"[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
                  rf"|[\u3105-\u312f]+|{KANJI_KANA}",
                  rf"{_camel(ANY_CASE, ANY_CASE, f'(?:{ENGLISH})?')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}",
                  whole_words="always"),
    "deepseek-llm": _row(r"[\r\n]", rf"\s?[{CASED}]+", r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001-\u3002]+", r"\s+$",
                         HANGUL_KANJI, r"\p{N}+"),
    "deepseek-coder": _row(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HANGUL_KANJI, r"\p{N}"),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": _row(*DEEPSEEK3),
    "spark2_5": _row(*DEEPSEEK3[:2], rf"{PUNCTUATION_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+", r"\p{N}"),
    "afmoe": _row(THOUSANDS, ASIAN_SCRIPTS, DEEPSEEK3[2]),
    "kimi-k2": _row(rf"{HAN}+|[^\r\n\p{{L}}\p{{N}}]?{NOT_HAN}+(?:{ENGLISH})?|\p{{N}}{{1,3}}|{SYMBOLS}|{SPACES}"),
    "poro-chat": _row(SENTENCES),
    "bloom gpt3-finnish": _row(SENTENCES, clean_spaces=True),
    "viking": _row(SENTENCES, r"\p{N}"),
    "chameleon": _row(r"<sentinel:[0-9]+>", r"IMGIMG[A-I]{1,4}Z", r"[\t\n]|    |  ", r"\p{N}", r"[\p{P}!-/:-@\[-`{-~]", GPT2,
                      adds=("add_bos",)),
    "superbpe": _row(r"\p{N}+", ASCII_THOUSANDS),
    "gemma4 granite-embed-multi-311m": _row(LINES, clean_spaces=True, byte_level=False, escape_spaces=True, whole_words="newlines"),
    "sarvam-moe": _row(LINES, byte_level=False, escape_spaces=True),
}
PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: row for names, row in _ROWS.items() for name in names.split()}


def pre_tokenizer(name: Any) -> PreTokenizer:
    """The row for a file's `tokenizer.ggml.pre`; a file without one (None) gets "default", as in llama.cpp. ModelError for anything else."""
    row = PRE_TOKENIZERS.get(name or "default") if name is None or isinstance(name, str) else None
    if row is None:
        near = difflib.get_close_matches(name[:show.SHOWN_TEXT], PRE_TOKENIZERS, 3, 0) if isinstance(name, str) else ()
        raise ModelError(f"tokenizer.ggml.pre is {show.quoted(name)}, none of the {len(PRE_TOKENIZERS)} pre-tokenizers that pyggml knows"
                         f"{'; most like it: ' if near else ''}{', '.join(near)}; if the model has one of them, name it with `pyggml edit`")
    return row


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(f"({pattern})", regex.V1)


def words(text: str, patterns: Sequence[str]) -> np.ndarray:
    """The lengths in characters of the words of `text`, int32 (n,); they cover it."""
    pieces = _compiled(patterns[0]).findall(text)
    if sum(map(len, pieces)) != len(text):              # its matches do not cover the text: what is between them counts too
        pieces = [text]
    else:
        patterns = patterns[1:]
    for pattern in patterns:
        cut = _compiled(pattern).split
        pieces = [part for piece in pieces for part in (cut(piece) if len(piece) > 1 else (piece,)) if part]
    return np.fromiter(map(len, pieces), np.int32, len(pieces))
