"""Model files: opening whatever the user has, and writing GGUF."""

from __future__ import annotations

import os
from collections.abc import Callable

from pyggml.errors import GGUFError, PyggmlError
from pyggml.formats import ggml, gguf, inplace, shards, sniff
from pyggml.formats.source import Source, is_address, source_of
from pyggml.formats.tensorfile import Metadata, Tensor, TensorFile
from pyggml.formats.values import Typed, printable
from pyggml.formats.writer import NewTensor, new_tensor, write

__all__ = ["Metadata", "NewTensor", "Tensor", "TensorFile", "Typed", "new_tensor", "open", "open_source", "write"]


def open(path: str | bytes | os.PathLike[str], *, use_mmap: bool = True, split: bool = True, limits: gguf.Limits | None = None) -> TensorFile:
    """The model file at `path`, memory-mapped (or read piece by piece with use_mmap=False, which a file cut meanwhile cannot hurt).

    `path` may be an address, https://... or hf:user/repo/file.gguf: only what is looked at is fetched then.
    split: a part of a split model opens the whole model; False opens that part alone.
    GGUFError says what is wrong with the file, or what it is instead.
    """
    path = os.fsdecode(path)
    if not path or "\0" in path:
        raise PyggmlError(f"{printable(path)!r} is not the path of a file; give that of a model file")
    if not is_address(path):
        inplace.recover(path)
    file = open_source(source_of(path, use_mmap), limits, lambda part: source_of(part, use_mmap))
    if split and shards.is_split(file.kv):
        return shards.join(file, lambda part: open_source(source_of(part, use_mmap), limits))
    return file


def open_source(source: Source, limits: gguf.Limits | None = None, open_part: Callable[[str], Source] | None = None) -> TensorFile:
    """The model behind a source of bytes. open_part: opens the other files of a pre-GGUF model in several."""
    start = bytes(source.head(4096)[:4096])
    if start[:4] in ggml.MAGICS:
        return ggml.read(source, open_part)
    if not start.startswith(gguf.MAGIC):
        what = sniff.foreign(start, source.size)
        if what:
            raise GGUFError(f"{printable(source.name)}: offset 0x0: this is {what}")
    return gguf.read(source, limits)
