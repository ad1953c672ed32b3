"""How long a vocabulary takes to be ready, and how fast text becomes ids and ids become text.

    python tools/bench/tokenizer_speed.py VOCAB.gguf TEXT [TEXT ...]

Every figure is the best of --runs; with llama-cpp-python installed, llama.cpp's on the same file stands beside it.
"""

import argparse
import time
from pathlib import Path

from pyggml import formats, tokenizers


def best(runs, call):
    """(shortest time in seconds, last result) of `runs` calls."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return min(times), result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vocab")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    try:
        from llama_cpp import Llama
    except ImportError:
        Llama = None
    ready, tokenizer = best(args.runs, lambda: tokenizers.load(formats.open(args.vocab).kv))
    print(f"{args.vocab}: {tokenizer.n_vocab} tokens, open and ready in {ready * 1e3:.0f} ms")
    if Llama:
        ready, peer = best(args.runs, lambda: Llama(args.vocab, vocab_only=True, verbose=False))
        print(f"  llama.cpp {ready * 1e3:.0f} ms")
    for path in args.texts:
        text = Path(path).read_bytes()
        encoding, ids = best(args.runs, lambda: tokenizer.encode(text))  # noqa: B023
        decoding, _ = best(args.runs, lambda: tokenizer.decode(ids))  # noqa: B023
        line = f"  {path}: encode {len(text) / encoding / 1e6:.2f} MB/s, decode {len(text) / decoding / 1e6:.2f} MB/s ({len(ids)} ids)"
        if Llama:
            encoding, _ = best(1, lambda: peer.tokenize(text))  # noqa: B023
            line += f"; llama.cpp encode {len(text) / encoding / 1e6:.2f} MB/s"
        print(line)


if __name__ == "__main__":
    main()
