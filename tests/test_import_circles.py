"""No two modules of the engine need each other, not even by an import inside a function."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ENGINE = Path(__file__).resolve().parents[1] / "llmdoctor"


def modules() -> dict[str, Path]:
    """Every module of the engine by its dotted name; a package goes by its own."""
    found = {}
    for path in ENGINE.rglob("*.py"):
        parts = path.relative_to(ENGINE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, except what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from statements(child)


def imported(source: str, known: set[str]) -> set[str]:
    """Which of the ``known`` modules a source imports; a package counts only where no module of it is meant."""
    names: set[str] = set()
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner & known or {str(node.module)}
    return names & known


def test_imports_are_read_wherever_they_stand():
    known = {"a", "a.b", "a.c", "a.d"}
    source = (
        "import a.b\nfrom a import c\ndef f():\n    from a.d import g\n"
        "if TYPE_CHECKING:\n    import a\nif typing.TYPE_CHECKING:\n    import a\n"
    )
    assert imported(source, known) == {"a.b", "a.c", "a.d"}


def test_no_module_of_the_engine_needs_itself_through_others():
    paths = modules()
    graph = {name: imported(path.read_text(encoding="utf-8"), set(paths)) for name, path in paths.items()}
    assert len(graph) > 20
    assert "llmdoctor.records" in graph["llmdoctor.token_rewards.formula"]
    TopologicalSorter(graph).prepare()  # a CycleError names the circle
