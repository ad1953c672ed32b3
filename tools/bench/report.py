"""The markdown that peers.py prints, made from the JSON report that it writes."""

from __future__ import annotations

from collections.abc import Sequence

SPEED_HEAD = ("model", "test", "pyggml t/s", "rival", "t/s", "ratio", "95%", "pairs", "verdict", "rival's flags")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def speed_rows(model: str, name: str, test: dict) -> list[list[str]]:
    """One row for each rival of a test; a test without a single undisturbed round says so."""
    if not test["counted"]:
        return [[model, name, "", "", "", "", "", f"0 of {test['rounds']}", "every round was disturbed", ""]]
    rows = []
    for rival, c in test["against"].items():
        settings = test["settings"][rival]
        rows.append([model, name, f"{test['rates']['pyggml']:.2f}", rival, f"{test['rates'][rival]:.2f}", f"{c['ratio']:.3f}",
                     f"{c['low']:.3f}-{c['high']:.3f}", f"{c['pairs']} of {test['rounds']}", c["verdict"],
                     f"`{settings['flags']} -t {settings['threads']}`"])
    return rows


def section(title: str, models: list[dict], key: str, rows_of) -> list[str]:
    """A titled table over the models that have `key`; `rows_of` turns one entry into (column names, rows of numbers)."""
    head: list[str] = []
    rows = []
    for model in models:
        if key in model:
            head, body = rows_of(model[key])
            rows += [[model["model"], *cells] for cells in body]
    return ["", title, "", *table(["model", *head], rows)] if rows else []


def agreement_rows(entry: dict) -> tuple[list[str], list[list[str]]]:
    return list(entry), [[f"{value:.4g}" for value in entry.values()]]


def start_rows(entry: dict) -> tuple[list[str], list[list[str]]]:
    head = ["program", *next(iter(entry.values()))]
    return head, [[name, *(f"{value:.3f}" if unit.endswith(" s") else f"{value:.0f}" for unit, value in figures.items())]
                  for name, figures in entry.items()]


def markdown(report: dict) -> str:
    """The whole report for people."""
    models = report["models"]
    speed = [row for model in models for name, test in model["tests"].items() for row in speed_rows(model["model"], name, test)]
    absent = sorted({f"{name} without {who}: {why}" for m in models for name, t in m["tests"].items() for who, why in t["absent"].items()})
    lines = [f"{report['date']}, commit {report['commit']}, {report['threads']} threads on processors {report['processors']}", "",
             "; ".join(f"{key}: {value}" for key, value in report["machine"].items()), "", *table(SPEED_HEAD, speed), *absent,
             *section("Logits against llama_cpp, same file and tokens:", models, "agreement", agreement_rows),
             *section("Start to first token, and peak memory:", models, "start", start_rows)]
    return "\n".join(lines) + "\n"
