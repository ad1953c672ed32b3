"""SentencePiece BPE (`tokenizer.ggml.model` = "llama"): spaces are U+2581, pairs merge by score, unknown bytes have tokens of their own."""

from __future__ import annotations

from pyggml.tokenizers.base import SPACE, Tokenizer
from pyggml.tokenizers.merge import spm_merger


class SentencePiece(Tokenizer):
    SPECIAL = {"bos": 1, "eos": 2, "unk": 0}
    OPTIONS = {"add_bos": True, "add_eos": False, "add_space_prefix": True}

    def _build(self) -> None:
        self.byte_ids = [self._byte_id(byte) for byte in range(256)]
        self._merger = spm_merger(self.vocab.table, self.vocab.scores, self.byte_ids)

    def _byte_id(self, byte: int) -> int:
        """The token of a byte: `<0xHH>`, else the byte as a text, else the unknown token (-1 without one)."""
        for text in (b"<0x%02X>" % byte, bytes([byte])):
            if (id := self.vocab.find(text)) is not None:
                return id
        return -1 if self.unk is None else self.unk

    def _encode_text(self, text: bytes, after_special: bool) -> list[int]:
        if after_special and self.options["add_space_prefix"]:
            text = b" " + text
        return self._merger.encode(text.replace(b" ", SPACE))

    def _spell(self, text: bytes) -> bytes:
        return text.replace(SPACE, b" ")

    def _newline(self) -> int | None:
        return self.byte_ids[0x0A] if self.byte_ids[0x0A] >= 0 else self.pad
