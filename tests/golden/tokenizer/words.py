"""Word lengths of every pre-tokenizer for texts that exercise them, so that a change of words is seen where llama.cpp is not installed.

    PYTHONPATH=.:tests/peer python tests/golden/tokenizer/words.py > tests/golden/tokenizer/words.json

Run it only when tests/peer/test_vocabularies.py passes: there llama.cpp's ids decide.
"""

import json
import sys

import llama_vocab

from pyggml.tokenizers.pretokenize import PRE_TOKENIZERS, words

TEXTS = ["Hello, World! It's 3 o'clock; I'LL go.", "  two  spaces\n\n and\r\n lines \t end ", "x = foo(bar[12345], 'a')  # 1,234,567.89",
         "XMLHttpRequest camelCase snake_case éÉß", "中文字 のカナ 한국어 हिन्दी ไทย ٣٤ ²½ Ⅷ", "😀👍🏽 €10 ©2024 …“q”",
         "<sentinel:12>IMGIMGABZ    end", "a\u3000b\xa0c\u2028d\x85e\x1cf", "1234567 12 123 1 1234", "don't 'S we'VE\u2019s",
         *(text for text in llama_vocab.random_texts(5, 120) if len(text) < 80)][:60]
NAMES = sorted({row.patterns: name for name, row in PRE_TOKENIZERS.items()}.values())
LENGTHS = {name: [[n for n in words(text, PRE_TOKENIZERS[name].patterns).tolist() if n] for text in TEXTS] for name in NAMES}
json.dump({"texts": TEXTS, "words": LENGTHS}, sys.stdout, separators=(",", ":"))
