"""What was loaded: a model file with its configuration, tokenizer and weights, shared by every context that runs it."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import numpy as np

from pyggml import arch
from pyggml.arch.config import Config
from pyggml.errors import ModelError
from pyggml.formats import open as open_file
from pyggml.formats.show import quoted


class Model:
    """A model file with its configuration: everything that contexts share."""

    def __init__(self, file: Any, *, use_mlock: bool = False) -> None:
        self.file, self._lock = file, use_mlock
        self.arch = file.kv.get("general.architecture")
        if not isinstance(self.arch, str):
            state = "missing" if self.arch is None else f"{quoted(self.arch)}, not a string"
            raise ModelError(f'{file.path}: the key "general.architecture" is {state}, so this is not a model that can run')
        self.graph = arch.find(self.arch, file.path)
        self.config = Config.read(file.path, file.kv, self.arch)
        table = file.tensors.get("token_embd.weight")
        if table is None:
            raise ModelError(f'{file.path}: the tensor "token_embd.weight" is missing; the file is incomplete or not a {self.arch} model')
        if len(table.shape) != 2 or not table.shape[0]:
            raise ModelError(f'{file.path}: the tensor "token_embd.weight" has shape {list(table.shape)}; it must have a row for each token')
        self.n_vocab = table.shape[0]
        self._stores: dict[tuple[bool, bool], Any] = {}
        self._on_gpus: dict[int, Any] = {}

    @staticmethod
    def load(path: str | os.PathLike[str], *, use_mmap: bool = True, use_mlock: bool = False) -> Model:
        """Open a GGUF file (or the first of its shards) and read its configuration. Nothing is copied. use_mlock: weights stay in memory."""
        return Model(open_file(path, use_mmap=use_mmap), use_mlock=use_mlock)

    @cached_property
    def tokenizer(self) -> Any:
        from pyggml import tokenizers

        tokenizer = tokenizers.load(self.file.kv, self.file.path)
        self.file.verify()
        if tokenizer.n_vocab != self.n_vocab:
            raise ModelError(f'{self.file.path}: the vocabulary has {tokenizer.n_vocab} tokens and the tensor "token_embd.weight" {self.n_vocab} '
                             "rows; one of them is damaged, convert the model again")
        return tokenizer

    @property
    def n_params(self) -> int:
        return sum(int(np.prod(t.shape, dtype=np.int64)) for t in self.file.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in the file."""
        return sum(t.nbytes for t in self.file.tensors.values())

    def describe(self) -> str:
        """Architecture, size and the most common type of its matrices: `llama 1.1B Q4_0`."""
        share: dict[str, int] = {}
        for t in self.file.tensors.values():
            if len(t.shape) > 1:
                share[t.type.name] = share.get(t.type.name, 0) + t.nbytes
        n = self.n_params
        size = f"{n / 1e9:.2f}B" if n >= 1e9 else f"{n / 1e6:.2f}M"
        return f"{self.arch} {size} {max(share, key=lambda k: share[k])}"

    def weights(self, *, repack: bool, exact: bool) -> Any:
        """The weights as the CPU backend holds them, shared by every context that wants them the same way."""
        from pyggml.backends.cpu import WeightStore

        key = (repack, exact)
        if key not in self._stores:
            if not self._stores:
                self.file.read_ahead()
            self._stores[key] = WeightStore(repack=repack, exact=exact, capacity=self.nbytes + self.nbytes // 16, lock=self._lock)
        return self._stores[key]

    def weights_on(self, gpu: int) -> Any:
        """The weights that a GPU holds, shared by every context that puts layers there."""
        from pyggml.backends.cuda.device import open_device
        from pyggml.backends.cuda.store import DeviceWeights

        if gpu not in self._on_gpus:
            self._on_gpus[gpu] = DeviceWeights(open_device(gpu))
        return self._on_gpus[gpu]
