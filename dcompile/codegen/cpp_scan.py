"""Scans as C++ loops: one running variable a scanned value, or one array of them a strip of lanes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dcompile.codegen.cpp_loops import at_least_one, for_text
from dcompile.codegen.cpp_types import literal, register_type
from dcompile.ir import expr as ex
from dcompile.ir.combine import left, right
from dcompile.ir.kernel import ScanLoop

if TYPE_CHECKING:
    from dcompile.codegen.cpp_kernel import Printer
    from dcompile.codegen.cpp_strip import StripPrinter


def scan_loop(printer: Printer, stmt: ScanLoop) -> None:
    """One scan after the other element."""
    out = printer.out
    running = [out.fresh("s") for _ in stmt.names]
    for name, (ctype, start) in zip(running, _starts(stmt), strict=True):
        out.line(f"{ctype} {name} = {start};")
    var, extent = stmt.axis
    with out.scope(certain=at_least_one(extent)) as inner:
        text = printer.enter(var, extent)
        _step(printer, stmt, running, text)
        printer.open_axes.pop()
    out.block(for_text(text, "0", printer.size(extent)), inner)


def lane_scan(strip: StripPrinter, stmt: ScanLoop) -> None:
    """The scans of all lanes of a strip, step by step together."""
    printer, out = strip.printer, strip.out
    running = [out.fresh("s") for _ in stmt.names]
    strip.start([(name, ctype, start) for name, (ctype, start) in zip(running, _starts(stmt), strict=True)])
    var, extent = stmt.axis
    with out.scope(certain=at_least_one(extent)) as inner:
        text = printer.enter(var, extent)
        strip.lane_loop(lambda: _step(printer, stmt, [f"{name}[{strip.lane}]" for name in running], text))
        printer.open_axes.pop()
    out.block(for_text(text, "0", printer.size(extent)), inner)


def _starts(stmt: ScanLoop) -> list[tuple[str, str]]:
    """C++ type and initial value of each running variable."""
    given = stmt.start or tuple(ex.const(0, e.dtype) for e in stmt.exprs)
    return [(register_type(e.dtype), literal(c.value, e.dtype)) for e, c in zip(stmt.exprs, given, strict=True)]


def _step(printer: Printer, stmt: ScanLoop, running: Sequence[str], position: str) -> None:
    """One element: lets, the new running values, writes."""
    out = printer.out
    for let in stmt.lets:
        printer.let(let)
    entering = [out.value(e) for e in stmt.exprs]
    for k, (e, variable, value) in enumerate(zip(stmt.exprs, running, entering, strict=True)):
        before = out.fresh("t")
        out.line(f"const {register_type(e.dtype)} {before} = {variable};")
        for side, text in ((left(k, e.dtype), before), (right(k, e.dtype), value)):
            assert isinstance(side, ex.Local)
            out.bind_local(side.name, text)
    combined = [out.value(rule) for rule in stmt.combine]
    for variable, text, value in zip(running, combined, entering, strict=True):
        out.line(f"{variable} = {text if stmt.start else f'{position} > 0 ? {text} : {value}'};")
    for name, variable in zip(stmt.names, running, strict=True):
        out.bind_local(name, variable)
    for write in stmt.writes:
        printer.write(write)
