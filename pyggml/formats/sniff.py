"""Telling what a file is from its first bytes, and what to do with it when it is not a model file that can be read here."""

from __future__ import annotations

import struct

# Formats named by how a file starts: (first bytes, what it is and the way out)
FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs.github.com/", 'a git-LFS pointer, not the file itself; run "git lfs pull"'),
    (b"PK\x03\x04", "a ZIP archive (PyTorch checkpoints are); convert the model to GGUF"),
    (b"PK\x05\x06", "an empty ZIP archive; convert the model to GGUF"),
    (b"\x80\x02", "a Python pickle (an old PyTorch checkpoint); convert the model to GGUF"),
    (b"\x80\x03", "a Python pickle; convert the model to GGUF"),
    (b"\x80\x04", "a Python pickle; convert the model to GGUF"),
    (b"\x80\x05", "a Python pickle; convert the model to GGUF"),
    (b"\x1f\x8b", 'gzip-compressed; unpack it with "gunzip"'),
    (b"BZh", 'bzip2-compressed; unpack it with "bunzip2"'),
    (b"\xfd7zXZ\x00", 'xz-compressed; unpack it with "unxz"'),
    (b"\x28\xb5\x2f\xfd", 'zstd-compressed; unpack it with "unzstd"'),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive; unpack it first"),
    (b"\x89HDF\r\n", "an HDF5 file (Keras weights are); convert the model to GGUF"),
    (b"\x93NUMPY", "a numpy array, not a model"),
    (b"ggla", "a LoRA adapter in a format from 2023; convert the adapter again from its source"),
    (b"algg", "a LoRA adapter in a format from 2023; convert the adapter again from its source"),
    (b"ggml", "a ggml file of 2023 from a big-endian machine; convert the model again from its source"),
    (b"ggmf", "a ggmf file of 2023 from a big-endian machine; convert the model again from its source"),
    (b"ggjt", "a ggjt file of 2023 from a big-endian machine; convert the model again from its source"),
    (b"FUGG", "a GGUF file whose magic is backwards; it was damaged by a program that swaps bytes"),
    (b"\x7fELF", "a program or library, not a model"),
    (b"%PDF-", "a PDF document, not a model"),
    (b"\x89PNG", "a PNG picture, not a model"),
    (b"GGJF", "not a format this version knows; convert the model again from its source"),
)
_TEXT = ((b"<!doctype html", "an HTML page, not a model: the download got an error or a login page"),
         (b"<html", "an HTML page, not a model: the download got an error or a login page"),
         (b"<?xml", "an XML document, not a model: the download got an error message"),
         (b"{", "a JSON document, not a model: the download got an error message, or this is a configuration file"))


def foreign(head: bytes, size: int) -> str:
    """What a file that starts with `head` (64 bytes or more, if it has them) is, when it is no model format read here; "" if unclear."""
    if not size:
        return "empty (0 bytes); download it again"
    for start, what in FOREIGN:
        if head.startswith(start):
            return what
    if len(head) > 9 and head[8:9] == b"{" and 0 < struct.unpack("<Q", head[:8])[0] <= size - 8:
        return "a safetensors file; convert the model to GGUF"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, what in _TEXT:
        if text.startswith(start):
            return what
    return ""
