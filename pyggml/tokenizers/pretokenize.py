"""How byte-level BPE cuts text into words before merging: a row per `tokenizer.ggml.pre`.

A row is a list of regular expressions (syntax of the `regex` package). Each cuts every piece that the ones before it left into
its matches and what lies between them. The expressions are those that the models' own tokenizers publish, in the form that
llama.cpp gives them: where it simplifies one (cases of non-ASCII letters, say), GGUF users see the simplified words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import regex

from pyggml.errors import ModelError

# ---- parts of expressions --------------------------------------------------------------------------------------------------------
ENGLISH = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"                 # contractions, either case
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"                                    # a word and the one character before it
SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"                                     # the last space before a word stays with the word
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
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
DEEPSEEK3 = [r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", rf"{PUNCTUATION_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}"]
# Digits in threes counted from the right; what stands before the first group stays with it until the next expression
THOUSANDS = r"(?:(?<!\p{N})|\P{N}++)\p{N}{1,2}(?=(?:\p{N}{3})+(?!\p{N}))|\P{N}*+\p{N}{1,3}|\P{N}+"
LINES = r"[^\n]+|\n+"
SENTENCES = r" ?[^(\s|.,!?…。，、।۔،)]+"
HAN = r"[\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002ebef\uf900-\ufaff\U0002f800-\U0002fa1f]"
NOT_HAN = rf"[\p{{L}}--{HAN}]"
CYRILLIC_AND_LATIN = (          # cased letters, as deepseek-llm lists them
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝ"
    "ℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃")
ASIAN_SCRIPTS = "[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+"


# ---- the table -------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PreTokenizer:
    """How text becomes words, and what goes with it.

    patterns: see above. whole_words: a word that is a token is that token, whatever the merges say. clean_spaces: decoding
    closes up the space before `? ! . ,` and some contractions. byte_level: words are bytes in GPT-2's alphabet; otherwise
    characters, with U+2581 for a space when escape_spaces. adds: add_bos and its like, true unless the file says otherwise.
    """

    patterns: Sequence[str]
    whole_words: bool = False
    clean_spaces: bool = True
    byte_level: bool = True
    escape_spaces: bool = False
    adds: tuple[str, ...] = ()


def _row(*patterns: str, clean_spaces: bool = False, **options: object) -> PreTokenizer:
    return PreTokenizer(patterns, clean_spaces=clean_spaces, **options)  # type: ignore[arg-type]


_GPT2 = _row(GPT2, clean_spaces=True)
_DIGITS = _row(r"\p{N}", GPT2, clean_spaces=True)
_LLAMA3 = _row(LLAMA3, clean_spaces=True, whole_words=True, adds=("add_bos",))
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
    "minicpm5": _row(r"\p{N}{1,3}", rf"{ENGLISH}|{LETTERS}|\p{{N}}+|{SYMBOLS}|{SPACES}", clean_spaces=True, whole_words=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": _GPT4O,
    "granite-embed-multi-97m": _row(rf"{_camel(UPPER_M, LOWER_M, f'(?:{ENGLISH})?')}|{GPT4O_REST}", whole_words=True),
    "tekken": _row(rf"{_camel(UPPER, LOWER)}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}", whole_words=True, adds=("add_bos",)),
    "tiny_aya cohere2moe": _row(THOUSANDS, rf"{_camel(ANY_CASE, ANY_CASE, f'(?:{ENGLISH})?')}|{GPT4O_REST}"),
    "youtu": _row(r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
                  rf"{_camel(ANY_CASE, ANY_CASE, f'(?:{ENGLISH})?')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}", whole_words=True),
    "deepseek-llm": _row(r"[\r\n]", rf"\s?[{CYRILLIC_AND_LATIN}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}+"),
    "deepseek-coder": _row(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": _row(*DEEPSEEK3),
    "spark2_5": _row(*DEEPSEEK3[:2], rf"{PUNCTUATION_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+", r"\p{N}"),
    "afmoe": _row(THOUSANDS, ASIAN_SCRIPTS, DEEPSEEK3[2]),
    "kimi-k2": _row(rf"{HAN}+|[^\r\n\p{{L}}\p{{N}}]?{NOT_HAN}+(?:{ENGLISH})?|\p{{N}}{{1,3}}|{SYMBOLS}|{SPACES}"),
    "poro-chat": _row(SENTENCES),
    "bloom gpt3-finnish": _row(SENTENCES, clean_spaces=True),
    "viking": _row(SENTENCES, r"\p{N}"),
    "chameleon": _row(r"<sentinel:[0-9]+>", r"IMGIMG[A-I]{1,4}Z", r"[\t\n]|    |  ", r"\p{N}", r"[\p{P}!-/:-@\[-`{-~]", GPT2, adds=("add_bos",)),
    "superbpe": _row(r"\p{N}+", r"(?=(?:[0-9]{3})+(?![0-9]))"),
    "gemma4 granite-embed-multi-311m": _row(LINES, clean_spaces=True, byte_level=False, escape_spaces=True),
    "sarvam-moe": _row(LINES, byte_level=False, escape_spaces=True),
}
PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: row for names, row in _ROWS.items() for name in names.split()}


def pre_tokenizer(name: str | None) -> PreTokenizer:
    """The row for a file's `tokenizer.ggml.pre`; a file without one gets "default", as in llama.cpp."""
    row = PRE_TOKENIZERS.get(name or "default")
    if row is None:
        raise ModelError(f"tokenizer.ggml.pre is {name!r}, a pre-tokenizer that pyggml does not know; it knows {', '.join(sorted(PRE_TOKENIZERS))}")
    return row


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(f"({pattern})", regex.V1)


def words(text: str, patterns: Sequence[str]) -> np.ndarray:
    """The lengths in characters of the words of `text`, int32 (n,); they cover it."""
    pieces: list[str] = [text]
    for pattern in patterns:
        split = _compiled(pattern).split
        pieces = [part for piece in pieces for part in split(piece)]
    return np.fromiter(map(len, pieces), np.int32, len(pieces))
