"""What every report is made of: one self-contained HTML page with drawings inside (extra [plot])."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from pyggml.errors import PyggmlError
from pyggml.formats.atomic import replacing
from pyggml.formats.values import printable

_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
  table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
  th:first-child, td:first-child, .words { text-align: left }
  td { white-space: nowrap } td.words, td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 8rem }
  figure { margin: 1.5rem 0 } svg { max-width: 100%; height: auto }
  summary { cursor: pointer }
</style></head><body>
<h1>{{ title }}</h1>
{% block body %}{% endblock %}
</body></html>
"""


def require() -> None:
    """PyggmlError when matplotlib is not installed: to be called before work that ends in a page."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PyggmlError("--plot needs matplotlib: pip install 'pyggml[plot]'") from None


def axes(width: float = 8, height: float = 4.5) -> Any:
    """Axes to draw on, in inches; `svg` takes them."""
    require()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height)).add_subplot()


def label(text: str) -> str:
    """Text from a file as a drawing shows it: escaped, short, and no formula."""
    text = printable(text)
    return (text if len(text) <= 40 else text[:39] + "\u2026").replace("$", r"\$")


def svg(drawn: Any) -> str:
    """The figure of these axes as an <svg> element, the same for the same drawing."""
    import matplotlib

    out = io.StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "pyggml"}):
        warnings.simplefilter("ignore")             # a character that the font lacks is drawn as a box
        drawn.figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg"):]


def html(title: str, body: str, filters: Mapping[str, Callable[[Any], str]] | None = None, **values: Any) -> str:
    """The page: `body` is a jinja2 template over `values`, in which everything is escaped but what passes `| safe`."""
    from jinja2 import DictLoader, Environment

    templates = {"frame": _FRAME, "page": "{% extends 'frame' %}{% block body %}" + body + "{% endblock %}"}
    environment = Environment(autoescape=True, loader=DictLoader(templates))
    environment.filters |= filters or {}
    return environment.get_template("page").render(title=title, **values)


def save(path: str | os.PathLike[str], text: str) -> None:
    """Write a page, whole or not at all."""
    with replacing(path) as out:
        out.write(text.encode("utf-8", "replace"))
