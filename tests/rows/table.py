"""The table of capabilities: rows as data, the tests that name them, and docs/capabilities.md made from both.

``python -m tests.rows.table`` writes the document and takes rows that have a test from ``uncovered.txt``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DOCUMENT = ROOT / "docs" / "capabilities.md"
UNCOVERED = HERE / "uncovered.txt"
NAMED_TESTS = 3
"""Tests a row of the document names; it counts the others."""

HEADING = """# Capabilities

What the compiler must be able to do, row by row: where it lives and which tests hold it. Written by
`python -m tests.rows.table` from `tests/rows/rows.txt` and the markers of the tests; `python -m pytest --row F6` runs
the tests of one row.
"""

SECTIONS = {
    "A": "Tensors and ground rules",
    "B": "Loops",
    "C": "Reductions",
    "D": "Mean and variance",
    "E": "Scans",
    "F": "Views",
    "G": "Layouts",
    "H": "Mutation and aliasing",
    "I": "Memory of values",
    "J": "Loop bodies and index arithmetic",
    "K": "Library calls",
    "L": "Ops without a rule",
    "M": "Library calls that write",
    "N": "Seeds, copies, concatenation, scratch memory, user kernels",
    "O": "Fused library kernels of the CPU",
    "P": "Sizes that change",
    "Q": "Conditionals",
    "R": "Origins and diagnostics",
    "S": "Collectives by process group",
    "T": "Collectives by group name",
    "U": "Reuse of memory, dead code",
}


@dataclass(frozen=True)
class Row:
    """A capability: its name, what it is, and the files of ``dcompile/`` it lives in."""

    name: str
    does: str
    lives: tuple[str, ...]


@lru_cache(maxsize=1)
def rows() -> dict[str, Row]:
    """The rows of ``rows.txt``, by name, in its order."""
    found: dict[str, Row] = {}
    for line in (HERE / "rows.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, does, lives = (part.strip() for part in line.split(" | "))
            assert name not in found, f"row {name} is listed twice"
            found[name] = Row(name, does, tuple(lives.split(", ")))
    return found


def uncovered() -> list[str]:
    """Rows listed as having no test yet, in the order of the file; ``#`` begins a reason."""
    lines = (line.split("#")[0].strip() for line in UNCOVERED.read_text().splitlines())
    return [line for line in lines if line]


@lru_cache(maxsize=1)
def covering() -> dict[str, list[str]]:
    """``"rows/test_views.py::test_x"`` for each test that names a row, by row. Tests that need a GPU do not count: they
    are skipped where there is none."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        relative = path.relative_to(ROOT / "tests")
        if relative.parts[0] == "gpu":
            continue
        for test, names in marked(ast.parse(path.read_text())):
            for name in names:
                found.setdefault(name, []).append(f"{relative.as_posix()}::{test}")
    return found


def marked(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """Each test function of a module with the rows that name it: by itself, its class, its module, or a parameter."""
    for_all = [name for node in tree.body if isinstance(node, ast.Assign) for name in _rows_in(node)]
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            shared = [*for_all, *(name for d in node.decorator_list for name in _rows_in(d))]
            for inner in node.body:
                yield from _of_function(inner, shared)
        else:
            yield from _of_function(node, for_all)


def _of_function(node: ast.stmt, shared: list[str]) -> Iterator[tuple[str, list[str]]]:
    if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
        return
    names = [*shared, *(name for d in node.decorator_list for name in _rows_in(d))]
    if names and not any("mark.gpu" in ast.unparse(d) for d in node.decorator_list):
        yield node.name, list(dict.fromkeys(names))


def _rows_in(node: ast.AST) -> list[str]:
    """Names in every ``pytest.mark.row(...)`` inside ``node``."""
    return [
        argument.value
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("mark.row")
        for argument in call.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    ]


def document() -> str:
    """The text of docs/capabilities.md."""
    parts, tests = [HEADING], covering()
    for letter, title in SECTIONS.items():
        parts.append(
            f"\n## {letter}. {title}\n\n"
            "| row | capability | lives in `dcompile/` | tests |\n"
            "| --- | --- | --- | --- |\n"
        )
        for row in (row for row in rows().values() if row.name[0] == letter):
            lives = ", ".join(f"`{path}`" for path in row.lives)
            parts.append(f"| {row.name} | {row.does} | {lives} | {_named(tests.get(row.name, []))} |\n")
    return "".join(parts)


def _named(tests: list[str]) -> str:
    if not tests:
        return "none yet"
    shown = ", ".join(f"`{test}`" for test in tests[:NAMED_TESTS])
    return shown + (f" and {len(tests) - NAMED_TESTS} more" if len(tests) > NAMED_TESTS else "")


def main() -> None:
    covered = covering()
    lines = UNCOVERED.read_text().splitlines()
    kept = [line for line in lines if line.split("#")[0].strip() not in covered]
    UNCOVERED.write_text("".join(f"{line}\n" for line in kept))
    DOCUMENT.write_text(document())


if __name__ == "__main__":
    main()
