"""The house has floors: an import goes down only. Imports for type checkers alone do not count."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "pyggml"
# from the ground up; a module may import its own floor and those below
FLOORS = [
    {"errors", "native", "types", "shapes"},
    {"formats", "quants", "page"},
    {"backends"},
    {"ops"},
    {"graph", "fuse", "lower", "roofline", "plan", "backward"},
    {"arch"},
    {"model", "sites", "crew", "context", "offload", "cache", "sampling", "completion", "answers", "arguments", "grammar", "chat", "tokenizers",
     "toolcalls", "llama", "speculate"},
    {"quantize", "train", "convert", "serve", "measure"},
    {"cli", "__init__", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
# a backend is loaded by name and sees what it computes: the graph it is given and the ops in it
ALLOWED = {("backends", "ops"), ("backends", "graph"), ("backends", "plan")}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Rooms of pyggml that a file imports at run time."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.startswith("pyggml."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyggml"):
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "pyggml" else [node.module]
            found.update(names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {name.split(".")[1] for name in found if name.count(".")}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in LEVEL, f"{room} has no floor in the house: give it one in FLOORS"
    for other in imports(path) & set(LEVEL):
        assert LEVEL[other] <= LEVEL[room] or (room, other) in ALLOWED, f"{room} imports {other}, which is on a floor above"
