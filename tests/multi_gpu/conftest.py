"""The table of the matrix at the end of a run."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    rows = []
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            properties = dict(getattr(report, "user_properties", ()))
            if "cell" in properties and getattr(report, "when", "") == "call":
                rows.append((properties["cell"], outcome, f"{report.duration:.1f} s", properties.get("found", "")))
    if rows:
        terminalreporter.section("matrix: ranks-backend-way-type-shapes-order-cache")
        width = max(len(cell) for cell, *_ in rows)
        for cell, outcome, seconds, found in sorted(rows):
            terminalreporter.write_line(f"{cell:<{width}}  {outcome:<6}  {seconds:>8}  {found}")
