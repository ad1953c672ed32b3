"""Trying out a chat template that nobody has looked at: rendered by a separate process with little time and memory, in jinja2's sandbox.

This file is also the program of that process, so it imports nothing of pyggml.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CPU_SECONDS, MEMORY, OUTPUT, TEMPLATE = 2, 256 << 20, 8 << 20, 1 << 20
CONVERSATION = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "How are you?"}]


def problem(template: str) -> str:
    """Why `template` does not render a short conversation, or "". Never runs longer than a few seconds."""
    if len(template.encode("utf-8", "surrogateescape")) > TEMPLATE:
        return f"it has {len(template)} characters (limit {TEMPLATE} bytes)"
    task = json.dumps({"template": template, "messages": CONVERSATION, "path": sys.path})
    try:
        # isolated: modules that lie in the current folder, beside a downloaded model perhaps, are not imported
        done = subprocess.run([sys.executable, "-I", "-c", Path(__file__).read_text()], input=task, capture_output=True, text=True,
                              encoding="ascii", errors="replace", timeout=10 * CPU_SECONDS)
    except subprocess.TimeoutExpired:
        return f"it does not finish within {CPU_SECONDS} seconds"
    if done.returncode < 0:
        return f"it does not finish within {CPU_SECONDS} seconds"
    if done.returncode:
        return "it needs more than the memory or output allowed for a template"
    return json.loads(done.stdout)["problem"]


def _worker() -> None:
    """Reads a task from standard input, prints what went wrong."""
    import resource
    task = json.load(sys.stdin)
    sys.path[:] = [folder for folder in task["path"] if folder]
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    state = Path("/proc/self/statm")                # address space in pages; other systems limit the whole process instead
    limit = MEMORY + (int(state.read_text().split()[0]) * resource.getpagesize() if state.exists() else 0)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    class Refused(Exception):
        """Raised by a template that refuses a conversation: some accept only certain roles, which is no defect."""

    def raise_exception(message: str) -> None:
        raise Refused(message)

    names: dict[str, Any] = {"messages": task["messages"], "add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>",
                             "raise_exception": raise_exception, "strftime_now": lambda format: "2024-01-01"}
    text = ""
    try:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        size = 0
        for part in environment.from_string(task["template"]).generate(**names):
            size += len(part)
            if size > OUTPUT:
                text = f"it prints more than {OUTPUT} characters"
                break
    except Refused:
        pass
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        text = f"{type(error).__name__}{f' in line {line}' if line else ''}: {str(error).splitlines()[0] if str(error) else ''}"
    except MemoryError:
        text = "it needs more than the memory allowed for a template"
    print(json.dumps({"problem": text}))


if __name__ == "__main__":
    _worker()
