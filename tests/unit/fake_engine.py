"""A model that counts letters: after a token comes the next one in the alphabet, after `z` the end. Exact, instant, and enough
to test what is built on a Model and a Context. Token ids: 0 bos, 1 eos, 2 newline, then the pieces."""

from types import SimpleNamespace

import numpy as np

from pyggml.errors import Cancelled, ContextOverflow, PyggmlError

LETTERS = [bytes([c]) for c in range(ord("a"), ord("z") + 1)]
SNOWMAN = [b"\xe2\x98", b"\x83"]            # one character in two tokens
PIECES = [b"<s>", b"</s>", b"\n", *LETTERS, *SNOWMAN, b" "]
ID = {piece: i for i, piece in enumerate(PIECES)}


class FakeTokenizer:
    bos, eos, nl = 0, 1, 2
    eog = frozenset({1})
    options = {"add_bos": True}
    n_vocab = len(PIECES)

    def encode(self, text, *, add_special=True, parse_special=False):
        text = text.encode() if isinstance(text, str) else text
        ids = [0] if add_special else []
        while text:
            piece = next((p for i, p in enumerate(PIECES) if text.startswith(p) and (parse_special or i > 1)), None)
            assert piece is not None, text
            ids.append(ID[piece])
            text = text[len(piece):]
        return ids

    def piece(self, id):
        return PIECES[id]

    def is_control(self, id):
        return id < 2


class FakeModel:
    """`order` maps a token to the one that follows it, where that is not the next letter."""

    n_params, nbytes = 1_500_000_000, 3 << 29

    def __init__(self, order=None):
        self.n_vocab = len(PIECES)
        self.order = {ID[b"z"]: 1, 0: ID[b"a"], **{ID[a]: ID[b] for a, b in (order or {}).items()}}
        self.tokenizer = FakeTokenizer()
        self.config = SimpleNamespace(n_ctx_train=64, n_vocab=self.n_vocab, n_embd=8, n_layers=1)
        self.file = SimpleNamespace(path="fake.gguf", kv={"general.architecture": "fake", "fake.embedding_length": 8, "fake.scale": 0.5,
                                                          "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 0,
                                                          "tokenizer.ggml.tokens": PIECES})

    @staticmethod
    def load(path, *, use_mmap=True, use_mlock=False):
        if not str(path).startswith("fake"):
            raise PyggmlError(f"{path}: cannot open: No such file or directory")
        return FakeModel()

    def describe(self):
        return "fake 1.5B F32"

    def logits(self, token):
        """float32 (n_vocab): the next token is 8 above the others, which fall slightly with their ids."""
        row = -np.arange(self.n_vocab, dtype=np.float32) / 100
        row[self.order.get(token, min(token + 1, self.n_vocab - 1))] += 8
        return row


class FakeContext:
    gpu_layers = 0

    def __init__(self, model, *, n_ctx=512, n_batch=2048, n_ubatch=512, n_threads=None, n_threads_batch=None, place=None, type_k="F16", type_v="F16",
                 repack=True, exact=False, deterministic=False, timing=False, n_gpu_layers=0, device=None, main_gpu=0):
        self.model, self.n_ctx, self.n_batch, self.n_ubatch = model, n_ctx or model.config.n_ctx_train, n_batch, n_ubatch
        self.n_past, self.pool = 0, SimpleNamespace(n_threads=n_threads or 2)
        self.evaluated = []         # (n_past before, tokens, logits) of each call
        self.cancelled = False
        self.on_eval = lambda: None
        self._out = np.zeros((0, model.n_vocab), np.float32)

    def eval(self, tokens, logits="last"):
        tokens = [int(t) for t in tokens]
        if self.n_past + len(tokens) > self.n_ctx:
            raise ContextOverflow(f"{self.n_past} + {len(tokens)} tokens do not fit into the context of {self.n_ctx}")
        self._out[:] = np.nan       # a view of the last call is no longer valid
        self.on_eval()
        if self.cancelled:
            raise Cancelled("stopped")
        self.evaluated.append((self.n_past, tokens, logits))
        self.n_past += len(tokens)
        chosen = {"last": tokens[-1:], "all": tokens, "none": []}[logits]
        self._out = np.array([self.model.logits(t) for t in chosen], np.float32).reshape(len(chosen), self.model.n_vocab)
        return self._out

    def truncate(self, n):
        assert 0 <= n <= self.n_past
        self.n_past = n

    def reset(self):
        self.n_past = 0

    def save(self):
        return [np.zeros((1, self.n_past, 4), np.uint8)]

    def restore(self, saved):
        self.n_past = saved[0].shape[1]

    def cancel(self):
        self.cancelled = True

    def op_times(self):
        from pyggml.plan import StepTime, Work

        n = len(self.evaluated)
        return [StepTime("mul_mat", "blk.0.ffn_up.weight", 1000 * n, Work(4000 * n, int8=9000 * n)),
                StepTime("mul_mat", "blk.1.ffn_up.weight", 500 * n, Work(2000 * n, int8=3000 * n)),
                StepTime("add", "x", 300 * n, Work(40 * n))]

    def sequences(self, tokens, start, wanted):
        self.evaluated.append((start, tokens.tolist(), list(wanted)))
        return np.zeros((len(tokens) * len(wanted), self.model.n_vocab), np.float32)

    def copy_bandwidth(self):
        return 0.0


def install(monkeypatch):
    """Put the fake in the place of the engine, for everything that loads it by name."""
    from pyggml import context, llama, model

    monkeypatch.setattr(model, "Model", FakeModel)
    monkeypatch.setattr(context, "Context", FakeContext)
    monkeypatch.setattr(llama, "Model", FakeModel)
    monkeypatch.setattr(llama, "Context", FakeContext)
