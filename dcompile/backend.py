"""The entry points: the Dynamo backend, ``dcompile.compile``, and the counters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import fx

from dcompile.analyse.calibration import Calibration
from dcompile.capture import Captured, capture, graph_breaks, keep_whole, reset_graph_breaks, storage_users
from dcompile.counters import TALLY, Counters
from dcompile.ddp import average_in_graph
from dcompile.options import Options
from dcompile.pipeline import Built, compile_graph, memory_for
from dcompile.runtime.calibrate import calibrate as measure_prices
from dcompile.runtime.compiled import Graphing
from dcompile.sharded import fully_sharded, is_fully_sharded

F = TypeVar("F", bound=Callable[..., Any])

Observer = Callable[[Built], None]
"""Told of every graph as soon as it is compiled."""


_observers: list[Observer] = []


@contextmanager
def observing(observe: Observer) -> Iterator[None]:
    """Tell ``observe`` of every graph compiled in the block, by whom ever. Nothing comes from the disk cache meanwhile,
    so that there is a plan to be seen."""
    _observers.append(observe)
    try:
        yield
    finally:
        _observers.remove(observe)


def dcompile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None, **unknown: Any
) -> Callable[..., Any]:
    """The backend behind ``torch.compile(model, backend="dcompile", options={...})``.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs, fake tensors and symbolic integers.
        options: fields of ``dcompile.Options``; the environment gives those not named.

    Raises:
        DCompileError: an unknown option; ``Unsupported`` for a program this compiler cannot take, with the user's line.
    """
    if unknown:
        raise TypeError(f"the dcompile backend takes options, not {', '.join(sorted(unknown))}")
    return backend(Options.from_env(options))(gm, example_inputs)


def backend(options: Options, observe: Observer | None = None) -> Callable[..., Callable[..., Any]]:
    """A Dynamo backend with fixed options."""

    def run(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def compile_captured(captured: Captured) -> Callable[[list[Any]], Sequence[Any]]:
            graphing = Graphing(captured.returned, storage_users) if options.cuda_graphs else None
            chosen = replace(options, cache_dir=None) if _observers else options
            built = compile_graph(captured.gm, captured.name, chosen, graphing)
            if memory is not None:
                memory.compiled(built)
            for tell in (*_observers, *([observe] if observe is not None else [])):
                tell(built)
            return built.run

        with TALLY.timed("capture"):
            begin = average_in_graph(gm)
            memory = None if _observers or observe is not None else memory_for(options, storage_users)
            program = capture(gm, example_inputs, compile_captured, memory)
        return program if begin is None else _after(begin, program)

    run.is_dcompile = True  # type: ignore[attr-defined]
    return run


def _after(begin: Callable[[], None], program: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        begin()
        return program(*args)

    return call


def _is_ours(given: Any) -> bool:
    """Whether a backend is this one, by itself or as ``torch.compile`` wraps it."""
    inner = getattr(given, "compiler_fn", given)
    return inner is dcompile or bool(getattr(inner, "is_dcompile", False))


keep_whole(_is_ours)


def compile(function: F, *, dynamic: bool | None = None, fullgraph: bool = False, **options: Any) -> F:
    """``torch.compile`` with this backend.

    Args:
        function: a module or a function. A module that ``torch.distributed.fsdp.fully_shard`` was applied to goes
            through ``fully_sharded`` first, so that its communication is part of the program; no more of it is in
            flight at once than in eager.
        dynamic, fullgraph: as in ``torch.compile``.
        options: fields of ``dcompile.Options``.
    """
    chosen = Options.from_env(options)
    if isinstance(function, torch.nn.Module) and is_fully_sharded(function):
        sharded = fully_sharded(function, peak_memory_bytes=chosen.peak_memory_bytes)
        chosen = replace(chosen, in_flight_bytes=min(chosen.in_flight_bytes, sharded.ahead_bytes))
        function = sharded  # type: ignore[assignment]
    return torch.compile(function, dynamic=dynamic, fullgraph=fullgraph, backend=backend(chosen))  # type: ignore[return-value]


def calibrate(process_group: Any = None) -> Calibration:
    """Measure collectives and compute on this machine, or load what was measured: programs compiled afterwards are
    scheduled by these prices instead of documented ones. Takes some seconds; every rank of the group must call it.

    Args:
        process_group: the ranks to measure; None for all.

    Raises:
        DCompileError: there is no process group, or it has one rank.
        DeadlineExceeded: naming the ranks that did not come within ``Options.deadline_s``.
    """
    options = Options.from_env({})
    return measure_prices(process_group, options.cache_dir, options.deadline_s)


def counters() -> Counters:
    """What compiling has done in this process since it started or ``reset_counters`` was called."""
    return replace(TALLY.snapshot(), graph_breaks=graph_breaks())


def reset_counters() -> None:
    """Start all counters from zero."""
    TALLY.reset()
    reset_graph_breaks()
