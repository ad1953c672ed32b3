"""Cut a real vocabulary down to what a set of texts can touch, and keep llama.cpp's ids of those texts with it.

    python tests/golden/tokenizer/trim.py VOCAB.gguf CASES.json OUT.json.gz

CASES.json: {"cases": [{"text", "ids_{special,nospecial}_{parse,noparse}", "detok_{parse,noparse}"}]} with ids by llama_tokenize
(llama.cpp of llama_cpp_python 0.3.36; `special`: add_special, `parse`: parse_special) and the hex of llama_detokenize of the
`nospecial` ids. A token stays when its text occurs in one of the texts (as that vocabulary spells them) or when it is not a normal token, a
merge when its result occurs: what is left out could not have been considered, so ids do not change but for their numbering.
`ids` in the output are the original numbers of the tokens that are left.
"""

import gzip
import json
import sys

from pyggml import formats
from pyggml.tokenizers.merge import BYTE_CHARS


def main(vocab_path, cases_path, out_path):
    kv = formats.open(vocab_path).kv
    with open(cases_path) as file:
        cases = json.load(file)["cases"]
    texts = [case["text"] for case in cases]
    bpe = kv["tokenizer.ggml.model"] == "gpt2"
    if bpe:
        texts = ["".join(chr(BYTE_CHARS[byte]) for byte in text.encode()) for text in texts]
    else:
        texts += [text.replace(" ", "\u2581") for text in texts]
    everything = "\n".join(texts)
    tokens, types = list(kv["tokenizer.ggml.tokens"]), [int(t) for t in kv["tokenizer.ggml.token_type"]]
    ids = [i for i, token in enumerate(tokens) if len(token) == 1 or types[i] != 1 or token.lstrip("\u2581") in everything]
    new = {id: i for i, id in enumerate(ids)}
    named = ("general.name", "general.architecture")
    keep = {key: value for key, value in kv.items()
            if key in named or key.startswith("tokenizer.ggml.") and isinstance(value, (str, bool, int, float))}
    for key in keep:
        if key.endswith("_token_id"):
            keep[key] = new[keep[key]]
    keep["tokenizer.ggml.tokens"] = [tokens[i] for i in ids]
    keep["tokenizer.ggml.token_type"] = [types[i] for i in ids]
    if bpe:
        keep["tokenizer.ggml.merges"] = [merge for merge in kv["tokenizer.ggml.merges"] if merge.replace(" ", "") in everything]
    else:
        keep["tokenizer.ggml.scores"] = [float(kv["tokenizer.ggml.scores"][i]) for i in ids]
    out = json.dumps({"kv": keep, "ids": ids, "cases": cases}, ensure_ascii=True, separators=(",", ":"))
    with gzip.GzipFile(out_path, "wb", mtime=0) as file:
        file.write(out.encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
