"""From a captured graph to a program that runs: found in the cache, received from another rank, or made here."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import fx

from dcompile.analyse.context import Context
from dcompile.capture import tensor_users
from dcompile.codegen.calls import calls_json
from dcompile.codegen.cpp import CppModule, print_cpp
from dcompile.codegen.triton import print_triton
from dcompile.codegen.wrapper import CallSite, print_host
from dcompile.collectives.fingerprint import communication_lines
from dcompile.counters import TALLY
from dcompile.ir.graph import Graph
from dcompile.lower import Extra, Lowered, OnDevice, SizeOf, lower
from dcompile.options import Options, process_rank
from dcompile.pipeline.devices import devices, why_no_kernels
from dcompile.pipeline.facts import count, facts_of
from dcompile.pipeline.key import Traffic, costs_of, key_of, traffic_of
from dcompile.pipeline.passes import run_passes
from dcompile.pipeline.prices import Prices, rounds_to_tf32
from dcompile.plan import Plan
from dcompile.runtime.autotune import DeviceTimer, Tuner
from dcompile.runtime.board import announce_compile
from dcompile.runtime.cache import Cache, cache_key
from dcompile.runtime.comm import group_size
from dcompile.runtime.compiled import (
    VANISHED,
    CompiledGraph,
    Facts,
    Graphing,
    Loaded,
    build_and_share,
    fetch_and_load,
    load_entry,
    receive_or,
    settle,
    write_entry,
    write_gpu_kernels,
)
from dcompile.runtime.once import meeting_place
from dcompile.runtime.progress import report_progress
from dcompile.runtime.triton_kernels import hardware
from dcompile.watch import Watch


@dataclass(frozen=True)
class Built:
    """What one compile produced.

    Attributes:
        run: the program; takes its inputs in one list and clears it.
        plan, kernels, host: the verified plan and both generated programs, unless it came from the cache.
        seconds: compile time by stage, without the C++ compiler, which runs in the background.
        op_by_op: why there are no kernels and every op is a library call; "" where there are.
        inner: the programs it calls.
        reference: what names it for other processes, or why nothing does.
        loaded: its cache entry, once it is built; None where there is none.
    """

    name: str
    run: Callable[[list[Any]], Sequence[Any]]
    plan: Plan | None = None
    kernels: CppModule | None = None
    host: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    op_by_op: str = ""
    inner: tuple[Built, ...] = ()
    reference: Reference | str = "a program without an entry in the cache"
    loaded: Future[Loaded] | None = None

    def calls_json(self) -> str:
        """Its library calls for another executor; see ``codegen.calls``."""
        return calls_json(self.plan.graph) if self.plan is not None else "[]"


Users = Callable[[torch.Tensor], int]
"""``Graphing.users``."""


@dataclass(frozen=True)
class Reference:
    """A program that some process has built, without its graph.

    Attributes:
        key: of its cache entry.
        traffic, prices: the groups it communicates in, and a digest of the prices it was scheduled by.
        extra_inputs: what it takes besides its own inputs.
        returned: ``Graphing.returned``.
    """

    key: str
    traffic: Traffic
    prices: str
    extra_inputs: tuple[Extra, ...]
    returned: int


@dataclass(frozen=True)
class Kernels:
    """Launches of the kernels of all devices, by position."""

    calls: Mapping[int, CallSite]


def compile_graph(gm: fx.GraphModule, name: str, options: Options, graphing: Graphing | None = None) -> Built:
    """One captured graph, through the whole house. ``name`` may end in a number, which artifacts do not depend on.

    Args:
        graphing: replay the program as CUDA graphs if it can be one.

    The C++ compiler runs in the background; the first call waits for it. A graph this compiler cannot print kernels for
    runs op by op through the library, with a warning and an entry in ``counters().fallbacks``.

    Raises:
        Unsupported: the program asks for something neither a kernel nor a library call can do.
        CompilerBug: a stage broke its contract.
    """
    watch = Watch(options, name)
    TALLY.add(graphs=1)
    if options.dump_dir is not None:
        watch.text("capture", gm.print_readable(print_output=False), "py")
    if options.progress_dir is not None:
        report_progress(options.progress_dir, process_rank(), lambda: TALLY.snapshot().stage)
    with watch.stage("lower"):
        lowered = lower(gm, name.rstrip("0123456789"), options.eager_ops, group_size, options.tracebacks)
    if reason := next((why for g in programs_of(lowered.graph) if (why := why_no_kernels(g, options))), None):
        return _op_by_op(gm, name, reason, lowered, options)
    return _build(lowered, name, options, watch, graphing)


def programs_of(graph: Graph) -> Iterator[Graph]:
    """``graph`` and all programs it calls, directly or through others."""
    yield graph
    for inner in graph.graphs:
        yield from programs_of(inner)


def _build(lowered: Lowered, name: str, options: Options, watch: Watch, graphing: Graphing | None) -> Built:
    inner = {
        # the calls pass what these take besides
        key: _build(replace(sub, extra_inputs=()), f"{name}_{key}", options, Watch(options, f"{name}_{key}"), None)
        for key, sub in lowered.programs.items()
    }
    programs = {**lowered.modules, **{key: built.run for key, built in inner.items()}}
    watched = bool(options.show or options.dump_dir)
    cache = cache_of(replace(options, cache_dir=None) if watched else options)
    key = key_of(lowered, options)
    complete = partial(_complete, lowered.extra_inputs)

    def built(loaded: Future[Loaded]) -> Built:
        run = CompiledGraph(name, loaded, lowered.group_names, complete, options, graphing, programs, tensor_users)
        named = _reference(key, lowered, options, graphing)
        return Built(name, run, inner=tuple(inner.values()), reference=named, loaded=loaded)

    if (found := _cached(cache, key)) is not None:
        count(found.facts, graphing, hits=1)
        ready: Future[Loaded] = Future()
        ready.set_result(found)
        return built(ready)
    place = meeting_place(cache) if options.compile_once else None
    sharing = place.join(key) if place is not None else None
    if place is not None and sharing is None:
        here = partial(_compile_here, lowered, name, options, watch, cache, key, graphing)
        arrived = partial(count, graphing=graphing, hits=1)
        coming = receive_or(place, key, cache, options.deadline_s, arrived, here)
        return built(coming)
    try:
        announce_compile(name)  # until its first call has loaded it
        made = _print(lowered, name, options, watch)
    except BaseException:
        announce_compile(None)
        if sharing is not None:
            sharing.finish(None)
        raise
    count(made.facts, graphing, misses=1)
    building = _builders().submit(build_and_share, cache, key, made.write, sharing)
    seen: dict[str, Any] = {"plan": made.plan, "kernels": made.module, "host": made.host}
    return replace(built(building), **seen, seconds=dict(watch.seconds))


MAX_CONSTANT_BYTES = 2**20
"""Constants of a program that another process may get with its reference."""


def _reference(key: str, lowered: Lowered, options: Options, graphing: Graphing | None) -> Reference | str:
    """What names a program, or why nothing does."""
    if lowered.programs or lowered.modules:
        return "programs inside the program"
    if any(isinstance(extra, OnDevice) for extra in lowered.extra_inputs):
        return "constants that are moved to another device"
    constants = [extra for extra in lowered.extra_inputs if isinstance(extra, torch.Tensor)]
    if any(type(c) is not torch.Tensor or c.device.type != "cpu" for c in constants):
        return "constants that are no plain tensors on the CPU"
    if sum(constant.nbytes for constant in constants) > MAX_CONSTANT_BYTES:
        return "large constants"
    traffic = traffic_of(lowered)
    if not all(isinstance(group, str) for group in traffic.groups.values()):
        return "process groups without a name"
    prices = cache_key(repr(costs_of(traffic, options)))
    return Reference(key, traffic, prices, lowered.extra_inputs, graphing.returned if graphing is not None else 0)


def recall_program(reference: Reference, name: str, options: Options, users: Users | None) -> Built | None:
    """The program of a reference; None if it is not in the cache, or would be scheduled otherwise today."""
    if cache_key(repr(costs_of(reference.traffic, options))) != reference.prices:
        return None
    found = _cached_or_published(cache_of(options), reference.key, options)
    if found is None:
        return None
    graphing = Graphing(reference.returned, users) if users is not None and options.cuda_graphs else None
    TALLY.add(graphs=1)
    count(found.facts, graphing, hits=1)
    ready: Future[Loaded] = Future()
    ready.set_result(found)
    complete = partial(_complete, reference.extra_inputs)
    run = CompiledGraph(name, ready, reference.traffic.groups, complete, options, graphing, {}, tensor_users)
    return Built(name, run, reference=reference, loaded=ready)


@dataclass(frozen=True)
class _Printed:
    """A program as text; ``write`` fills its cache entry, with the compilers of the kernels."""

    plan: Plan
    module: CppModule
    host: str
    facts: Facts
    write: Callable[[Path], None]


def _print(lowered: Lowered, name: str, options: Options, watch: Watch) -> _Printed:
    plan = run_passes(lowered.graph, _context(lowered, options), watch)
    with watch.stage("codegen"):
        module, gpu = print_cpp(plan.graph), print_triton(plan.graph, variants=options.autotune)
        host = print_host(plan, Kernels({**module.calls, **gpu.calls}), name, options.timeline, options.assert_layouts)
    watch.code(gpu.source or module.source, host)
    facts = facts_of(plan, module, gpu)
    tuner = _tuner(options) if options.autotune and gpu.signatures else None

    def write(folder: Path) -> None:
        with TALLY.timed("c++ compiler"):
            write_entry(folder, host, module.source, facts, options.cxx)
        with TALLY.timed("triton compiler"):
            write_gpu_kernels(folder, gpu.source, gpu.signatures, tuner)

    return _Printed(plan, module, host, facts, write)


def _context(lowered: Lowered, options: Options) -> Context:
    context = Context(options, costs_of(traffic_of(lowered), options), tf32=rounds_to_tf32())
    if options.autotune and "cuda" in devices(lowered.graph):
        prices = Prices(_cache(options.cache_dir, options.deadline_s), _tuner(options), torch.cuda.current_device())
        context.measure = prices
    return context


def _tuner(options: Options) -> Tuner:
    """Measures on the current device. Where no results can be kept each process measures for itself."""
    device = torch.cuda.current_device()
    return Tuner(_cache(options.cache_dir, options.deadline_s), hardware(device), DeviceTimer(device))


def _compile_here(
    lowered: Lowered, name: str, options: Options, watch: Watch, cache: Cache, key: str, graphing: Graphing | None
) -> Loaded:
    """What a rank does that waited for another rank in vain."""
    made = _print(lowered, name, options, watch)
    count(made.facts, graphing, misses=1)
    return fetch_and_load(cache, key, made.write)


MAX_BUILDS = 4
"""C++ compilers that run at once in one process; a training step has two graphs."""


@lru_cache(maxsize=1)
def _builders() -> ThreadPoolExecutor:
    """Threads that wait for C++ compilers and for other processes' builds. A forked child starts its own."""
    return ThreadPoolExecutor(max_workers=MAX_BUILDS, thread_name_prefix="dcompile-build")


os.register_at_fork(after_in_child=_builders.cache_clear)


def cache_of(options: Options) -> Cache:
    """The cache that options name."""
    return _cache(options.cache_dir, options.deadline_s)


def _cached_or_published(cache: Cache, key: str, options: Options) -> Loaded | None:
    """``_cached``, or what another rank has sent; this rank sends what it has to ranks that may want it."""
    found = _cached(cache, key)
    place = meeting_place(cache) if options.compile_once else None
    if place is None:
        return found
    if found is not None:
        place.offer(key, found.folder)
        return found
    return _cached(cache, key) if place.published(key, cache, options.deadline_s) is not None else None


@lru_cache(maxsize=8)
def _cache(folder: Path | None, deadline_s: float) -> Cache:
    return Cache(folder, deadline_s)


def _cached(cache: Cache, key: str) -> Loaded | None:
    """The entry ``key``; None if there is none, or if it is removed at this very moment."""
    entry = cache.find(key)
    try:
        return load_entry(entry) if entry is not None else None
    except VANISHED:
        return None


def _complete(extra_inputs: tuple[Extra, ...], inputs: list[Any]) -> None:
    for extra in extra_inputs:
        if isinstance(extra, SizeOf):
            inputs.append(inputs[extra.input].shape[extra.dim])
        else:
            inputs.append(extra.get() if isinstance(extra, OnDevice) else extra)


def _op_by_op(gm: fx.GraphModule, name: str, reason: str, lowered: Lowered, options: Options) -> Built:
    """The captured graph itself, every op a library call, by name and with a warning.

    The ranks agree on it like on any program: one that must run op by op does not meet others that bucket.
    """
    warnings.warn(f"dcompile: {name} runs op by op through the library: {reason}", RuntimeWarning, stacklevel=2)
    TALLY.add_fallbacks(Counter({f"{name} op by op": 1}))
    lines = (f"every op by itself  # {reason}", *communication_lines(lowered.graph))
    agree_once = lru_cache(maxsize=1)(partial(settle, name, lowered.group_names, lines, options))

    def run(inputs: list[Any]) -> Sequence[Any]:
        agree_once()
        arguments = tuple(inputs)
        inputs.clear()
        with torch.no_grad():
            return tuple(gm(*arguments))

    return Built(name, run, op_by_op=reason)
