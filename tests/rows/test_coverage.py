"""Every row has a test, every file it names exists, and the table in docs/ says so."""

from __future__ import annotations

import ast

import pytest

from tests.rows.table import DOCUMENT, ROOT, SECTIONS, covering, document, marked, rows, uncovered

AGAIN = "run: python -m tests.rows.table"


def test_every_row_has_a_test_or_is_listed_as_uncovered() -> None:
    without = [name for name in rows() if name not in covering()]
    missing = [name for name in without if name not in uncovered()]
    assert not missing, f"no test is marked with {', '.join(missing)}: add one, or list the row in uncovered.txt"


def test_the_list_of_uncovered_rows_shrinks() -> None:
    covered = [name for name in uncovered() if name in covering()]
    assert not covered, f"{', '.join(covered)} have tests now and leave uncovered.txt; {AGAIN}"
    assert len(set(uncovered())) == len(uncovered())
    assert set(uncovered()) <= set(rows())


def test_markers_name_rows_that_exist() -> None:
    strangers = {name: tests for name, tests in covering().items() if name not in rows()}
    assert not strangers


def test_rows_name_files_that_exist() -> None:
    wrong = [(r.name, path) for r in rows().values() for path in r.lives if not (ROOT / "dcompile" / path).is_file()]
    assert not wrong
    assert {name[0] for name in rows()} == set(SECTIONS)


def test_the_document_is_current() -> None:
    assert DOCUMENT.read_text() == document(), f"docs/capabilities.md is not what rows and tests say; {AGAIN}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("@pytest.mark.row('A1', 'A2')\ndef test_a(): ...", [("test_a", ["A1", "A2"])]),
        ("pytestmark = [pytest.mark.row('A1')]\ndef test_a(): ...", [("test_a", ["A1"])]),
        ("@mark.row('A1')\nclass TestA:\n  @mark.row('A2')\n  def test_a(self): ...", [("test_a", ["A1", "A2"])]),
        (
            "@mark.parametrize('x', [pytest.param(1, marks=pytest.mark.row('A3'))])\ndef test_a(x): ...",
            [("test_a", ["A3"])],
        ),
        ("@pytest.mark.gpu\n@pytest.mark.row('A1')\ndef test_a(): ...", []),
        ("@pytest.mark.row('A1')\ndef helper(): ...\ndef test_a(): ...", []),
    ],
)
def test_markers_are_found(text: str, expected: list[tuple[str, list[str]]]) -> None:
    assert list(marked(ast.parse(text))) == expected
