"""The comparison as one HTML page with pictures inside: size against loss, and the spread of the loss over tokens (extra [plot])."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyggml import page
from pyggml.measure.compare import Comparison

_BODY = """<p>{{ tokens }} scored tokens in {{ chunks }} chunks of {{ n_ctx }}; reference {{ reference }}. ± is one standard error.</p>
{% for picture in pictures %}<figure>{{ picture | safe }}</figure>{% endfor %}
<table><tr><th>file</th><th>MiB</th><th>bits per weight</th><th>mean KLD</th><th>99% KLD</th><th>ln PPL ratio</th><th>RMS Δp %</th>
<th>same top %</th></tr>
{% for f in files %}<tr><td>{{ f.name }}</td><td>{{ "%.2f" | format(f.mib) }}</td><td>{{ "%.3f" | format(f.bpw) }}</td>
<td>{{ "%.6f ± %.6f" | format(*f.kld) }}</td><td>{{ "%.5f" | format(f.kld99) }}</td><td>{{ "%+.5f ± %.5f" | format(*f.ratio) }}</td>
<td>{{ "%.3f" | format(f.rms) }}</td><td>{{ "%.2f" | format(f.top) }}</td></tr>
{% endfor %}</table>
{% if pairs %}<table><tr><th>pair</th><th>KLD difference</th><th class="words">verdict</th></tr>
{% for p in pairs %}<tr><td>{{ p.first }} − {{ p.second }}</td><td>{{ "%+.6f ± %.6f" | format(p.difference.value, p.difference.error) }}</td>
<td class="words">{{ p.verdict }}</td></tr>{% endfor %}</table>{% endif %}
"""


def html(found: Comparison) -> str:
    """The page; PyggmlError when matplotlib is not installed."""
    rows = []
    for f in found.files:
        s = f.statistics
        rows.append({"name": f.name, "mib": f.nbytes / 2**20, "bpw": f.bits_per_weight, "kld": tuple(s["Mean KLD"]), "kld99": s["99.0% KLD"],
                     "ratio": tuple(s["Mean ln(PPL(Q)/PPL(base))"]), "rms": s["RMS Δp"].value, "top": s["Same top p"].value})
    return page.html(f"Quantizations of {found.reference.rsplit('/', 1)[-1]}", _BODY, reference=found.reference, chunks=found.n_chunks,
                     n_ctx=found.n_ctx, tokens=len(found.files[0].tokens) if found.files else 0, files=rows, pairs=found.pairs,
                     pictures=[_size_against_loss(rows), _spread(found)])


def _size_against_loss(rows: list[dict[str, Any]]) -> str:
    axes = page.axes()
    axes.errorbar([r["bpw"] for r in rows], [r["kld"][0] for r in rows], yerr=[2 * r["kld"][1] for r in rows], fmt="o", capsize=3)
    middle = float(np.mean(axes.get_xlim()))
    for i, r in enumerate(sorted(rows, key=lambda r: (r["bpw"], -r["kld"][0]))):        # neighbours: one name above, one below
        side, x = ("right", -6) if r["bpw"] > middle else ("left", 6)                   # towards the middle, where there is room
        axes.annotate(r["name"], (r["bpw"], r["kld"][0]), textcoords="offset points", xytext=(x, -11 if i % 2 else 5), ha=side, fontsize=8)
    axes.margins(x=0.2)
    axes.set(xlabel="bits per weight", ylabel="mean KL divergence (nats, bars: two standard errors)", yscale="log", title="Size against loss")
    axes.grid(alpha=0.3, which="both")
    return page.svg(axes)


def _spread(found: Comparison) -> str:
    axes = page.axes()
    for f in found.files:
        kld = np.sort(np.maximum(f.tokens.kld, 1e-7))
        keep = np.unique(np.linspace(0, len(kld) - 1, 400).astype(int))
        axes.plot(kld[keep], 100 * keep / max(1, len(kld) - 1), label=f.name)
    axes.set(xlabel="KL divergence of a token (nats)", ylabel="tokens at or below, %", xscale="log", title="Spread over tokens")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    return page.svg(axes)
