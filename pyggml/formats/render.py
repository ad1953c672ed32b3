"""Trying out a chat template that nobody has looked at: rendered by a separate process with little time and memory, in jinja2's sandbox.

This file is also the program of that process, so it imports nothing of pyggml; it loads the sandbox by its path.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CPU_SECONDS, MEMORY, TEMPLATE = 0.5, 256 << 20, 1 << 20
CONVERSATION = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "How are you?"}]


def problem(template: str) -> str:
    """Why `template` does not render a short conversation, or "". Takes less than a second of processor time."""
    return problems([template])[0]


def problems(templates: list[str]) -> list[str]:
    """The problem of each template, or "". Together they take less than a second of processor time: what comes too late is not tried."""
    long = [len(t.encode("utf-8", "surrogatepass")) > TEMPLATE for t in templates]
    found = iter(_render([t for t, too_long in zip(templates, long, strict=True) if not too_long]))
    return [f"it has {len(t)} characters (limit {TEMPLATE} bytes)" if too_long else next(found) for t, too_long in zip(templates, long, strict=True)]


def _render(templates: list[str]) -> list[str]:
    task = json.dumps({"templates": templates, "messages": CONVERSATION, "path": sys.path,
                       "sandbox": str(Path(__file__).with_name("sandbox.py"))})
    try:
        # isolated: modules that lie in the current folder, beside a downloaded model perhaps, are not imported
        done = subprocess.run([sys.executable, "-I", "-c", Path(__file__).read_text()], input=task, capture_output=True, text=True,
                              encoding="ascii", errors="replace", timeout=40 * CPU_SECONDS)
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        status, output = -1, (late.stdout or b"").decode("ascii", "replace")
    found = [json.loads(line) for line in output.splitlines(keepends=True) if line.endswith("\n")]
    if len(found) < len(templates):
        why = f"it does not finish within {CPU_SECONDS} seconds" if status < 0 else "it needs more than the memory allowed for a template"
        found += [why, *["it was not tried, because an earlier one took too long"] * (len(templates) - len(found) - 1)]
    return found


def _worker() -> None:
    """Reads a task from standard input, prints what went wrong."""
    import resource
    import runpy
    import signal

    task = json.load(sys.stdin)
    sys.path[:] = [folder for folder in task["path"] if folder]
    sandbox = runpy.run_path(task["sandbox"])
    environment = sandbox["environment"]()
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)           # its signal ends the process
    state = Path("/proc/self/statm")                # address space in pages; other systems limit the whole process instead
    limit = MEMORY + (int(state.read_text().split()[0]) * resource.getpagesize() if state.exists() else 0)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    class Refused(Exception):
        """Raised by a template that refuses a conversation: some accept only certain roles, which is no defect."""

    def raise_exception(message: str) -> None:
        raise Refused(message)

    environment.globals["raise_exception"] = raise_exception
    names: dict[str, Any] = {"messages": task["messages"], "add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}

    def render(template: str) -> str:
        try:
            sandbox["render"](environment.from_string(template), names)
        except Refused:
            pass
        except MemoryError:
            return "it needs more than the memory allowed for a template"
        except Exception as error:          # whatever a template can make jinja2 raise
            line = getattr(error, "lineno", None)
            return f"{type(error).__name__}{f' in line {line}' if line else ''}: {str(error).splitlines()[0] if str(error) else ''}"
        return ""

    for template in task["templates"]:
        print(json.dumps(render(template)), flush=True)


if __name__ == "__main__":
    _worker()
