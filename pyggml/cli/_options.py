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
                       help=r"read \n, \t, \", \' , \\ and \xNN in -p as what they stand for (default: yes)")


def prompt_text(args: argparse.Namespace) -> str:
    """The text of -p, -f or piped standard input; ends with a usage error when there is none of them, or more than one."""
    if args.prompt is not None and args.file is not None:
        args.usage_error("give -p or -f, not both")
    if args.prompt is not None:
        text = decode(os.fsencode(args.prompt), "the text of -p")
        return unescape(text) if args.escape else text
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


_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "'": "'", '"': '"', "\\": "\\"}


def unescape(text: str) -> str:
    r"""Replace \n \r \t \' \" \\ and \xNN; any other backslash stays."""
    import re

    def replace(match: re.Match[str]) -> str:
        code = match[1]
        return _ESCAPES[code] if code in _ESCAPES else chr(int(code[1:], 16))

    return re.sub(r"\\([nrt'\"\\]|x[0-9a-fA-F]{2})", replace, text)


def add_context(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("computation")
    group.add_argument("-c", "--ctx-size", type=int, metavar="N",
                       help=f"tokens of context (default: the model's, at most {N_CTX}; 0: all of the model's)")
    group.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: physical cores)")
    group.add_argument("-b", "--batch-size", type=int, default=2048, metavar="N", help="tokens of prompt taken at once (default: %(default)s)")
    group.add_argument("-ub", "--ubatch-size", type=int, default=512, metavar="N", help="tokens computed in one go (default: %(default)s)")
    for letter, what in (("k", "keys"), ("v", "values")):
        group.add_argument(f"-ct{letter}", f"--cache-type-{letter}", default="f16", choices=CACHE_TYPES, metavar="TYPE",
                           help=f"type of cached {what} (default: %(default)s)")
    add_device(group)
    group.add_argument("--no-mmap", action="store_true", help="read the file into memory instead of mapping it")
    group.add_argument("-nr", "--no-repack", action="store_true", help="compute on the weights as they lie in the file")


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
    from pyggml.context import Context, Model

    model = Model.load(model_path(args), use_mmap=not args.no_mmap)
    n_ctx = min(model.config.n_ctx_train, N_CTX) if args.ctx_size is None else args.ctx_size
    return model, Context(model, n_ctx=n_ctx, n_batch=args.batch_size, n_ubatch=args.ubatch_size, n_threads=args.threads,
                          type_k=args.cache_type_k.upper(), type_v=args.cache_type_v.upper(), repack=not args.no_repack, **device(args))


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
