"""Options that several commands share, with llama.cpp's names and defaults."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from pyggml.errors import PyggmlError

if TYPE_CHECKING:
    from pyggml.sampling import SamplingParams

N_CTX = 4096        # tokens of context where the user names none and the model was trained on no fewer
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")

# flag -> the SamplingParams field that it sets; range, default and help come from there
SAMPLING = {
    ("--temp", "--temperature"): "temp", ("--top-k",): "top_k", ("--top-p",): "top_p", ("--min-p",): "min_p",
    ("--typical", "--typical-p"): "typical_p", ("--repeat-last-n",): "repeat_last_n", ("--repeat-penalty",): "repeat_penalty",
    ("--frequency-penalty",): "frequency_penalty", ("--presence-penalty",): "presence_penalty", ("--mirostat",): "mirostat",
    ("--mirostat-ent",): "mirostat_tau", ("--mirostat-lr",): "mirostat_eta",
}


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model file, positional or with -m."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a GGUF file (the first one of a split model)")
    parser.add_argument("-m", "--model", dest="model_flag", metavar="MODEL", help="the same as a flag")
    parser.set_defaults(usage_error=parser.error)


def model_path(args: argparse.Namespace) -> str:
    """The one model that was named; ends with a usage error otherwise."""
    if (args.model is None) == (args.model_flag is None):
        args.usage_error("name one model file, as MODEL or with -m MODEL" if args.model is None else "the model is named twice, as MODEL and with -m")
    return args.model if args.model is not None else args.model_flag


def add_prompt(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt")
    group.add_argument("-p", "--prompt", metavar="TEXT", help="the text to start from")
    group.add_argument("-f", "--file", metavar="FILE", help="read it from a file instead (-: standard input)")
    group.add_argument("-e", "--escape", action=argparse.BooleanOptionalAction, default=True,
                       help=r"read \n, \r, \t, \", \', \\ and \xNN (a byte) in -p as what they stand for (default: yes)")


def prompt_text(args: argparse.Namespace) -> str:
    """The text of -p, -f or piped standard input; ends with a usage error when there is none of them, or more than one."""
    if args.prompt is not None and args.file is not None:
        args.usage_error("give -p or -f, not both")
    if args.prompt is not None:
        text = os.fsencode(args.prompt)
        return decode(unescape(text) if args.escape else text, "the text of -p")
    if args.file is not None and args.file != "-":
        with open(args.file, "rb") as file:
            return decode(file.read(), args.file)
    if args.file is None and sys.stdin.isatty():
        args.usage_error("there is no text; give -p TEXT or -f FILE, or pipe one in")
    return decode(sys.stdin.buffer.read(), "standard input")


def decode(text: bytes, name: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise PyggmlError(f"{name} is not UTF-8: byte 0x{text[error.start]:02x} at offset {error.start}; convert it first (iconv)") from None


_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"'": b"'", b'"': b'"', b"\\": b"\\"}


def unescape(text: bytes) -> bytes:
    r"""Replace \n \r \t \' \" \\ and \xNN, a byte; any other backslash stays."""
    import re

    def replace(match: re.Match[bytes]) -> bytes:
        code = match[1]
        return _ESCAPES[code] if code in _ESCAPES else bytes.fromhex(code[1:].decode())

    return re.sub(rb"\\([nrt'\"\\]|x[0-9a-fA-F]{2})", replace, text)


def add_context(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("computation")
    group.add_argument("-c", "--ctx-size", type=int, metavar="N",
                       help=f"tokens of context (default: the model's, at most {N_CTX}; 0: all of the model's)")
    group.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: physical cores)")
    group.add_argument("-tb", "--threads-batch", type=int, metavar="N", help="threads for more than one token at a time (default: as -t)")
    group.add_argument("-b", "--batch-size", type=int, default=2048, metavar="N", help="tokens of prompt taken at once (default: %(default)s)")
    group.add_argument("-ub", "--ubatch-size", type=int, default=512, metavar="N", help="tokens computed in one go (default: %(default)s)")
    for letter, what in (("k", "keys"), ("v", "values")):
        group.add_argument(f"-ct{letter}", f"--cache-type-{letter}", default="f16", choices=CACHE_TYPES, metavar="TYPE",
                           help=f"type of cached {what} (default: %(default)s)")
    add_device(group)
    group.add_argument("-nr", "--no-repack", action="store_true", help="compute on the weights as they lie in the file")
    group.add_argument("--deterministic", action="store_true",
                       help="the same bits for any number of threads, any batches, packed or not (a little slower)")
    add_placement(parser)


LOAD_MODES = {"none": (False, False), "mmap": (True, False), "mlock": (False, True), "mmap+mlock": (True, True)}     # mapped, locked


def add_placement(parser: argparse.ArgumentParser) -> None:
    """Where weights lie and which processors work."""
    from pyggml.backends.placement import NUMA

    group = parser.add_argument_group("memory and processors")
    group.add_argument("--no-mmap", action="store_true", help="read the file into memory instead of mapping it")
    group.add_argument("--mlock", action="store_true", help="keep the weights in memory, whatever else needs some")
    group.add_argument("-lm", "--load-mode", choices=LOAD_MODES, help="the two above in one word (default: mmap)")
    group.add_argument("-C", "--cpu-mask", metavar="MASK", help="run on these processors, a hexadecimal mask")
    group.add_argument("-Cr", "--cpu-range", metavar="FIRST-LAST", help="run on these processors, also in addition to -C")
    group.add_argument("--cpu-strict", choices=("0", "1"), default="0", help="give each thread one processor of its own (default: 0)")
    group.add_argument("--numa", choices=NUMA, help="spread threads evenly over the nodes, keep to the node where it starts, or "
                       "keep to what numactl allows")


def place(args: argparse.Namespace):
    """Take the processors that the options name; returns which of them each worker gets (None: any)."""
    from pyggml.backends import placement

    if (cpus := placement.wanted(args.cpu_mask, args.cpu_range)) is not None:
        placement.confine(cpus)
    if args.numa in ("distribute", "isolate") and len(placement.nodes()) == 1:
        print(f"--numa {args.numa} changes nothing: the usable processors are all of one node", file=sys.stderr)
    elif args.numa == "isolate":
        placement.confine(placement.here())
    elif args.numa == "distribute":
        return placement.over_nodes()
    return placement.one_each() if args.cpu_strict == "1" else None


def load_model(args: argparse.Namespace, path: str):
    """The Model at `path`, mapped and locked as the options say."""
    from pyggml.model import Model

    use_mmap, use_mlock = LOAD_MODES[args.load_mode or "mmap"]
    return Model.load(path, use_mmap=use_mmap and not args.no_mmap, use_mlock=use_mlock or args.mlock)


def add_device(group: Any) -> None:
    """Where a model's layers are computed."""
    group.add_argument("-ngl", "--gpu-layers", "--n-gpu-layers", dest="n_gpu_layers", default="auto", metavar="N",
                       help="layers on a GPU, from the last one on, with the output as one more; all; auto: as many as fit (default: auto)")
    group.add_argument("-dev", "--device", metavar="NAME", help="cuda0, cuda1, ...; none or cpu for no GPU (default: the main GPU)")
    group.add_argument("-mg", "--main-gpu", type=int, default=0, metavar="N", help="number of the main GPU (default: %(default)s)")


def device(args: argparse.Namespace) -> dict[str, Any]:
    """What a Context takes of these options."""
    return {"n_gpu_layers": args.n_gpu_layers, "device": args.device, "main_gpu": args.main_gpu}


def open_context(args: argparse.Namespace):
    """(Model, Context) as the options say."""
    from pyggml.context import Context

    args.place = place(args)
    model = load_model(args, model_path(args))
    n_ctx = min(model.config.n_ctx_train, N_CTX) if args.ctx_size is None else args.ctx_size
    return model, Context(model, n_ctx=n_ctx, n_batch=args.batch_size, n_ubatch=args.ubatch_size, n_threads=args.threads,
                          n_threads_batch=args.threads_batch, place=args.place, type_k=args.cache_type_k.upper(), type_v=args.cache_type_v.upper(),
                          repack=not args.no_repack, deterministic=args.deterministic, **device(args))


# ---- speculative decoding ----

NGRAM_TYPES = ("ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache")


def add_speculation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speculative decoding", "Tokens are guessed and several checked at once; the text stays the same, and "
                                      "guessing stops where it does not pay.")
    group.add_argument("-md", "--model-draft", "--spec-draft-model", metavar="FILE", help="guess with this smaller model of the same vocabulary")
    group.add_argument("--spec-type", choices=("none", "draft-simple", *NGRAM_TYPES),
                       help="where guesses come from: draft-simple is the model of -md, the other names all look the newest tokens up in the "
                            "text so far (default: draft-simple with -md, otherwise none)")
    group.add_argument("--spec-draft-n-max", "--draft-max", "--draft-n", "--draft", type=int, metavar="N",
                       help="tokens to guess at most (default and most: as many as one small batch takes)")
    group.add_argument("--spec-draft-n-min", "--draft-min", "--draft-n-min", type=int, default=0, metavar="N",
                       help="do without guesses where there are fewer (default: %(default)s)")
    group.add_argument("--spec-draft-p-min", "--draft-p-min", type=float, default=0.0, metavar="P",
                       help="end a draft before a token that its model finds less likely (default: %(default)s)")
    group.add_argument("--spec-ngram-simple-size-n", type=int, default=4, metavar="N", help="tokens to look up at most (default: %(default)s)")


def speculation(args: argparse.Namespace, context):
    """The context with guesses as the options say, or None where they ask for none."""
    kind = args.spec_type or ("draft-simple" if args.model_draft else "none")
    if kind == "draft-simple" and not args.model_draft:
        args.usage_error("--spec-type draft-simple needs a model (-md FILE)")
    if kind != "draft-simple" and args.model_draft:
        args.usage_error(f"-md and --spec-type {kind} exclude each other; leave one of them out")
    if kind == "none":
        return None
    from pyggml.context import Context
    from pyggml.speculate import MOST, DraftModel, PromptLookup, Speculation

    n_max = MOST if args.spec_draft_n_max is None else args.spec_draft_n_max
    if not 0 <= args.spec_draft_n_min <= n_max:
        args.usage_error(f"tokens to guess: at least {args.spec_draft_n_min} and at most {n_max} cannot be")
    if not 0 <= args.spec_draft_p_min <= 1:
        args.usage_error(f"--spec-draft-p-min {args.spec_draft_p_min:g} is no probability; use 0 to 1")
    if n_max > MOST:
        print(f"--spec-draft-n-max {n_max}: {MOST} is the most that is checked at once", file=sys.stderr)
    drafter: DraftModel | PromptLookup
    if kind == "draft-simple":
        n_threads = args.threads or (context.pool and context.pool.n_threads)       # not counted anew: this thread may be confined by now
        drafter = DraftModel(Context(load_model(args, args.model_draft), n_ctx=context.n_ctx, n_threads=n_threads,
                                     n_threads_batch=args.threads_batch, place=args.place), p_min=args.spec_draft_p_min)
        drafter.check(context.model)
    else:
        drafter = PromptLookup(args.spec_ngram_simple_size_n)
    return Speculation(context, drafter, n_max=n_max, n_min=args.spec_draft_n_min)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    from pyggml.sampling import SamplingParams

    group = parser.add_argument_group("sampling")
    rows = SamplingParams.__dataclass_fields__
    for flags, name in SAMPLING.items():
        row = rows[name]
        group.add_argument(*flags, dest=name, type=int if row.metadata["integer"] else float, default=row.default, metavar="N",
                           help=f"{row.metadata['help']} (default: %(default)s)")
    group.add_argument("-s", "--seed", type=int, default=-1, metavar="N", help="seed of the random numbers (default: a fresh one)")


def sampling_params(args: argparse.Namespace, **more) -> SamplingParams:
    from pyggml.sampling import SamplingParams

    return SamplingParams(**{name: getattr(args, name) for name in SAMPLING.values()}, seed=args.seed, **more)
