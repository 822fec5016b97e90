"""Check many operators and print what fails, or write the table of all.

``python -m tests.opinfo.sweep [--dtype bfloat16] [--count 4] [--jobs 2] [pattern...]`` prints a line for each failure;
a pattern is a shell pattern of operator names. ``--table docs/operators.md`` also writes the table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from tests.opinfo.batch import Batch
from tests.opinfo.check import Prepared, Report, finish, prepare, summary
from tests.opinfo.operators import OPERATORS, eligible

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

TOGETHER = 12
"""Operators whose kernels share a translation unit."""

HEAD = """# Operators

Every operator of PyTorch's own database (`torch.testing._internal.common_methods_invocations.op_db`) that takes
float32, compiled for the CPU and compared with eager, forward and backward. Written by
`python -m tests.opinfo.sweep --table docs/operators.md`; do not edit.

Samples that agree, kernel launches and library calls (allocations aside) of all their graphs, and the library calls
that stand for a missing rule. A sample that AOTAutograd cannot trace counts as split: `torch.compile` runs it in
pieces.

"""
COLUMNS = "| operator | agree | fail | split | kernels | library | no rule |\n|---|--:|--:|--:|--:|--:|---|\n"


@dataclass(frozen=True)
class Row:
    """One operator in the table."""

    name: str
    ok: int
    failures: int
    split: int
    kernels: int
    library: int
    fallbacks: str

    @property
    def only_library(self) -> bool:
        """Whether no kernel was generated although the library was called."""
        return self.kernels == 0 and self.library > 0


def write_table(path: Path, reports: Iterable[Report]) -> None:
    """Write the rows of ``reports``; those of other operators stay as they are."""
    known = read_table(path) if path.exists() else {}
    known |= {report.name: _row(report) for report in reports}
    rows = [row for name, row in sorted(known.items()) if name in OPERATORS]
    alone = sum(row.only_library for row in rows)
    sums = f"{len(rows)} operators, {sum(row.failures > 0 for row in rows)} with a failing sample, "
    sums += f"{sum(row.split > 0 for row in rows)} with a split one, {alone} that only call the library.\n"
    seen = beside_inductor(rows)
    sums += (
        f"Of the {seen.measured} that Inductor was measured with too (`benchmarks/operator_kernels.py`, {seen.about}), "
    )
    sums += f"{seen.ours} only call the\nlibrary here and {seen.theirs} there.\n\n"
    lines = [
        f"| {r.name} | {r.ok} | {r.failures} | {r.split} | {r.kernels} | {r.library} | {r.fallbacks} |" for r in rows
    ]
    path.write_text(HEAD + sums + COLUMNS + "\n".join(lines) + "\n")


@dataclass(frozen=True)
class Comparison:
    """Operators that Inductor was measured with too, and how many of them only call the library, here and there."""

    measured: int
    ours: int
    theirs: int
    about: str


def beside_inductor(rows: Iterable[Row]) -> Comparison:
    """The table beside the newest result of ``benchmarks/operator_kernels.py``. Split samples are left out."""
    newest = max(RESULTS.glob("*-operator_kernels.json"))
    found = json.loads(newest.read_text())
    theirs = {name: row for name, row in found["operators"].items() if "error" not in row}
    both = [row for row in rows if row.name in theirs and not row.split]
    alone = sum(theirs[row.name]["kernels"] == 0 and bool(theirs[row.name]["library"]) for row in both)
    about = f"torch {found['torch']}, {found['date']}"
    return Comparison(len(both), sum(row.only_library for row in both), alone, about)


def _row(r: Report) -> Row:
    fallbacks = ", ".join(sorted(op.removeprefix("aten.").removesuffix(".default") for op in r.fallbacks))
    return Row(r.name, r.ok, len(r.failures), len(r.untraceable), r.kernels, sum(r.library.values()), fallbacks)


def read_table(path: Path) -> dict[str, Row]:
    """The rows that ``write_table`` wrote, by operator."""
    rows = {}
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 7 and cells[1].isdigit():
            rows[cells[0]] = Row(cells[0], *map(int, cells[1:6]), cells[6])
    return rows


def check_together(
    names: Sequence[str], dtype: torch.dtype, count: int, variant: str = "", beyond: int = 0
) -> list[Report]:
    """Check some operators, their kernels in one translation unit: the C++ compiler starts once."""
    with tempfile.TemporaryDirectory() as folder:
        batch = Batch(Path(folder))
        prepared: list[Prepared] = []
        for name in names:
            print(f"TRACE {name}", flush=True)
            try:
                prepared.append(prepare(name, dtype, count, batch, variant, beyond))
            except Exception as error:
                prepared.append(Prepared(Report(name, failures=[f"{name}: {summary(error)}"]), False))
        batch.build()
        return [_finished(one) for one in prepared]


def _finished(prepared: Prepared) -> Report:
    print(f"RUN {prepared.report.name}", flush=True)
    try:
        finish(prepared)
    except Exception as error:
        prepared.report.failures.append(f"{prepared.report.name}: {summary(error)}")
    _print(prepared.report)
    return prepared.report


def _print(report: Report) -> None:
    lines = [f"FAIL {line}" for line in report.failures]
    lines += [f"UNTRACEABLE {sample}: {line}" for sample, line in report.untraceable.items()]
    calls = f"K={report.kernels} X={sum(report.library.values())} {'LIBRARY' if report.only_library else ''}"
    lines.append(f"DONE {report.name} ok={report.ok} {calls} {dict(report.fallbacks) or ''}")
    print("\n".join(lines), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*", default=["*"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--beyond", type=int, default=0, help="leave out the samples that this count has")
    parser.add_argument("--variant", choices=("", "in_place", "dynamic"), default="")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--table", type=Path)
    given = parser.parse_args(arguments)
    dtype = getattr(torch, given.dtype)
    names = [n for n in eligible(dtype) if any(fnmatch(n, p) for p in given.patterns)]
    if given.variant == "in_place":
        names = [n for n in names if OPERATORS[n].get_inplace() is not None]
    check = partial(check_together, dtype=dtype, count=given.count, variant=given.variant, beyond=given.beyond)
    groups = [names[n : n + TOGETHER] for n in range(0, len(names), TOGETHER)]
    if given.jobs == 1:
        found = list(map(check, groups))
    else:
        with get_context("spawn").Pool(given.jobs, maxtasksperchild=10) as pool:
            found = list(pool.imap_unordered(check, groups))
    reports = [report for group in found for report in group]
    failing = [r.name for r in reports if r.failures]
    print(f"{len(reports)} operators, {len(failing)} failing: {' '.join(failing)}")
    if given.table is not None:
        write_table(given.table, reports)


if __name__ == "__main__":
    main()
