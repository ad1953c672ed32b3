"""The errors that pyggml raises for what users hand it: each message is one sentence with the place, the value and the way out."""


class PyggmlError(Exception):
    """Base of every error that is the input's or the request's fault, not pyggml's. The CLI prints it and exits with 1."""


class GGUFError(PyggmlError):
    """A model file is damaged, incomplete, or not what it says it is."""


class ModelError(PyggmlError):
    """A sound file that cannot be run: unknown architecture, a key or tensor missing, or a tensor of the wrong shape."""


class UnsupportedStep(ModelError):
    """A backend has no kernel for something that a model computes; another backend may."""


class ContextOverflow(PyggmlError, ValueError):
    """More tokens than the context holds; the message names both sizes."""


class ParameterError(PyggmlError, ValueError):
    """A parameter outside its range, or one that pyggml does not support; the message names it and what is possible."""


class Cancelled(PyggmlError):
    """A running evaluation was stopped from outside (Ctrl-C, a closed request)."""
