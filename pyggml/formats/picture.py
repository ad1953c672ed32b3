"""A model file as one page of drawings: where its bytes are, how its weights spread, which of them are outliers (extra [plot])."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pyggml import page
from pyggml.formats import show
from pyggml.formats.survey import BINS, RANGE, SAMPLE, Spread, survey
from pyggml.formats.tensorfile import Tensor, TensorFile
from pyggml.formats.values import printable

KINDS, LAYERS, LISTED = 16, 512, 20             # kinds of tensors and layers that are drawn; outliers that are listed
_LAYER = re.compile(r"blk\.(\d{1,4})\.(.+)")

_BODY = """<p>{{ summary }}</p>
{% if not sizes %}<p>The file has no tensors.</p>{% else %}
<figure>{{ sizes | safe }}</figure>
<figure>{{ layers | safe }}</figure>
<p>The following looks at {% if sampled %}rows evenly spaced over each tensor, at most {{ sample }} weights of it ({{ "%.1f" | format(share) }} %
of all): a single larger weight may be elsewhere{% else %}every weight{% endif %}. rms is the root mean square.
{% if bad %}<b>{{ bad }} of the weights are NaN or infinite; they are left out. Run pyggml check.</b>{% endif %}</p>
{% for picture in pictures %}<figure>{{ picture | safe }}</figure>{% endfor %}
<h2>Largest outliers</h2>
<p>The largest weight of a tensor in units of its rms, and the input channel (column) whose rms is the largest beside the median channel's.
Such weights and channels are what quantization in blocks serves worst.</p>
{% macro rows(list) %}<table><tr><th>tensor</th><th>type</th><th>shape</th><th>rms</th><th>largest / rms</th><th>at row, column</th>
<th>zeros %</th><th>strongest channel</th><th>its rms / median</th></tr>
{% for t, s in list %}<tr><td>{{ t.name | shown }}</td><td>{{ t.type }}</td><td>{{ t | shape }}</td><td>{{ "%.4g" | format(s.rms) }}</td>
<td>{{ "%.1f" | format(s.outlier) }}</td><td>{{ s.where[0] }}, {{ s.where[1] }}</td><td>{{ "%.2f" | format(100 * s.zeros) }}</td>
<td>{{ s.channel if s.channel_ratio == s.channel_ratio else "" }}</td>
<td>{{ "%.1f" | format(s.channel_ratio) if s.channel_ratio == s.channel_ratio else "" }}</td></tr>
{% endfor %}</table>{% endmacro %}
{{ rows(outliers) }}
<details><summary>All {{ all | length }} tensors, in file order</summary>{{ rows(all) }}</details>
{% endif %}"""


def html(file: TensorFile, sample: int = SAMPLE) -> str:
    """The page; PyggmlError when matplotlib is not installed."""
    page.require()
    weights, stored = sum(t.size for t in file.tensors.values()), sum(t.nbytes for t in file.tensors.values())
    bits = f", {8 * stored / weights:.2f} bits per weight" if weights else ""
    summary = f"{file.format}, {show.amount(file.nbytes)}, {len(file.tensors)} tensors, {show.amount(weights, '').strip()} weights{bits}"
    values: dict[str, Any] = {"summary": summary, "sizes": ""}
    if file.tensors:
        spreads = survey(file, sample)
        seen = sum(s.n for s in spreads.values())
        matrices = [(file.tensors[name], s) for name, s in spreads.items() if len(file.tensors[name].shape) > 1]
        ranked = sorted(matrices, key=lambda item: math.inf if math.isnan(item[1].outlier) else -item[1].outlier)
        values |= {
            "sizes": _by_type(file), "layers": _by_layer(file), "sample": sample, "share": 100 * seen / max(1, weights), "sampled": seen < weights,
            "bad": sum(s.bad for s in spreads.values()), "outliers": ranked[:LISTED], "all": [(file.tensors[n], s) for n, s in spreads.items()],
            "pictures": [draw for draw in (_histograms(matrices), _map(matrices, lambda s: s.rms, "rms of the weights", "log"),
                                           _map(matrices, lambda s: s.outlier, "largest weight / rms", "linear"),
                                           _map(matrices, lambda s: s.channel_ratio, "strongest channel: its rms / the median channel's", "log"))
                         if draw]}
    return page.html(f"Tensors of {printable(os.path.basename(file.path))}", _BODY, {"shown": printable, "shape": show.shape}, **values)


def kind(name: str) -> tuple[int, str]:
    """Layer and name within the layer of a tensor; -1 for one that belongs to no layer."""
    match = _LAYER.fullmatch(name)
    return (int(match[1]), match[2]) if match else (-1, name)


def _by_type(file: TensorFile) -> str:
    """Bytes and number of the tensors of each type."""
    sizes: dict[str, int] = defaultdict(int)
    counts: dict[str, int] = defaultdict(int)
    for t in file.tensors.values():
        sizes[t.type.name] += t.nbytes
        counts[t.type.name] += 1
    names = sorted(sizes, key=lambda n: sizes[n])
    total = max(1, sum(sizes.values()))
    axes = page.axes(8, 0.8 + 0.4 * len(names))
    bars = axes.barh(names, [sizes[n] / 1e6 for n in names], color=[_color(file, n) for n in names])
    axes.bar_label(bars, [f"{show.amount(sizes[n])} in {counts[n]} tensors, {100 * sizes[n] / total:.1f} %" for n in names], padding=4, fontsize=8)
    axes.margins(x=0.5)
    axes.set(xlabel="MB", title="Size by type")
    return page.svg(axes)


def _color(file: TensorFile, type_name: str) -> str:
    """One colour for a type in every drawing of a file."""
    names = list(dict.fromkeys(t.type.name for t in file.tensors.values()))
    return f"C{names.index(type_name) % 10}"


def _by_layer(file: TensorFile) -> str:
    """Bytes of each layer, stacked by type; what belongs to no layer stands at the left."""
    sizes: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    others = sorted({t.name for t in file.tensors.values() if kind(t.name)[0] < 0 and len(t.shape) > 1})[:8]
    for t in file.tensors.values():
        layer = kind(t.name)[0]
        if layer < LAYERS and (layer >= 0 or t.name in others):
            sizes[t.type.name][layer if layer >= 0 else others.index(t.name) - len(others) - 1] += t.nbytes
    axes = page.axes()
    places = sorted({place for by_place in sizes.values() for place in by_place})
    bottom = np.zeros(len(places))
    for name, by_place in sizes.items():
        height = np.array([by_place[p] / 1e6 for p in places])
        axes.bar(places, height, bottom=bottom, label=page.label(name), color=_color(file, name), width=0.85)
        bottom += height
    layers = [p for p in places if p >= 0]
    marks = layers[::max(1, len(layers) // 16)]
    first = -len(others) - 1
    axes.set_xticks([*range(first, first + len(others)), *marks], [*(page.label(n.removesuffix(".weight")) for n in others), *map(str, marks)])
    for text in axes.get_xticklabels()[:len(others)]:
        text.set(rotation=30, ha="right", fontsize=8)
    axes.legend(fontsize=8)
    axes.set(xlabel="layer", ylabel="MB", ylim=(0, 1.08 * max(bottom.max(), 1e-6)), title="Size by layer")
    return page.svg(axes)


def _kinds(matrices: list[tuple[Tensor, Spread]]) -> dict[str, dict[int, Spread]]:
    """Kind -> layer -> spread, for the kinds that most layers have, in file order."""
    kinds: dict[str, dict[int, Spread]] = defaultdict(dict)
    for t, s in matrices:
        layer, name = kind(t.name)
        if layer < LAYERS:
            kinds[name][layer] = s
    common = sorted(kinds, key=lambda name: -len(kinds[name]))[:KINDS]
    return {name: kinds[name] for name in kinds if name in common}


def _histograms(matrices: list[tuple[Tensor, Spread]]) -> str:
    """One curve for each kind of tensor, all layers together, beside a normal distribution. "" when there is nothing to draw."""
    kinds = _kinds(matrices)
    if not kinds:
        return ""
    edges = np.linspace(-RANGE, RANGE, BINS + 1)
    middle, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
    axes = page.axes(8, 5)
    lowest = 1.0
    for name, spreads in kinds.items():
        counts = np.sum([s.histogram for s in spreads.values()], 0)
        density = counts / max(1, counts.sum()) / width
        lowest = min(lowest, density[density > 0].min(initial=1))
        axes.plot(middle, np.where(density > 0, density, np.nan), label=page.label(name.removesuffix(".weight")), linewidth=1)
    axes.plot(middle, np.exp(-middle ** 2 / 2) / math.sqrt(2 * math.pi), "k--", linewidth=1, label="normal distribution")
    axes.set(xlabel=f"weight / rms of its tensor (what lies beyond {RANGE:g} is in the outermost steps)", ylabel="density", yscale="log",
             ylim=(lowest / 2, None), title="How the weights spread")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper right")
    return page.svg(axes)


def _map(matrices: list[tuple[Tensor, Spread]], number: Callable[[Spread], float], title: str, scale: str) -> str:
    """One number of every tensor: kinds down, layers across. "" when there are no layers."""
    kinds: Mapping[str, dict[int, Spread]] = {n: by for n, by in _kinds(matrices).items() if max(by) >= 0}
    if not kinds:
        return ""
    count = 1 + max(layer for by_layer in kinds.values() for layer in by_layer)
    table = np.full((len(kinds), count), np.nan)
    for i, by_layer in enumerate(kinds.values()):
        for layer, s in by_layer.items():
            table[i, layer] = number(s)
    if scale == "log":
        table[~(table > 0)] = np.nan
    if np.isnan(table).all():
        return ""
    axes = page.axes(8, 1.2 + 0.28 * len(kinds))
    image = axes.pcolormesh(np.arange(count + 1) - 0.5, np.arange(len(kinds) + 1) - 0.5, table, norm=scale, cmap="viridis", rasterized=True)
    axes.set_yticks(range(len(kinds)), [page.label(name.removesuffix(".weight")) for name in kinds], fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.get_major_locator().set_params(integer=True)
    colors = axes.figure.colorbar(image, ax=axes).ax.yaxis
    for set_format in (colors.set_major_formatter, colors.set_minor_formatter):
        set_format("{x:.3g}")
    axes.set(xlabel="layer", title=title)
    return page.svg(axes)
