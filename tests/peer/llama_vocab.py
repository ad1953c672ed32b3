"""llama.cpp as an oracle for vocabularies: metadata goes into a file without tensors, texts through its tokenizer."""

import ctypes
import random
import re
import tempfile
from pathlib import Path


def cases(kv, texts):
    """llama.cpp's ids and bytes for each text: {"text", "ids_special_parse", "ids_nospecial_noparse", "detok_noparse"}."""
    import llama_cpp

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.gguf"
        _write(path, kv)
        model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    vocab = llama_cpp.llama_model_get_vocab(model._model.model)

    def ids(text, special, parse):
        data = text.encode()
        room = (ctypes.c_int32 * (2 * len(data) + 16))()
        n = llama_cpp.llama_tokenize(vocab, data, len(data), room, len(room), special, parse)
        return list(room[:n])

    def text(ids):
        room = ctypes.create_string_buffer(64 * len(ids) + 64)
        n = llama_cpp.llama_detokenize(vocab, (ctypes.c_int32 * max(1, len(ids)))(*ids), len(ids), room, len(room), False, True)
        return room.raw[:n]

    out = []
    for t in texts:
        plain = ids(t, False, False)
        out.append({"text": t, "ids_special_parse": ids(t, True, True), "ids_nospecial_noparse": plain, "detok_noparse": text(plain).hex()})
    return out


def _write(path, kv):
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", 32)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in kv.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- made-up vocabularies and texts ----------------------------------------------------------------------------------------------
CHARACTERS = [*"aAbBsStTrReEdDmMlLvVkz0123456789.,!?'-/$+<~_`|=(&*\\{}[]^%#@;:\"", *" " * 12, *"\n\n\n\n\r\t\x0b\x0c\x1c",
              *"\x85\xa0\u3000\u2028\u200béÉßǅʰªا中文字のカ가힣ㄱㅏ²½Ⅷ٣\u0301\u0903\u20dd…“”’€∑©®😀𝟘ſKœŒжЖΩωﬁⅣ๑กข॥。，、۔،！～℃ℂ㐀豈ยµ٪‰†〇々"]
PHRASES = ["it's", "I'LL", " we've", "the", " Hello", "CamelCase", "XMLHttp", "don't", "  ", "   ", "\n\n", " \n", "12345", "1234567",
           "'S ", "IMGIMGABZ", "<sentinel:12>", "    ", "हिन्दी", "中文", "!!!", "...", "123", "  12", "ab 12", "한국어", " \t\n x", "//",
           "/\n", "\r\n"]


def random_texts(seed, n):
    """Texts in which every pre-tokenizer's expressions find something to cut."""
    rng = random.Random(seed)

    def part():
        kind = rng.random()
        if kind < 0.35:
            return rng.choice(PHRASES)
        if kind < 0.45:
            return rng.choice(CHARACTERS) * rng.randint(2, 9)
        return "".join(rng.choices(CHARACTERS, k=rng.randint(1, 6)))

    return ["".join(part() for _ in range(rng.randint(1, rng.choice([3, 8, 20, 60])))) for _ in range(n)]


def merging_everything(pre, seed=7):
    """A byte-level vocabulary that merges all pairs of the bytes above, and many pairs of pairs: where words end shows in the ids."""
    from pyggml.tokenizers.merge import BYTE_CHARS

    rng = random.Random(seed)
    tokens = [chr(BYTE_CHARS[byte]) for byte in range(256)]
    used = [chr(BYTE_CHARS[byte]) for byte in sorted({byte for char in CHARACTERS for byte in char.encode()})]
    merges = [(a, b) for a in used for b in used]
    rng.shuffle(merges)
    pairs = [a + b for a, b in merges]
    merges += {(rng.choice(pairs), rng.choice(pairs + used)): None for _ in range(20_000)}
    tokens = list(dict.fromkeys([*tokens, *(a + b for a, b in merges)]))
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": [*tokens, "<mask>"],
            "tokenizer.ggml.token_type": [1] * len(tokens) + [3], "tokenizer.ggml.merges": [f"{a} {b}" for a, b in merges],
            "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.seperator_token_id": 2}


def merging_characters(seed=8):
    """A vocabulary of Gemma 4's kind: characters and their pairs, bytes as <0xHH>, runs of newlines."""
    rng = random.Random(seed)
    used = [char for char in dict.fromkeys("\u2581".join(CHARACTERS)) if char not in " 々〇豈"]
    merges = [(a, b) for a in used for b in used if rng.random() < 0.8]
    rng.shuffle(merges)
    pairs = [a + b for a, b in merges]
    merges = list(dict.fromkeys([*merges, *((rng.choice(pairs), rng.choice(pairs + used)) for _ in range(20_000))]))
    special = ["<pad>", "<eos>", "<bos>", "<turn|>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *used, *(a + b for a, b in merges), "\n" * 2, "\n" * 3]
    tokens = list(dict.fromkeys(tokens))
    return {"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": [f"{a} {b}" for a, b in merges],
            "tokenizer.ggml.token_type": [3] * 4 + [6] * 256 + [1] * (len(tokens) - 260), "tokenizer.ggml.bos_token_id": 2,
            "tokenizer.ggml.eos_token_id": 1}


def made_up(model):
    """A small "bert" or "t5" vocabulary of letters, English words and their halves."""
    rng = random.Random(11)
    words = re.findall(r"\w+", (
        "the of and to in a was on for as with by his that from at is it were an had which be this are not their one he but first who they "
        "have its also after new been two or her she has all time when other over most would there game during made year up into more can "
        "team where some no known world between season song three high used state called company being country later"))
    letters = "abcdefghijklmnopqrstuvwxyzABCE0123456789.,;:!?-'\"中文字のéßωσς"
    bert = model == "bert"
    tokens = {"[PAD]": 3, "[UNK]": 2, "[CLS]": 3, "[SEP]": 3, "[MASK]": 3}
    if not bert:
        tokens = {"<pad>": 3, "</s>": 3, "<unk>": 2, "<x>": 4, "<u>": 5}
    halves = [half for word in words for half in (word[:len(word) // 2], word[len(word) // 2:]) if half]
    tokens |= dict.fromkeys(["\u2581", *(f"\u2581{word}" for word in words), *halves, *letters, *(f"\u2581{c}" for c in letters[:40])], 1)
    if bert:
        del tokens["\u2581"]
    kv = {"tokenizer.ggml.model": model, "tokenizer.ggml.tokens": list(tokens), "tokenizer.ggml.token_type": list(tokens.values()),
          "tokenizer.ggml.scores": [round(-3 - 8 * rng.random(), 3) for _ in tokens], "tokenizer.ggml.padding_token_id": 0}
    special = {"bos": 2, "seperator": 3, "unknown": 1, "mask": 4} if bert else {"eos": 1, "unknown": 2}
    options = {} if bert else {"tokenizer.ggml.add_space_prefix": True, "tokenizer.ggml.remove_extra_whitespaces": True}
    return kv | {f"tokenizer.ggml.{name}_token_id": id for name, id in special.items()} | options


def made_up_texts():
    rng = random.Random(12)
    words = ["The", "of", "season", "HE'S", "three,", "worldly", "caf\u00e9", "\u00c9t\u00e9", "\u4e2d\u6587", "  ", "\n", "(new)",
             "[MASK]", "<x>", "</s>", "\u2581", "\u03a3\u03c3\u03c2", "a\u0000b", "\ufffd", "12.5", "\u3042\u3044", "in-game", "e\u0301"]
    return ["", " ", *(" ".join(rng.choices(words, k=rng.randint(1, 7))) for _ in range(60))]
