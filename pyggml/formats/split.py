"""Cutting a model into parts and joining parts again, as gguf-split does: parts hold whole tensors, the first one the metadata."""

from __future__ import annotations

import contextlib
import os

from pyggml.errors import PyggmlError
from pyggml.formats import atomic, writer
from pyggml.formats.edit import PADDING
from pyggml.formats.shards import COUNT, NUMBER, TENSORS, part_path
from pyggml.formats.tensorfile import Tensor, TensorFile
from pyggml.formats.values import Typed

MOST_PARTS = 99_999             # the names have five digits


def plan(file: TensorFile, max_tensors: int = 0, max_bytes: int = 0, metadata_first: bool = False) -> list[list[Tensor]]:
    """The tensors of each part: at most `max_tensors` and `max_bytes` of data (0: no limit; a larger tensor gets its own part).

    metadata_first: the first part has no tensors.
    """
    parts: list[list[Tensor]] = [[]]
    size = 0
    for t in file.tensors.values():
        padded = -(-t.nbytes // file.alignment) * file.alignment
        if parts[-1] and ((max_tensors and len(parts[-1]) >= max_tensors) or (max_bytes and size + padded > max_bytes)):
            parts.append([])
            size = 0
        parts[-1].append(t)
        size += padded
    if metadata_first:
        parts.insert(0, [])
    if len(parts) > MOST_PARTS:
        raise PyggmlError(f"{len(parts)} parts are more than {MOST_PARTS}; allow larger parts")
    return parts


def split(file: TensorFile, stem: str, parts: list[list[Tensor]]) -> list[str]:
    """Write the parts as STEM-00001-of-0000N.gguf and so on; returns their paths. When one fails, those written are removed."""
    paths: list[str] = []
    atomic.refuse_input((part_path(stem, i + 1, len(parts)) for i in range(len(parts))), file.paths)
    try:
        for i, tensors in enumerate(parts):
            kv = {key: value for key, value in file.kv.typed().items() if key != PADDING} if i == 0 else {}
            if i > 0 and "general.alignment" in file.kv:
                kv["general.alignment"] = file.kv.typed_value("general.alignment")
            kv |= {NUMBER: Typed("u16", i), COUNT: Typed("u16", len(parts)), TENSORS: Typed("i32", len(file.tensors))}
            path = part_path(stem, i + 1, len(parts))
            writer.write(path, kv, tensors, order=file.order)
            paths.append(path)
    except BaseException:
        for path in paths:
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise
    return paths


def merge(file: TensorFile, output: str) -> None:
    """Write a model that was opened from parts (or a single file) as one file."""
    kv = {key: value for key, value in file.kv.typed().items() if key not in (PADDING, COUNT, NUMBER, TENSORS)}
    writer.write(output, kv, file.tensors, order=file.order)
