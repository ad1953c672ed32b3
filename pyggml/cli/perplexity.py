"""pyggml perplexity: how well a model predicts a text, and how far it is from a reference; llama-perplexity's arguments and lines."""

from __future__ import annotations

import argparse
import time
from typing import Any

from pyggml.cli import _options, _text

HELP = "measure how well a model predicts a text"

_LINES = {      # name in scores.summary -> (format of the line); the names are llama.cpp's
    "Mean PPL(Q)": "10.6f", "Mean PPL(base)": "10.6f", "Cor(ln(PPL(Q)), ln(PPL(base)))": "6.2f", "Mean ln(PPL(Q)/PPL(base))": "10.6f",
    "Mean PPL(Q)/PPL(base)": "10.6f", "Mean PPL(Q)-PPL(base)": "10.6f",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _options.add_model(parser)
    _text.add_text(parser)
    parser.add_argument("--ppl-stride", type=int, default=0, metavar="N", help="overlapping chunks, N tokens apart")
    parser.add_argument("--ppl-output-type", type=int, choices=(0, 1), default=0, help="0: the running estimate in a row; 1: a line for each chunk")
    parser.add_argument("--kl-divergence-base", "--save-all-logits", dest="base", metavar="FILE", help="write the log-probabilities to FILE; "
                        "with --kl-divergence, read the reference's from it")
    parser.add_argument("--kl-divergence", action="store_true", help="measure the divergence from the reference")


def run(args: argparse.Namespace) -> int:
    from pyggml.model import Model

    if args.ppl_stride < 0:
        args.usage_error(f"--ppl-stride {args.ppl_stride}: use a number of tokens, or 0 for chunks side by side")
    model = Model.load(_options.model_path(args), use_mmap=not args.no_mmap)
    if args.kl_divergence:
        if args.base is None:
            args.usage_error("--kl-divergence needs the reference's log-probabilities: --kl-divergence-base FILE")
        return divergence(args, model)
    if args.file is None:
        args.usage_error("there is no text; give one with -f FILE")
    return perplexity(args, model)


def perplexity(args: argparse.Namespace, model: Any) -> int:
    from pyggml.formats.atomic import refuse_input
    from pyggml.measure.perplexity import running

    if args.base is not None:
        refuse_input([args.base], [*model.file.paths, args.file])
    total, results = running(model, _text.read(args.file), n_ctx=args.ctx_size, n_chunks=args.chunks, stride=args.ppl_stride, base=args.base,
                             **_text.options(args), **_options.device(args))
    _text.say(f"perplexity: calculating perplexity over {total} chunks, n_ctx={args.ctx_size}, batch_size={args.batch_size}")
    start, found = time.perf_counter(), None
    for found in results:
        tell_eta(start, found.n_chunks, total)
        if args.ppl_output_type:
            print(f"{(found.n_chunks - 1) * (args.ppl_stride or args.ctx_size):8d}  {found.value:.4f}  {found.nll.mean():4f}  "
                  f"{found.error / found.value:4f}", flush=True)
        else:
            print(f"[{found.n_chunks}]{found.value:.4f},", end="", flush=True)
    print()
    if found is not None:
        print(f"Final estimate: PPL = {found.value:.4f} +/- {found.error:.5f}")
    return 0


def tell_eta(start: float, done: int, total: int) -> None:
    if done == 1:
        seconds = time.perf_counter() - start
        _text.say(f"perplexity: {seconds:.2f} seconds per pass - ETA {_text.eta(seconds * total)}")


def divergence(args: argparse.Namespace, model: Any) -> int:
    from pyggml.measure.perplexity import against
    from pyggml.measure.scores import Tokens, summary

    total, results = against(model, args.base, **_text.options(args), **_options.device(args))
    start, tokens = time.perf_counter(), Tokens()
    for done, tokens in enumerate(results, 1):
        if done == 1:
            tell_eta(start, done, total)
            print("chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS            Same top p")
        s = summary(tokens)
        ppl, ratio, kld, rms, top = (s[k] for k in ("Mean PPL(Q)", "Mean ln(PPL(Q)/PPL(base))", "Mean KLD", "RMS Δp", "Same top p"))
        print(f"{done:4d}    {ppl.value:9.4f} ± {ppl.error:9.4f}    {ratio.value:10.5f} ± {ratio.error:10.5f}"
              f"    {kld.value:10.5f} ± {kld.error:10.5f}"
              f"    {rms.value:6.3f} ± {rms.error:6.3f} %    {top.value:6.3f} ± {top.error:6.3f} %", flush=True)
    print(report(summary(tokens)))
    return 0


def report(s: dict[str, Any]) -> str:
    """The closing statistics, line by line as llama.cpp prints them."""
    lines = ["", "====== Perplexity statistics ======"]
    for name, form in _LINES.items():
        value = s[name]
        lines.append(f"{name:<30}: {format(value, form)}%" if isinstance(value, float) else
                     f"{name:<30}: {format(value.value, form)} ± {format(value.error, form)}")
    lines += ["", "====== KL divergence statistics ======"]
    lines += [spread(name, value, "10.6f", "10.6f", "") for name, value in s.items() if name.endswith("KLD")]
    lines += ["", "====== Token probability statistics ======"]
    lines += [spread(name, value, "6.3f", "5.3f", "%") for name, value in s.items() if name.endswith("Δp")]
    lines.append(f"Same top p: {s['Same top p'].value:6.3f} ± {s['Same top p'].error:5.3f} %")
    return "\n".join(lines)


def spread(name: str, value: Any, form: str, error_form: str, unit: str) -> str:
    """One line of a distribution: `Mean    KLD:   0.011640 ±   0.000100`, `99.9%   KLD:   0.244681`."""
    which, what = name.rsplit(" ", 1)
    label = f"{which:<7} {what}" if which != "RMS" else f"{which} {what}    "
    if isinstance(value, float):
        return f"{label}: {format(value, form)}{unit}"
    return f"{label}: {format(value.value, form)} ± {format(value.error, error_form)}{' ' + unit if unit else ''}"
