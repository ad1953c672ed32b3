"""`pyggml edit FILE key[:type]=value ...`: change metadata without writing the tensors again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pyggml import formats
from pyggml.errors import PyggmlError
from pyggml.formats import keys, show
from pyggml.formats.edit import PADDING, Change, Edits, edit
from pyggml.formats.source import PlainFile
from pyggml.formats.values import VALUE_TYPE, StringArray, Typed, printable, typed, value_type

HELP = "set, remove and rename metadata keys of a GGUF file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a GGUF file (of a split model: the part to change, usually the first)")
    parser.add_argument("assignments", nargs="*", metavar="KEY[:TYPE]=VALUE",
                        help=f"set a key; TYPE is one of {', '.join(t for t in VALUE_TYPE if t != 'arr')} or an array such as u32[], "
                             "VALUE then a JSON list; without TYPE the key keeps its type")
    parser.add_argument("--remove", action="append", default=[], metavar="KEY", help="remove a key")
    parser.add_argument("--rename", action="append", default=[], metavar="OLD=NEW", help="rename a key")
    parser.add_argument("--from-json", metavar="FILE",
                        help="set keys from a JSON object of values, or from what `pyggml info --json --full` prints")
    parser.add_argument("--chat-template-file", metavar="FILE", help="set tokenizer.chat_template to the text of a file")
    parser.add_argument("--special-token", nargs=2, action="append", default=[], metavar=("NAME", "TOKEN"),
                        help="set tokenizer.ggml.NAME_token_id (bos, eos, eot, padding, ...) to the number of a token, given by its text")
    parser.add_argument("-o", "--output", metavar="FILE", help="write a changed copy instead")
    parser.add_argument("--dry-run", action="store_true", help="show what would change and change nothing")
    parser.add_argument("--force", action="store_true", help="also write values that make no sense for a known key")


def run(args: argparse.Namespace) -> int:
    file = formats.open_source(PlainFile(args.file))
    values: dict[str, Any] = {}
    if args.from_json:
        values |= from_json(args.from_json)
    values |= dict(assignment(text, file.kv) for text in args.assignments)
    if args.chat_template_file:
        values["tokenizer.chat_template"] = Typed("str", _read(args.chat_template_file))
    values |= dict(special_token(name, token, file) for name, token in args.special_token)
    rename = dict(_split(text, "--rename OLD=NEW") for text in args.rename)
    del file                            # an open file is not changed in place
    result = edit(args.file, Edits(values, tuple(args.remove), rename, args.force), output=args.output, dry_run=args.dry_run)
    for change in result.changes:
        print(line(change))
    n = len(result.changes)
    done = "would be changed" if args.dry_run else "changed"
    none = "a copy; there was nothing to change" if args.output and not args.dry_run else "nothing to change"
    print(f"{printable(args.output or args.file)}: " + (f"{n} key{'s' * (n != 1)} {done} ({result.method})" if n else none))
    return 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise PyggmlError(f"{printable(path)}: is not UTF-8 text") from None


def _split(text: str, form: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not equals or not left:
        raise PyggmlError(f"{printable(text)!r} is not of the form {form}")
    return left, right


def assignment(text: str, kv: formats.Metadata) -> tuple[str, Typed]:
    """Key and value of KEY[:TYPE]=VALUE. Without a type: the key's own, else the one every program expects for it, else by its looks."""
    left, right = _split(text, "KEY[:TYPE]=VALUE")
    key, colon, kind = left.rpartition(":")
    if not colon:
        key, kind = left, ""
    known = keys.known(key)
    kind = kind or (kv.type(key) if key in kv else known.types[0] if known else "")
    return key, (parse(right, kind, key) if kind else guess(right))


def parse(text: str, kind: str, key: str) -> Typed:
    """`text` as a value of type `kind`."""
    element = value_type(kind.removesuffix("[]"))
    if kind == "str":
        return Typed("str", text)
    form = "a JSON list" if kind.endswith("[]") else element.range
    wrong = PyggmlError(f'key "{printable(key)}": {printable(text)!r} is not of type {kind}; it takes {form}')
    try:
        value = float(text) if element.name in ("f32", "f64") and not kind.endswith("[]") else json.loads(text.lower() if kind == "bool" else text)
    except ValueError:
        raise wrong from None
    if kind.endswith("[]"):
        if not isinstance(value, list):
            raise wrong
    elif isinstance(value, bool) != (kind == "bool") or not isinstance(value, int | float):
        raise wrong
    return Typed(kind, value)


def guess(text: str) -> Typed:
    """A value of a new key by its looks: true, 5, 0.5, ["a", "b"], or else text."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    return typed(value if isinstance(value, bool | int | float | list) else text)


def special_token(name: str, token: str, file: formats.TensorFile) -> tuple[str, Typed]:
    """Key and value that make the token with this text the special one of this name."""
    key, tokens = f"tokenizer.ggml.{name}_token_id", file.kv.get("tokenizer.ggml.tokens")
    if keys.known(key) is None:
        raise PyggmlError(f"--special-token {printable(name)}: no program knows the key {printable(key)}; set it by its name if it is meant")
    if not isinstance(tokens, StringArray) or token not in tokens:
        raise PyggmlError(f'{printable(file.path)}: key "tokenizer.ggml.tokens": has no token {printable(token)!r}')
    return key, Typed("u32", tokens.index(token))


def from_json(path: str) -> dict[str, Any]:
    """Values from a JSON file: plain ones, {"type": ..., "value": ...}, or the "metadata" of a whole `pyggml info --json` document."""
    try:
        document = json.loads(_read(path))
    except ValueError as error:
        raise PyggmlError(f"{printable(path)}: is not JSON: {error}") from None
    if isinstance(document, dict) and isinstance(document.get("metadata"), dict):
        document = document["metadata"]
    if not isinstance(document, dict):
        raise PyggmlError(f"{printable(path)}: must hold a JSON object of keys and values")
    values = {}
    document.pop(PADDING, None)                 # room of the header that the document was made of
    for key, value in document.items():
        if isinstance(value, dict):
            if set(value) - {"type", "value", "length"} or not {"type", "value"} <= set(value):
                raise PyggmlError(f'{printable(path)}: key "{printable(key)}" needs a "type" and a "value"')
            length = len(value["value"]) if isinstance(value["value"], list) else 0
            if value.get("length", length) != length:
                raise PyggmlError(f'{printable(path)}: key "{printable(key)}" is abbreviated; '
                                  "make the file with `pyggml info --json --full`")
            values[key] = _typed_json(key, str(value["type"]), value["value"])
        else:
            values[key] = value
    return values


def _typed_json(key: str, kind: str, value: Any) -> Typed:
    element = value_type(kind.removesuffix("[]"))
    if kind.endswith("[]") and not isinstance(value, list):
        raise PyggmlError(f'key "{printable(key)}": {printable(repr(value))} is not a list')
    if kind == "arr[]":
        return Typed(kind, [typed(v) for v in value])
    if element.name in ("f32", "f64"):              # NaN and infinities are text in JSON
        try:
            return Typed(kind, [float(v) for v in value] if kind.endswith("[]") else float(value))
        except (TypeError, ValueError):
            raise PyggmlError(f'key "{printable(key)}": {printable(repr(value))} is not of type {kind}; it takes {element.range}') from None
    return Typed(kind, value)


def line(change: Change) -> str:
    """One change: + added, - removed, ~ changed."""
    def text(value: Typed) -> str:
        return f"({value.type}) {show.text(value)}"

    key = printable(change.key)
    if change.old is None and change.new is not None:
        meant = keys.meant(change.key)
        return f"+ {key} = {text(change.new)}" + (f"   (new: did you mean {printable(meant)}?)" if meant else "")
    if change.new is None and change.old is not None:
        return f"- {key} = {text(change.old)}"
    assert change.old is not None and change.new is not None
    name = key if change.key == change.old_key else f"{printable(change.old_key)} => {key}"
    return f"~ {name}: {text(change.old)} -> {text(change.new)}" if change.new is not change.old else f"~ {name}"
