"""pyggml run: continue a text. The continuation goes to standard output as it comes, everything else to standard error."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pyggml.cli import INTERRUPTED, _options

HELP = "continue a text with a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _options.add_model(parser)
    _options.add_prompt(parser)
    group = parser.add_argument_group("output")
    group.add_argument("-n", "--predict", "--n-predict", type=int, default=-1, metavar="N",
                       help="tokens at most (default: -1, until the context is full)")
    group.add_argument("--ignore-eos", action="store_true", help="go on where the model would end")
    group.add_argument("--display-prompt", action=argparse.BooleanOptionalAction, default=False, help="print the prompt before its continuation")
    group.add_argument("-sp", "--special", action="store_true", help="print control tokens too")
    group.add_argument("-co", "--color", choices=("on", "off", "auto"), default="auto",
                       help="show the prompt in another colour (default: on a terminal)")
    group.add_argument("-v", "--verbose", action="store_true", help="tell about the model, the prompt and the sampling")
    _options.add_context(parser)
    _options.add_speculation(parser)
    _options.add_sampling(parser)


@dataclass
class Timing:
    """Tokens and seconds of the phases of a run. A generation's first token comes from the prompt's logits."""

    load: float = 0.0
    prompt_tokens: int = 0
    prompt: float = 0.0
    tokens: int = 0
    generation: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        return seconds

    def line(self) -> str:
        def phase(name: str, n: int, n_evaluated: int, seconds: float) -> str:
            speed = f" in {seconds * 1e3:.0f} ms ({n_evaluated / seconds:.1f} tokens/s)" if n_evaluated > 0 and seconds else ""
            return f"{name} {n} tokens{speed}"

        return " | ".join((f"load {self.load * 1e3:.0f} ms", phase("prompt", self.prompt_tokens, self.prompt_tokens, self.prompt),
                           phase("generation", self.tokens, self.tokens - 1, self.generation)))


def run(args: argparse.Namespace) -> int:
    from pyggml.cli._interrupt import on_interrupt
    from pyggml.errors import Cancelled, ContextOverflow
    from pyggml.sampling import Sampler

    timing = Timing()
    path = _options.model_path(args)
    text = _options.prompt_text(args)
    if args.prompt is None:
        text = text.removesuffix("\n")              # a file's last line ends, the text goes on; so does llama.cpp
    _options.sampling_params(args)                              # a bad value is told before a large model is opened
    timing.lap()
    model, context = _options.open_context(args)
    ahead = _options.speculation(args, context)
    tokenizer = model.tokenizer
    tokens = tokenizer.encode(text, add_special=True, parse_special=True) or ([tokenizer.bos] if tokenizer.bos is not None else [])
    if not tokens:
        args.usage_error("the prompt is empty, and the vocabulary has no token to begin with; give it some text")
    if len(tokens) > context.n_ctx:
        raise ContextOverflow(f"the prompt of {len(tokens)} tokens does not fit into the context of {context.n_ctx}; use a larger one (-c)")
    sampler = Sampler(_options.sampling_params(args, logit_bias=dict.fromkeys(tokenizer.eog, float("-inf")) if args.ignore_eos else {}), path)
    timing.load = timing.lap()
    if args.verbose:
        tell(args, model, context, sampler, tokens)
    if args.display_prompt:
        color = args.color == "on" or (args.color == "auto" and sys.stdout.isatty())
        print(f"\033[33m{text}\033[0m" if color else text, end="", flush=True)        # llama-cli's yellow

    if ahead is not None:
        ahead.use(sampler.params)
        context = ahead
    choose = Sampler.sample if ahead is None else ahead.choose
    with on_interrupt(context.cancel) as interrupted:
        try:
            for piece in stream(args, context, tokenizer, sampler, choose, tokens, timing):
                sys.stdout.write(piece)
                sys.stdout.flush()
                if interrupted.is_set():
                    break
        except Cancelled:
            pass
    print(flush=True)
    if args.predict < 0 and context.n_past == context.n_ctx and not interrupted.is_set():
        print(f"pyggml run: the context of {context.n_ctx} tokens is full; a larger one (-c) goes on", file=sys.stderr)
    print(timing.line() + (f" | {ahead.accepted} of {ahead.drafted} guesses right" if ahead is not None else ""), file=sys.stderr)
    return INTERRUPTED if interrupted.is_set() else 0


def stream(args: argparse.Namespace, context: Any, tokenizer: Any, sampler: Any, choose: Callable[[Any, Any], int], tokens: list[int],
           timing: Timing) -> Iterator[str]:
    """Pieces of the continuation, each made of whole characters (and possibly empty). choose: a token from the sampler and logits."""
    from pyggml.tokenizers import StreamDecoder

    decoder = StreamDecoder(tokenizer, unparse_special=args.special)
    sampler.accept(*tokens)
    context.greedy = sampler.params.plain
    logits = context.eval(tokens)
    timing.prompt_tokens, timing.prompt = len(tokens), timing.lap()
    while timing.tokens != args.predict:
        token = choose(sampler, logits[-1])
        if token in tokenizer.eog:
            break
        timing.tokens += 1
        sampler.accept(token)
        yield decoder.feed(token)
        timing.generation += timing.lap()
        if context.n_past == context.n_ctx:
            break
        if timing.tokens != args.predict:
            logits = context.eval([token])
    yield decoder.flush()


def tell(args: argparse.Namespace, model: Any, context: Any, sampler: Any, tokens: list[int]) -> None:
    from pyggml import native

    threads = context.pool.n_threads if context.pool is not None else 1
    print(f"model    {model.describe()}, {model.nbytes / 2**20:.1f} MiB\n"
          f"compute  {native.isa}, {threads} threads, {context.gpu_layers} layers on a GPU, "
          f"context {context.n_ctx}, batch {context.n_batch}, ubatch {context.n_ubatch}\n"
          f"sampling seed {sampler.seed}, " + ", ".join(f"{name} {getattr(sampler.params, name):g}" for name in _options.SAMPLING.values()) +
          f"\nprompt   {len(tokens)} tokens: {' '.join(map(str, tokens))}", file=sys.stderr)
