"""Does pyggml compute what llama.cpp computes? Logits of both on the same file and tokens, and how far apart they are.

A speed figure counts only beside this. Every position sees the same tokens (teacher forcing), so one near-tie does not
change everything after it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from contestants import LLAMA_CPP_BENCH, BenchError


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def distance(reference: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """How far logits (tokens, vocabulary) are from a reference: KL(reference, ours) in nats, share of equal greedy choices, relative L2."""
    p, q = log_softmax(reference), log_softmax(ours)
    divergence = (np.exp(p) * (p - q)).sum(-1)
    return {"positions": len(reference), "kl mean": float(divergence.mean()), "kl max": float(divergence.max()),
            "same greedy choice": float((reference.argmax(-1) == ours.argmax(-1)).mean()),
            "relative l2": float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))}


def llama_cpp_logits(python: str, model: Path, tokens: np.ndarray, threads: int) -> np.ndarray:
    """Logits from llama_cpp in a process of its own, by its plainest path: no flash attention, no repacking."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits.npy"
        subprocess.run([python, str(LLAMA_CPP_BENCH), "-m", str(model), "-t", str(threads), "-fa", "0", "--repack", "0",
                        "--logits", str(out), "--tokens", ",".join(map(str, tokens))], check=True)
        return np.load(out)


def our_logits(model: Path, tokens: np.ndarray, threads: int) -> np.ndarray:
    """Logits of pyggml, one prompt of all tokens."""
    from pyggml import Llama

    llama = Llama(str(model), n_ctx=len(tokens), n_batch=len(tokens), n_threads=threads, logits_all=True, verbose=False)
    llama.eval(tokens.tolist())
    return np.array(llama.scores[:len(tokens)])


def random_tokens(model: Path, n: int, seed: int = 0) -> np.ndarray:
    """Seeded token ids of the model's vocabulary."""
    from pyggml import Llama

    n_vocab = Llama(str(model), vocab_only=True, verbose=False).n_vocab()
    return np.random.default_rng(seed).integers(0, n_vocab, n, dtype=np.int32)


def agreement(python: str, llama_cpp_python: str, model: Path, threads: int) -> dict[str, float]:
    """The figures of `distance` from a process of its own, by the Python that runs pyggml and the one that has llama_cpp."""
    done = subprocess.run([python, __file__, "-m", str(model), "-t", str(threads), "--python", llama_cpp_python],
                          capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"logits of {model} cannot be compared: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("-n", "--n-tokens", type=int, default=256)
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--python", default=sys.executable, help="the Python that has llama_cpp")
    options = parser.parse_args()
    tokens = random_tokens(options.model, options.n_tokens)
    theirs = llama_cpp_logits(options.python, options.model, tokens, options.threads)
    print(json.dumps(distance(theirs, our_logits(options.model, tokens, options.threads)), indent=2))
