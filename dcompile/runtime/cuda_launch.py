"""Launch functions: one Python function for each kernel, made for its parameters, with little host time per launch.

A function packs its parameters in one call and hands the driver values that were converted once, which takes half the
host time of a general launcher (1.5 us instead of 3 us without the driver's own part, CPython 3.11).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dcompile.runtime.cuda_driver import check, library

TRAILING_NULLS = 4
"""Null parameters after a kernel's own. Triton appends up to this many pointers to scratch memory that our kernels do
not use; a launch reads as many parameters as the kernel has, so that more do no harm."""


@dataclass(frozen=True)
class LaunchPlan:
    """How a loaded kernel is launched.

    Attributes:
        function: the driver's handle.
        buffers, sizes: number of address parameters, and of i64 parameters behind them.
        programs: Python text of the number of programs over ``s0``, ``s1``, ...
        threads, shared_bytes: of a program.
        fault: address of the fault word, the last parameter.
    """

    function: ctypes.c_void_p
    buffers: int
    sizes: int
    programs: str
    threads: int
    shared_bytes: int
    fault: int


def launch_function(
    plan: LaunchPlan, alignment: int, unaligned: Callable[..., int] | None, launch: Callable[..., int] | None = None
) -> Callable[..., int]:
    """``f(b0, ..., s0, ..., stream)``, which launches and returns 0. Safe to call from several threads.

    Args:
        alignment: the kernel counts on addresses that are multiples of it.
        unaligned: called in its place with the same arguments when an address is not; None if any address will do.
        launch: the driver's ``cuLaunchKernel``, or what stands in for it in a test.

    ``stream`` is a ``ctypes.c_void_p``. Each call takes a parameter block nobody else uses: another thread may run
    while the driver reads it.
    """
    buffers = [f"b{n}" for n in range(plan.buffers)]
    sizes = [f"s{n}" for n in range(plan.sizes)]
    values = [*buffers, *sizes]
    count = len(values) + 1
    free: list[tuple[Any, Any]] = []

    def fresh() -> tuple[Any, Any]:
        words = (ctypes.c_uint64 * (count + TRAILING_NULLS))()
        words[count - 1] = plan.fault
        base = ctypes.addressof(words)
        return words, (ctypes.c_void_p * (count + TRAILING_NULLS))(
            *(base + 8 * n for n in range(count + TRAILING_NULLS))
        )

    lines = [f"def function({', '.join([*values, 'stream'])}):"]
    if unaligned is not None and buffers:
        lines += [f"    if ({' | '.join(buffers)}) & {alignment - 1}:"]
        lines += [f"        return unaligned({', '.join([*values, 'stream'])})"]
    grid = "programs"
    if plan.sizes:
        lines += [f"    programs = {plan.programs}", "    if programs <= 0:", "        return 0"]
        grid = "unsigned(programs)"
    lines += ["    try:", "        block = pop()", "    except IndexError:", "        block = fresh()"]
    lines += [f"    pack(block[0], 0, {', '.join(values)})"] if values else []
    lines += [
        f"    status = launch(handle, {grid}, one, one, threads, one, one, shared, stream, block[1], none)",
        "    push(block)",
        "    if status:",
        "        check(status, 'a kernel launch')",
        "    return 0",
    ]
    unsigned = ctypes.c_uint
    namespace: dict[str, Any] = {
        "unaligned": unaligned, "unsigned": unsigned, "max": max, "min": min, "check": check, "fresh": fresh,
        "pop": free.pop, "push": free.append,  # list.pop and append are atomic
        "pack": struct.Struct("Q" * plan.buffers + "q" * plan.sizes).pack_into,
        "launch": launch or _driver_launch(), "handle": plan.function, "one": unsigned(1), "none": ctypes.c_void_p(),
        "threads": unsigned(plan.threads), "shared": unsigned(plan.shared_bytes),
    }  # fmt: skip
    if not plan.sizes:
        programs = int(eval(plan.programs, {"max": max, "min": min}))
        if programs <= 0:
            return lambda *_: 0
        namespace["programs"] = unsigned(programs)
    exec("\n".join(lines), namespace)
    return namespace["function"]  # type: ignore[no-any-return]


def _driver_launch() -> Callable[..., int]:
    """``cuLaunchKernel``. No argument types are declared: every argument comes converted."""
    return library().cuLaunchKernel  # type: ignore[no-any-return]
