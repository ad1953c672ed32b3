"""llama-bench's measurement through the llama_cpp package, for machines without a llama-bench binary.

Takes llama-bench's flags and prints its JSON rows, so that peers.py treats it as one more llama-bench. Same semantics: random
tokens, a warm-up, logits of the last token of a batch only, the depth filled before the clock starts; loading is not timed.
Two more uses: `--logits FILE` writes the logits of given tokens, `--first-token TEXT` prints the greedy continuation of a prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from ctypes import c_char_p, c_void_p, create_string_buffer
from itertools import product

import llama_cpp as api
import numpy as np

FLASH_ATTENTION = {"0": api.LLAMA_FLASH_ATTN_TYPE_DISABLED, "off": api.LLAMA_FLASH_ATTN_TYPE_DISABLED,
                   "1": api.LLAMA_FLASH_ATTN_TYPE_ENABLED, "on": api.LLAMA_FLASH_ATTN_TYPE_ENABLED, "auto": api.LLAMA_FLASH_ATTN_TYPE_AUTO}
CACHE_TYPES = {name.lower(): getattr(api, f"GGML_TYPE_{name}") for name in ("F32", "F16", "Q8_0", "Q4_0")}
ERROR = 4               # ggml_log_level


@api.llama_log_callback
def _only_errors(level: int, text: bytes, user_data: c_void_p) -> None:
    if level == ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def _ints(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--version", action="version", version=f"llama_cpp {api.__version__}")
    add("-m", "--model", required=True)
    add("-p", "--n-prompt", type=_ints, default=[512])
    add("-n", "--n-gen", type=_ints, default=[128])
    add("-d", "--n-depth", type=_ints, default=[0])
    add("-b", "--batch-size", type=int, default=2048)
    add("-ub", "--ubatch-size", type=int, default=512)
    add("-t", "--threads", type=int, default=1)
    add("-r", "--repetitions", type=int, default=5)
    add("-fa", "--flash-attn", choices=FLASH_ATTENTION, default="auto")
    add("-ctk", "--cache-type-k", choices=CACHE_TYPES, default="f16")
    add("-ctv", "--cache-type-v", choices=CACHE_TYPES, default="f16")
    add("--repack", type=int, choices=(0, 1), default=1)
    add("-mmp", "--mmap", type=int, choices=(0, 1), default=1)
    add("-o", "--output", choices=["json"], default="json")
    add("--logits", metavar="FILE", help="write logits (tokens, vocabulary) as .npy instead of measuring")
    add("--tokens", type=_ints, default=[], help="with --logits: the tokens, comma-separated")
    add("--first-token", metavar="TEXT", help="print the greedy continuation of TEXT, -n tokens of it, instead of measuring")
    return parser.parse_args(argv)


def open_model(options: argparse.Namespace):
    params = api.llama_model_default_params()
    params.n_gpu_layers, params.use_extra_bufts = 0, bool(options.repack)
    params.load_mode = api.LLAMA_LOAD_MODE_MMAP if options.mmap else api.LLAMA_LOAD_MODE_NONE
    model = api.llama_model_load_from_file(options.model.encode(), params)
    if not model:
        sys.exit(f"llama_cpp cannot load {options.model}")
    return model


def open_context(model, options: argparse.Namespace, n_ctx: int):
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, options.batch_size, options.ubatch_size
    params.n_threads = params.n_threads_batch = options.threads
    params.flash_attn_type = FLASH_ATTENTION[options.flash_attn]
    params.type_k, params.type_v = CACHE_TYPES[options.cache_type_k], CACHE_TYPES[options.cache_type_v]
    context = api.llama_init_from_model(model, params)
    if not context:
        sys.exit(f"llama_cpp cannot make a context of {n_ctx} tokens for {options.model}")
    return context


def decode(context, tokens: np.ndarray, n_batch: int) -> None:
    """Run tokens (int32) after what the cache holds, in batches; logits of the last token of each batch."""
    for start in range(0, len(tokens), n_batch):
        part = np.ascontiguousarray(tokens[start:start + n_batch], np.int32)
        if api.llama_decode(context, api.llama_batch_get_one(part.ctypes.data_as(api.llama_token_p), len(part))):
            sys.exit(f"llama_decode failed at token {start}")
    api.llama_synchronize(context)


class Bench:
    """One context measured at one (prompt, generation, depth)."""

    def __init__(self, model, options: argparse.Namespace, n_prompt: int, n_gen: int, n_depth: int) -> None:
        self.n_prompt, self.n_gen, self.n_depth, self.n_batch = n_prompt, n_gen, n_depth, options.batch_size
        self.context = open_context(model, options, n_prompt + n_gen + n_depth)
        self.n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self.random = np.random.default_rng(0)

    def tokens(self, n: int) -> np.ndarray:
        return self.random.integers(0, self.n_vocab, n, dtype=np.int32)

    def clear(self) -> None:
        api.llama_memory_clear(api.llama_get_memory(self.context), False)

    def warm_up(self) -> None:
        self.clear()
        decode(self.context, self.tokens(self.n_prompt), self.n_batch)
        decode(self.context, self.tokens(min(1, self.n_gen)), 1)

    def once(self) -> int:
        """Nanoseconds of one repetition."""
        self.clear()
        decode(self.context, self.tokens(self.n_depth), self.n_batch)
        prompt, generated = self.tokens(self.n_prompt), self.tokens(self.n_gen)
        start = time.perf_counter_ns()
        decode(self.context, prompt, self.n_batch)
        decode(self.context, generated, 1)
        return time.perf_counter_ns() - start

    def close(self) -> None:
        api.llama_free(self.context)


def measure(model, options: argparse.Namespace) -> list[dict]:
    """llama-bench's rows: every prompt length and every generation length at every depth."""
    tests = [(p, 0) for p in options.n_prompt if p] + [(0, n) for n in options.n_gen if n]
    rows = []
    for depth, (n_prompt, n_gen) in product(options.n_depth, tests):
        bench = Bench(model, options, n_prompt, n_gen, depth)
        bench.warm_up()
        nanoseconds = [bench.once() for _ in range(options.repetitions)]
        bench.close()
        rates = [1e9 * (n_prompt + n_gen) / ns for ns in nanoseconds]
        rows.append({"build_commit": f"llama_cpp {api.__version__}", "model_filename": options.model,
                     "model_size": api.llama_model_size(model), "model_n_params": api.llama_model_n_params(model),
                     "n_batch": options.batch_size, "n_ubatch": options.ubatch_size, "n_threads": options.threads,
                     "type_k": options.cache_type_k, "type_v": options.cache_type_v, "flash_attn": options.flash_attn,
                     "repack": bool(options.repack), "n_prompt": n_prompt, "n_gen": n_gen, "n_depth": depth,
                     "avg_ns": round(np.mean(nanoseconds)), "stddev_ns": round(np.std(nanoseconds)),
                     "avg_ts": float(np.mean(rates)), "stddev_ts": float(np.std(rates)), "samples_ns": nanoseconds, "samples_ts": rates})
    return rows


def logits(model, options: argparse.Namespace) -> np.ndarray:
    """Logits (tokens, vocabulary) of `--tokens`, evaluated as one batch from position 0."""
    n, n_vocab = len(options.tokens), api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    options.batch_size = max(n, 1)
    context = open_context(model, options, n)
    batch = api.llama_batch_init(n, 0, 1)
    batch.n_tokens = n
    for i, token in enumerate(options.tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, True
    if api.llama_decode(context, batch):
        sys.exit(f"llama_decode failed on {n} tokens")
    return np.stack([np.ctypeslib.as_array(api.llama_get_logits_ith(context, i), (n_vocab,)).copy() for i in range(n)])


def first_tokens(model, options: argparse.Namespace) -> None:
    """Print the greedy continuation of the prompt, each token as soon as it is known."""
    vocab, text = api.llama_model_get_vocab(model), options.first_token.encode()
    prompt = np.empty(len(text) + 8, np.int32)
    n = api.llama_tokenize(vocab, c_char_p(text), len(text), prompt.ctypes.data_as(api.llama_token_p), len(prompt), True, False)
    n_gen, piece = options.n_gen[0], create_string_buffer(256)
    context, pending = open_context(model, options, n + n_gen), prompt[:n]
    for _ in range(n_gen):
        decode(context, pending, options.batch_size)
        best = int(np.argmax(np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (api.llama_vocab_n_tokens(vocab),))))
        size = api.llama_token_to_piece(vocab, best, piece, len(piece), 0, True)
        sys.stdout.buffer.write(piece.raw[:max(size, 0)])
        sys.stdout.buffer.flush()
        pending = np.array([best], np.int32)


def main() -> None:
    options = arguments()
    api.llama_log_set(_only_errors, c_void_p(0))
    api.llama_backend_init()
    model = open_model(options)
    if options.logits:
        np.save(options.logits, logits(model, options))
    elif options.first_token is not None:
        first_tokens(model, options)
    else:
        print(json.dumps(measure(model, options), indent=2))


if __name__ == "__main__":
    main()
