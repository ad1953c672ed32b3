"""Goldens for kinds of vocabularies of which no small real one is at hand: made-up tokens, llama.cpp's ids.

    PYTHONPATH=.:tests/peer python tests/golden/tokenizer/made_up.py tests/golden/tokenizer

Needs the `peer` extra (llama-cpp-python; the goldens here are by 0.3.36). Same form as what trim.py writes.
"""

import gzip
import json
import sys
from pathlib import Path

import llama_vocab

for model in ("bert", "t5"):
    kv = llama_vocab.made_up(model)
    out = {"kv": kv, "ids": list(range(len(kv["tokenizer.ggml.tokens"]))), "cases": llama_vocab.cases(kv, llama_vocab.made_up_texts())}
    with gzip.GzipFile(Path(sys.argv[1]) / f"{model}.json.gz", "wb", mtime=0) as file:
        file.write(json.dumps(out, separators=(",", ":")).encode())
