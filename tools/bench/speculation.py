"""Tokens per second with and without guesses, on a text that repeats itself and on one that does not.

    python tools/bench/speculation.py MODEL [-md DRAFT] [-n 128] [-t 2]

Greedy runs in alternating order, each warmed up by its prompt; the texts are compared, for they must be the same. On a model with
random weights the guesses that are right say nothing about language. The last line is the ceiling: guesses that know the text.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

from pyggml.context import Context
from pyggml.model import Model
from pyggml.sampling import Sampler, SamplingParams
from pyggml.speculate import Draft, DraftModel, PromptLookup, Speculation

PASSAGE = ("The lighthouse keeper walked down to the harbour, where the boats lay in the evening light, and he spoke to the old men who "
           "mended their nets by the wall. ")
TEXTS = {"repeats": f"Text:\n{PASSAGE * 2}\nThe same text again, with one word changed:\n{PASSAGE}{PASSAGE[:60]}",
         "does not": "On the morning of the fourth day a stranger came into the village and asked for a bed."}


class Known:
    """Guesses that are always right."""

    prior = 0.99

    def __init__(self, text: list[int]) -> None:
        self.text = text

    def draft(self, ids, n: int) -> Draft:
        return Draft(self.text[len(ids):len(ids) + n])


def generate(context: Context | Speculation, tokens: list[int], n: int) -> tuple[list[int], float]:
    """n greedy tokens and the tokens a second they came at."""
    context.reset()
    row, sampler, out = context.eval(tokens)[-1], Sampler(SamplingParams(temp=0.0)), []
    start = time.perf_counter()
    for _ in range(n):
        out.append(sampler.sample(row))
        row = context.eval(out[-1:])[-1]
    return out, n / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-md", "--model-draft")
    parser.add_argument("-n", type=int, default=128)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    model = Model.load(args.model)
    tokenizer = model.tokenizer
    for name, text in [*TEXTS.items(), ("ceiling", TEXTS["repeats"])]:
        tokens = tokenizer.encode(text, add_special=True)
        n_ctx = len(tokens) + args.n
        plain = Context(model, n_ctx=n_ctx, n_threads=args.threads)
        drafter = DraftModel(Context(Model.load(args.model_draft), n_ctx=n_ctx, n_threads=args.threads)) if args.model_draft else PromptLookup()
        if name == "ceiling":
            drafter = Known(tokens + generate(plain, tokens, args.n)[0])
        ahead = Speculation(Context(model, n_ctx=n_ctx, n_threads=args.threads), drafter)
        rates: dict[str, list[float]] = {"plain": [], "ahead": []}
        for turn in range(args.pairs):
            texts = {}
            for way, context in [("plain", plain), ("ahead", ahead)][:: 1 if turn % 2 == 0 else -1]:
                texts[way], rate = generate(context, tokens, args.n)
                rates[way].append(rate)
            assert texts["plain"] == texts["ahead"], "the texts differ"
        ratios = [a / b for a, b in zip(rates["ahead"], rates["plain"], strict=True)]
        print(f"{name:<10} plain {median(rates['plain']):9.1f} t/s, with guesses {median(rates['ahead']):9.1f} t/s, ratio {median(ratios):.2f}; "
              f"{ahead.accepted} of {ahead.drafted} guesses right", flush=True)


if __name__ == "__main__":
    main()
