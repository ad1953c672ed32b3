"""Changing metadata of a GGUF file at a cost that follows the header, not the file.

The tensor data stays where it is when the new header fits into the room of the old one, or when the file system can insert blocks
at the start; else the file is written again beside the old one, sharing or copying the data. The room that is left between keys
and tensor table is held by one text key, PADDING, so that later edits fit.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pyggml import formats
from pyggml.errors import PyggmlError
from pyggml.formats import atomic, gguf, inplace, keys, writer
from pyggml.formats.source import PlainFile
from pyggml.formats.tensorfile import TensorFile
from pyggml.formats.values import STRING, Typed, encode, encode_key, encode_string, printable, typed_values

PADDING = "pyggml.padding"
RESERVE = 16 << 10              # bytes of room a header gets when it has to grow
_HEADER = 24                    # magic, version, two counts
_SMALLEST_PADDING = 8 + len(PADDING) + 4 + 8


@dataclass(frozen=True)
class Edits:
    """What to change: values to set (natural types where none is given), keys to remove, keys to rename (old -> new).

    force: also write values that no program accepts for a key.
    """

    set: Mapping[str, Any] = field(default_factory=dict)
    remove: Iterable[str] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    force: bool = False


class Change(NamedTuple):
    """One key's change: None where it is not there before or after. `key` is the name after the change."""

    key: str
    old: Typed | None
    new: Typed | None
    old_key: str


class Result(NamedTuple):
    changes: list[Change]
    method: str                 # how the file was (or would be) changed; "" for no change


IN_PLACE, INSERTED, REWRITTEN = "in place", "blocks inserted", "rewritten"


def edit(path: str | os.PathLike[str], edits: Edits, *, output: str | os.PathLike[str] | None = None, dry_run: bool = False) -> Result:
    """Apply `edits` to the GGUF file `path`, or to a copy at `output`. The file is the old or the new one at every moment.

    PyggmlError when a key is missing or a value makes no sense for its key. dry_run: report, change nothing.
    """
    try:
        return _edit(path, edits, output, dry_run)
    except OSError as error:
        raise PyggmlError(f"{printable(path)}: cannot edit: {error.strerror}; the file is as it was") from error


def _edit(path: str | os.PathLike[str], edits: Edits, output: str | os.PathLike[str] | None, dry_run: bool) -> Result:
    inplace.recover(path)
    if dry_run or output is not None:
        source = PlainFile(path)
        file = _read(source)
        changes = changes_of(file, edits)
        if dry_run:
            return Result(changes, _forecast(file, edits) if changes else "")
        _rewrite(source, file, edits, output)
        return Result(changes, REWRITTEN)
    if not os.access(path, os.W_OK) and os.path.exists(path):
        raise PyggmlError(f"{printable(path)}: cannot write: the file is read-only; make it writable or use --output")
    with inplace.alone(path) as fd:
        if fd is not None:
            atomic.remove_stale(*os.path.split(os.path.realpath(path)))
            file = _read(PlainFile(path, fd))
            changes = changes_of(file, edits)
            if not changes:
                return Result([], "")
            method = _in_place(path, fd, file, edits)
            if method:
                return Result(changes, method)
    with atomic.locked(path):
        source = PlainFile(path)
        file = _read(source)
        changes = changes_of(file, edits)
        if changes:
            _rewrite(source, file, edits, path)
        return Result(changes, REWRITTEN if changes else "")


# ---- what changes -------------------------------------------------------------------------------------------------------------

def _read(source: PlainFile) -> TensorFile:
    """The GGUF file behind `source`; an error names what it is instead."""
    file = formats.open_source(source)
    if not file.format.startswith("GGUF"):
        raise PyggmlError(f"{printable(source.name)}: this is a {file.format} file, only GGUF can be edited; first run "
                          f"`pyggml convert {printable(source.name)} NEW.gguf`")
    return file


def changes_of(file: TensorFile, edits: Edits) -> list[Change]:
    """The changes that `edits` make to a file, checked."""
    kv, values = file.kv, typed_values(edits.set)
    remove = set(edits.remove)
    for key in [*remove, *edits.rename]:
        if key not in kv:
            raise keys.missing(file.path, key, kv)
    for old, new in edits.rename.items():
        if new in kv and new not in remove and new not in edits.rename:
            raise PyggmlError(f'{printable(file.path)}: key "{printable(new)}" is already there; '
                              f'remove it to rename "{printable(old)}" to it')
    if PADDING in {*values, *remove, *edits.rename, *edits.rename.values()}:
        raise PyggmlError(f'key "{PADDING}" holds the room that the header has to grow; it is not for values')
    both = remove & (set(values) | set(edits.rename))
    if both:
        raise PyggmlError(f'key "{printable(min(both))}" is to be removed and changed at once')
    encoded = {key: _encode(key, value, file.order) for key, value in values.items()}       # a value that no file can hold is told as that
    if not edits.force:
        for key, value in [*values.items(), *((new, kv.typed_value(old)) for old, new in edits.rename.items())]:
            problem = keys.problem(key, value)
            if problem:
                raise PyggmlError(f"{printable(file.path)}: {problem}; --force writes it anyway")
    changes = [Change(key, kv.typed_value(key), None, key) for key in kv if key in remove]
    changes += [Change(new, kv.typed_value(old), values.get(new, kv.typed_value(old)), old) for old, new in edits.rename.items()]
    renamed = set(edits.rename.values())
    for key, value in values.items():
        if key in renamed:
            continue
        before = kv.typed_value(key) if key in kv else None
        if before is None or _encode(key, before, file.order) != encoded[key]:
            changes.append(Change(key, before, value, key))
    return changes


def _pairs(file: TensorFile, edits: Edits) -> dict[str, bytes | memoryview]:
    """Every key with its bytes (key, type, value) in the edited file, in order, without padding; what stays is a view, not a copy."""
    values = typed_values(edits.set)
    remove, buffer = set(edits.remove), memoryview(file.sources[0].head(file.table_end))
    pairs: dict[str, bytes | memoryview] = {}
    for key in file.kv:
        if key in remove or key == PADDING:
            continue
        name, entry = edits.rename.get(key, key), file.kv.entry(key)
        if name in values:
            pairs[name] = _encode(name, values[name], file.order)
        elif name == key:
            pairs[name] = buffer[entry.key_start:entry.end]
        else:
            pairs[name] = encode_key(name, file.order) + bytes(buffer[entry.key_start + 8 + len(key.encode()):entry.end])
    for key, value in values.items():
        if key not in pairs:
            pairs[key] = _encode(key, value, file.order)
    return pairs


def _values(file: TensorFile, edits: Edits) -> dict[str, Any]:
    """The metadata of the edited file, for one that is written anew."""
    gone = {*edits.remove, PADDING}
    return {edits.rename.get(key, key): value for key, value in file.kv.typed().items() if key not in gone} | dict(edits.set)


def _encode(key: str, value: Typed, order: str) -> bytes:
    start = encode_key(key, order)
    try:
        return start + encode(value, order)
    except PyggmlError as error:
        raise PyggmlError(f'key "{printable(key)}": {error}') from None


# ---- the new header -------------------------------------------------------------------------------------------------------------

def _moves_tensors(file: TensorFile, edits: Edits) -> bool:
    """Whether the tensor table changes too: another alignment, or a file of version 1."""
    return file.format == "GGUF v1" or "general.alignment" in {*edits.set, *edits.remove, *edits.rename, *edits.rename.values()}


def _header(file: TensorFile, edits: Edits, grow: bool) -> bytes | None:
    """The new header, padding included, as long as the old one (None when it does not fit), or, with `grow`, longer by whole blocks."""
    pairs = _pairs(file, edits)
    buffer = memoryview(file.sources[0].head(file.table_end))
    table_start = max((file.kv.entry(key).end for key in file.kv), default=_HEADER)
    table = buffer[table_start:file.table_end]
    used, end = _HEADER + sum(map(len, pairs.values())) + len(table), file.data_offset
    if grow:
        step = math.lcm(atomic.BLOCK, file.alignment)
        end += -(-max(step, used + _SMALLEST_PADDING + RESERVE - end) // step) * step
    padding = _padding(used, file.table_end if not grow else end, end, file.alignment)
    if padding is None:
        return None
    if padding:
        blanks = padding - _SMALLEST_PADDING
        pairs[PADDING] = encode_string(PADDING, file.order) + struct.pack(file.order + "IQ", STRING.id, blanks) + b" " * blanks
    start = bytes(buffer[:_HEADER - 8]) + struct.pack(file.order + "Q", len(pairs))
    head = b"".join([start, *pairs.values(), table, bytes(end - used - padding)])
    gguf.prove(head, len(head) + max(0, file.nbytes - file.data_offset), file.path)
    return head


def _padding(used: int, table_end: int, end: int, alignment: int) -> int | None:
    """Bytes of padding that put the data at `end`, the tensor table ending where it did (table_end) if possible; None: impossible."""
    if used == table_end or table_end - used >= _SMALLEST_PADDING:
        return table_end - used
    if 0 <= end - used < alignment:
        return 0
    return end - used if end - used >= _SMALLEST_PADDING else None


def _forecast(file: TensorFile, edits: Edits) -> str:
    """How the file would be changed; PyggmlError when it would not."""
    if _moves_tensors(file, edits):
        writer.header(_values(file, edits), writer.normal(file.tensors), file.order, file.path)
        return REWRITTEN
    if _header(file, edits, grow=False) is not None:
        return IN_PLACE
    _header(file, edits, grow=True)
    return f"{INSERTED} or {REWRITTEN}"


def _in_place(path: str | os.PathLike[str], fd: int, file: TensorFile, edits: Edits) -> str:
    """Change the file where it lies; "" when that is not possible."""
    if _moves_tensors(file, edits) or file.data_offset > file.nbytes:
        return ""
    old = file.sources[0].array(0, file.data_offset)
    for grow, method in ((False, IN_PLACE), (True, INSERTED)):
        head = _header(file, edits, grow)
        if head is not None and inplace.replace_start(path, fd, old, head):
            return method
    return ""


def _rewrite(source: PlainFile, file: TensorFile, edits: Edits, output: str | os.PathLike[str] | None) -> None:
    """Write the edited file to `output`, tensor data copied."""
    target = output if output is not None else source.name
    if _moves_tensors(file, edits):
        formats.write(target, _values(file, edits), file.tensors, order=file.order)
        return
    head = _header(file, edits, grow=False) or _header(file, edits, grow=True)
    assert head is not None                     # a header that may grow always fits
    rest = max(0, source.size - file.data_offset)

    def check(out: atomic.Output) -> None:
        if out.tell() != len(head) + rest or out.read(0, len(head)) != head:
            raise PyggmlError(f"{out.path}: the header read back is not what was written; the disk or its file system is damaged")

    with atomic.replacing(target, len(head) + rest, check, copied=rest) as out:
        out.write(head)
        if rest:
            out.copy(source.fd, file.data_offset)
