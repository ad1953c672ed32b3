"""Models split over several files, `NAME-00001-of-0000N.gguf`: opening any of them opens the whole as one TensorFile."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from pyggml.errors import GGUFError
from pyggml.formats import show
from pyggml.formats.source import is_address
from pyggml.formats.tensorfile import Metadata, Tensor, TensorFile
from pyggml.formats.values import printable

_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
COUNT, NUMBER, TENSORS = "split.count", "split.no", "split.tensors.count"


def part_path(stem: str, number: int, count: int) -> str:
    """The path of part `number` (from 1) of `count`."""
    return f"{stem}-{number:05d}-of-{count:05d}.gguf"


def parts_of(path: str | os.PathLike[str]) -> list[str]:
    """Paths of all parts of the split model that `path` is named as a part of; just `path` when it is not named so."""
    match = _NAME.fullmatch(os.fspath(path))
    if not match or not 1 <= int(match["number"]) <= int(match["count"]):
        return [os.fspath(path)]
    return [part_path(match["stem"], i + 1, int(match["count"])) for i in range(int(match["count"]))]


def is_split(kv: Metadata) -> bool:
    return COUNT in kv and isinstance(kv[COUNT], int) and kv[COUNT] > 1


def join(opened: TensorFile, open_one: Callable[[str], TensorFile]) -> TensorFile:
    """The whole model of which `opened` is a part. Its metadata is the first part's, without what describes the split."""
    path, count = opened.path, opened.kv[COUNT]
    paths = parts_of(path)
    if len(paths) == 1:
        raise GGUFError(f'{printable(path)}: offset 0x{opened.kv.entry(COUNT).start:x}: key "{COUNT}" says it is one of {count} parts; '
                        f'name them {part_path("NAME", 1, count)} and so on')
    missing = [p for p in paths if not is_address(p) and not os.path.exists(p)]      # a server says so itself
    if missing:
        names = ", ".join(printable(p) for p in missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise GGUFError(f"{printable(path)}: the model has {len(paths)} parts, missing: {names}")
    files = [opened if p == path else open_one(p) for p in paths]
    tensors: dict[str, Tensor] = {}
    for i, file in enumerate(files):
        for key, expected in ((COUNT, len(paths)), (NUMBER, i)):
            value = file.kv.get(key)
            if type(value) is not int or value != expected:         # true is an int, too
                at, found = (file.kv.entry(key).start, show.text(value)) if key in file.kv else (file.table_end, "missing")
                raise GGUFError(f'{printable(file.path)}: offset 0x{at:x}: key "{key}" is {found}, by the file name it should be '
                                f'{expected}; was the file renamed?')
        for name, tensor in file.tensors.items():
            if name in tensors:
                raise GGUFError(f'{printable(file.path)}: offset 0x{tensor.offset:x}: tensor "{printable(name)}" '
                                f'is also in {printable(tensors[name].source.name)}')
            tensors[name] = tensor
    first = files[0]
    expected = first.kv.get(TENSORS, len(tensors))
    if not isinstance(expected, int) or expected != len(tensors):
        raise GGUFError(f'{printable(first.path)}: offset 0x{first.kv.entry(TENSORS).start:x}: key "{TENSORS}" is {show.text(expected)}, '
                        f'the parts hold {len(tensors)} tensors')
    entries = {key: first.kv.entry(key) for key in first.kv if key not in (COUNT, NUMBER, TENSORS)}
    return TensorFile([f.sources[0] for f in files], Metadata(entries, first.kv.decode), tensors, format=first.format,
                      alignment=first.alignment, data_offset=first.data_offset, order=first.order,
                      warnings=[w for f in files for w in f.warnings])
