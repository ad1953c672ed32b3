"""The sandbox that chat templates run in: Jinja programs inside model files, which nobody has looked at.

They see nothing but what they are given and two functions, and their steps, the strings they build and their output are bounded.
This file is also loaded by the process of render.py, so it imports nothing of pyggml.
"""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Mapping
from typing import Any

MAX_OUTPUT = 8 << 20            # characters of a prompt, and of a string or list that + * ~ make on the way
MAX_STEPS = 500_000             # turns of loops and calls of macros in one rendering
_STEP = "pyggml.step"           # where a rendering counts its steps: no name in a template has a dot


def environment() -> Any:
    """Jinja as Hugging Face's templates expect it: block trimming, break and continue, tojson without HTML escapes, `generation`."""
    from jinja2 import nodes, pass_context
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training masks; a prompt needs only what is inside."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _size_of(operator, left, right) > MAX_OUTPUT:
                raise SecurityError(f"{operator} makes a value of more than {MAX_OUTPUT} elements or digits")
            return super().call_binop(context, operator, left, right)

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            """The syntax tree, with a step counted at every turn of a loop and every call of a macro, and `~` made bounded."""
            tree = super()._parse(source, name, filename)
            loops: list[Any] = [*tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))]
            for loop in loops:
                call = nodes.Call(nodes.EnvironmentAttribute("count_step"), [], [], None, None)
                loop.body.insert(0, nodes.ExprStmt(call, lineno=loop.lineno))
            return _Concats().visit(tree).set_environment(self)

    class _Concats(NodeTransformer):
        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            return nodes.Call(nodes.EnvironmentAttribute("bounded_concat"), node.nodes, [], None, None, lineno=node.lineno)

    @pass_context
    def count_step(context: Any) -> None:
        if next(context[_STEP]) > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")

    def bounded_concat(*values: Any) -> str:
        texts = [str(value) for value in values]
        if sum(map(len, texts)) > MAX_OUTPUT:
            raise SecurityError(f"~ makes a string of more than {MAX_OUTPUT} characters")
        return "".join(texts)

    def raise_exception(message: object) -> None:
        raise TemplateError(str(message))

    def strftime_now(format: str) -> str:
        return datetime.datetime.now().strftime(format)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
               sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made: Any = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], cache_size=0)
    del made.globals["lipsum"]
    made.filters["tojson"] = tojson
    made.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    made.count_step, made.bounded_concat = count_step, bounded_concat
    return made


def _size_of(operator: str, left: Any, right: Any) -> int:
    """About how large the result of an arithmetic operation on sequences or large numbers is."""
    if operator == "+":
        return len(left) + len(right) if hasattr(left, "__len__") and hasattr(right, "__len__") else 0
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(times, int):
            return len(sequence) * times
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * (right if operator == "**" else 1)
    return 0


def render(template: Any, variables: Mapping[str, Any]) -> str:
    """The template's output, stopped where it becomes too long. Raises whatever the template makes Jinja raise."""
    whole, size = [], 0
    for part in template.generate({**variables, _STEP: itertools.count(1)}):
        size += len(part)
        if size > MAX_OUTPUT:
            raise ValueError(f"the prompt is longer than {MAX_OUTPUT} characters")
        whole.append(part)
    return "".join(whole)
