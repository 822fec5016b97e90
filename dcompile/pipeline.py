"""The compiler as a table. This module is the only one that imports every stage."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import fx

from dcompile.analyse.alias import storage_roots
from dcompile.analyse.calibration import calibrated
from dcompile.analyse.context import Context
from dcompile.analyse.cost import CostModel
from dcompile.analyse.topology import read_topology
from dcompile.analyse.verify import verify
from dcompile.codegen.calls import calls_json
from dcompile.codegen.cpp import CppModule, print_cpp
from dcompile.codegen.triton import TritonModule, print_triton
from dcompile.codegen.wrapper import CallSite, print_host
from dcompile.collectives.fingerprint import communication_lines
from dcompile.collectives.nodes import Start, Wait
from dcompile.collectives.text import print_graph
from dcompile.counters import TALLY
from dcompile.errors import CompilerBug, DCompileError, ToolchainError
from dcompile.ir.graph import Graph
from dcompile.ir.kernel import Kernel
from dcompile.ir.nodes import Extern, Loop, Node, Pack, Pointwise, Reduction, Scan, Store, View, calls_programs
from dcompile.ir.symbolic import is_library_call, reads_numbers
from dcompile.ir.types import Value
from dcompile.lower import Extra, Lowered, OnDevice, SizeOf, lower
from dcompile.options import Options, process_rank
from dcompile.plan import Plan
from dcompile.runtime.board import announce_compile
from dcompile.runtime.cache import Cache, cache_key
from dcompile.runtime.calibrate import calibration_of
from dcompile.runtime.comm import group_ranks, group_size
from dcompile.runtime.compiled import (
    VANISHED,
    CompiledGraph,
    Facts,
    Graphing,
    Loaded,
    build_and_share,
    fetch_and_load,
    load_entry,
    own_sources,
    receive_or,
    settle,
    write_entry,
    write_gpu_kernels,
)
from dcompile.runtime.once import meeting_place
from dcompile.runtime.progress import report_progress
from dcompile.runtime.toolchain import Arity, compiler_fingerprint, probe
from dcompile.runtime.triton_kernels import triton_fingerprint
from dcompile.schedule.batch import batch_kernels
from dcompile.schedule.bucket import bucket_collectives
from dcompile.schedule.epilogue import library_epilogues
from dcompile.schedule.fuse import fuse
from dcompile.schedule.in_place import donate_sources, recover_in_place
from dcompile.schedule.inline import inline_pointwise
from dcompile.schedule.layout import choose_layouts
from dcompile.schedule.memory import plan_memory
from dcompile.schedule.overlap import overlap, predict
from dcompile.schedule.simplify import simplify_graph
from dcompile.schedule.stages import split_reductions
from dcompile.watch import Watch


class Level(Enum):
    """What a graph may consist of between two passes."""

    LOOPS = "loops"
    KERNELS = "kernels"
    ORDERED = "ordered"


_COMMON: tuple[type[Node], ...] = (View, Pack, Extern, Start, Wait)
_ALLOWED: dict[Level, tuple[type[Node], ...]] = {
    Level.LOOPS: (*_COMMON, Pointwise, Reduction, Scan, Store),
    Level.KERNELS: (*_COMMON, Kernel),
    Level.ORDERED: (*_COMMON, Kernel),
}


@dataclass(frozen=True)
class Pass:
    """One step of the compiler.

    Attributes:
        run: the pass itself.
        takes, gives: levels before and after.
        optional: may be left out with ``Options.skip``.
    """

    run: Callable[[Graph, Context], Graph]
    takes: Level
    gives: Level
    optional: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__


PASSES = (
    Pass(recover_in_place, takes=Level.LOOPS, gives=Level.LOOPS, optional=True),
    Pass(simplify_graph, takes=Level.LOOPS, gives=Level.LOOPS),
    Pass(bucket_collectives, takes=Level.LOOPS, gives=Level.LOOPS, optional=True),
    Pass(donate_sources, takes=Level.LOOPS, gives=Level.LOOPS, optional=True),
    Pass(choose_layouts, takes=Level.LOOPS, gives=Level.LOOPS, optional=True),
    Pass(inline_pointwise, takes=Level.LOOPS, gives=Level.LOOPS, optional=True),
    Pass(library_epilogues, takes=Level.LOOPS, gives=Level.LOOPS, optional=True),
    Pass(split_reductions, takes=Level.LOOPS, gives=Level.LOOPS, optional=True),
    Pass(fuse, takes=Level.LOOPS, gives=Level.KERNELS),
    Pass(batch_kernels, takes=Level.KERNELS, gives=Level.KERNELS, optional=True),
    Pass(overlap, takes=Level.KERNELS, gives=Level.ORDERED, optional=True),
)


def run_passes(graph: Graph, ctx: Context, watch: Watch) -> Plan:
    """LOOPS graph to a verified Plan.

    Raises:
        DCompileError: ``Options.skip`` names a pass that does not exist or cannot be left out.
        CompilerBug: a pass broke its contract; ``UnsafePlan`` if the final plan could corrupt memory.
    """
    _check_skips(ctx.options.skip)
    watch.graph("lower", None, _check_level(graph, Level.LOOPS, "lower"))
    program = graph
    for step in PASSES:
        if step.name in ctx.options.skip:
            continue
        before = graph
        with watch.stage(step.name):
            graph = _check_level(step.run(graph, ctx), step.gives, step.name)
        if step.gives is Level.KERNELS:
            program = graph
        watch.graph(step.name, before, graph)
    with watch.stage("plan_memory"):
        plan = plan_memory(graph, ctx)
        plan = replace(plan, prediction=predict(graph, ctx, program), verdicts=tuple(ctx.verdicts))
    with watch.stage("verify"):
        verify(plan, program)
    watch.plan(plan)
    return plan


def _check_skips(skip: frozenset[str]) -> None:
    optional = sorted(step.name for step in PASSES if step.optional)
    if unknown := skip - set(optional):
        wrong, right = ", ".join(sorted(unknown)), ", ".join(optional)
        raise DCompileError(f"cannot skip {wrong}; passes that can be skipped: {right}")


def _check_level(graph: Graph, level: Level, after: str) -> Graph:
    for node in graph.nodes:
        if not isinstance(node, _ALLOWED[level]):
            raise CompilerBug(f"{graph.name}: a {type(node).__name__} is left after {after}, at level {level.value}")
    return graph.check()


@dataclass(frozen=True)
class Built:
    """What one compile produced.

    Attributes:
        run: the program; takes its inputs in one list and clears it.
        plan, kernels, host: the verified plan and both generated programs, unless it came from the cache.
        seconds: compile time by stage, without the C++ compiler, which runs in the background.
        op_by_op: why there are no kernels and every op is a library call; "" where there are.
        inner: the programs it calls.
    """

    name: str
    run: Callable[[list[Any]], Sequence[Any]]
    plan: Plan | None = None
    kernels: CppModule | None = None
    host: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    op_by_op: str = ""
    inner: tuple[Built, ...] = ()

    def calls_json(self) -> str:
        """Its library calls for another executor; see ``codegen.calls``."""
        return calls_json(self.plan.graph) if self.plan is not None else "[]"


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
    if reason := next((why for g in programs_of(lowered.graph) if (why := _why_no_kernels(g, options))), None):
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
    cache = _cache(None if watched else options.cache_dir, options.deadline_s)
    key = _key(lowered, options)
    complete = partial(_complete, lowered.extra_inputs)

    def compiled(loaded: Future[Loaded]) -> CompiledGraph:
        return CompiledGraph(name, loaded, lowered.group_names, complete, options, graphing, programs)

    if (found := _cached(cache, key)) is not None:
        _count(found.facts, graphing, hits=1)
        ready: Future[Loaded] = Future()
        ready.set_result(found)
        return Built(name, compiled(ready), inner=tuple(inner.values()))
    place = meeting_place(cache) if options.compile_once else None
    sharing = place.join(key) if place is not None else None
    if place is not None and sharing is None:
        here = partial(_compile_here, lowered, name, options, watch, cache, key, graphing)
        arrived = partial(_count, graphing=graphing, hits=1)
        coming = receive_or(place, key, cache, options.deadline_s, arrived, here)
        return Built(name, compiled(coming), inner=tuple(inner.values()))
    try:
        announce_compile(name)  # until its first call has loaded it
        made = _print(lowered, name, options, watch)
    except BaseException:
        announce_compile(None)
        if sharing is not None:
            sharing.finish(None)
        raise
    _count(made.facts, graphing, misses=1)
    building = _builders().submit(build_and_share, cache, key, made.write, sharing)
    seconds = dict(watch.seconds)
    return Built(name, compiled(building), made.plan, made.module, made.host, seconds, inner=tuple(inner.values()))


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
        module, gpu = print_cpp(plan.graph), print_triton(plan.graph)
        host = print_host(plan, Kernels({**module.calls, **gpu.calls}), name, options.timeline, options.assert_layouts)
    watch.code(gpu.source or module.source, host)
    facts = _facts(plan, module, gpu)

    def write(folder: Path) -> None:
        with TALLY.timed("c++ compiler"):
            write_entry(folder, host, module.source, facts, options.cxx)
        with TALLY.timed("triton compiler"):
            write_gpu_kernels(folder, gpu.source, gpu.signatures)

    return _Printed(plan, module, host, facts, write)


def _compile_here(
    lowered: Lowered, name: str, options: Options, watch: Watch, cache: Cache, key: str, graphing: Graphing | None
) -> Loaded:
    """What a rank does that waited for another rank in vain."""
    made = _print(lowered, name, options, watch)
    _count(made.facts, graphing, misses=1)
    return fetch_and_load(cache, key, made.write)


MAX_BUILDS = 4
"""C++ compilers that run at once in one process; a training step has two graphs."""


@lru_cache(maxsize=1)
def _builders() -> ThreadPoolExecutor:
    """Threads that wait for C++ compilers and for other processes' builds. A forked child starts its own."""
    return ThreadPoolExecutor(max_workers=MAX_BUILDS, thread_name_prefix="dcompile-build")


os.register_at_fork(after_in_child=_builders.cache_clear)


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


def _context(lowered: Lowered, options: Options) -> Context:
    return Context(options, _costs(lowered, options))


def _costs(lowered: Lowered, options: Options) -> CostModel:
    """The prices of the user's topology; else documented ones, or measured ones of the groups that were calibrated."""
    if options.topology is not None:
        ranks = {label: group_ranks(group) for label, group in lowered.group_names.items()}
        return read_topology(options.topology).costs(ranks)
    starts = [node for node in lowered.graph.nodes if isinstance(node, Start)]
    device = "cuda" if "cuda" in _devices(lowered.graph) else "cpu"
    costs = CostModel.analytical(device, max((start.group.size for start in starts), default=1))
    measured = {start.group.label: calibration_of(lowered.group_names[start.group.label]) for start in starts}
    return calibrated(costs, device, {label: found for label, found in measured.items() if found is not None})


def _key(lowered: Lowered, options: Options) -> str:
    """Everything the generated program depends on."""
    return cache_key(
        print_graph(lowered.graph),
        options.affects_code(),
        repr(_costs(lowered, options)),
        options.timeline,
        own_sources(),
        torch.__version__,
        compiler_fingerprint(options.cxx) if "cpu" in _loop_devices(lowered.graph) else None,
        triton_fingerprint() if "cuda" in _devices(lowered.graph) else None,
    )


def _facts(plan: Plan, module: CppModule, gpu: TritonModule) -> Facts:
    externs = [node for node in plan.graph.nodes if is_library_call(node)]
    return Facts(
        functions={name: Arity(s.buffers, s.sizes) for name, s in module.signatures.items()},
        lines=communication_lines(plan.graph),
        launches=len(module.calls) + len(gpu.calls),
        library_calls=len(externs),
        collectives=sum(isinstance(node, Start) for node in plan.graph.nodes),
        fallbacks=Counter(node.op for node in externs if node.fallback),
        gpu_functions=len(gpu.signatures),
        graph_refusal=graph_refusal(plan.graph),
        written=written_inputs(plan.graph),
    )


def graph_refusal(graph: Graph) -> str:
    """Why a program cannot be replayed as a CUDA graph; "" if nothing is known against it."""
    if _devices(graph) != {"cuda"}:
        return "tensors on the CPU"
    if graph.size_hints:
        return "sizes that are not known before the call"
    if any(isinstance(node, Start) for node in graph.nodes):
        return "collectives"
    if any(reads_numbers(node) or calls_programs(node) for node in graph.nodes):
        return "numbers that the program reads while it runs"
    return ""


def written_inputs(graph: Graph) -> tuple[int, ...]:
    """Positions of the inputs whose memory some node writes."""
    roots = storage_roots(graph)
    written = {roots[name] for node in graph.nodes for name in node.mutates}
    return tuple(n for n, item in enumerate(graph.inputs) if isinstance(item, Value) and roots[item.name] in written)


def _count(facts: Facts, graphing: Graphing | None, hits: int = 0, misses: int = 0) -> None:
    TALLY.add(
        kernels=len(facts.functions) + facts.gpu_functions,
        kernel_launches=facts.launches,
        library_calls=facts.library_calls,
        collectives=facts.collectives,
        cache_hits=hits,
        cache_misses=misses,
    )
    TALLY.add_fallbacks(facts.fallbacks)
    if graphing is not None and facts.graph_refusal and facts.gpu_functions:
        TALLY.add_fallbacks(Counter({f"no CUDA graph: {facts.graph_refusal}": 1}))


def _complete(extra_inputs: tuple[Extra, ...], inputs: list[Any]) -> None:
    for extra in extra_inputs:
        if isinstance(extra, SizeOf):
            inputs.append(inputs[extra.input].shape[extra.dim])
        else:
            inputs.append(extra.get() if isinstance(extra, OnDevice) else extra)


def _why_no_kernels(graph: Graph, options: Options) -> str | None:
    """Why no kernels can be made for ``graph``; None if they can."""
    devices = _devices(graph)
    if strange := devices - {"cpu", "cuda"}:
        return f"there is no kernel printer for {', '.join(sorted(strange))}"
    if "cuda" in devices:
        if triton_fingerprint() is None:
            return "GPU kernels need Triton and a CUDA device"
        for node in graph.nodes:
            if isinstance(node, Loop) and len(mixed := _touched(graph, node)) > 1:
                return f"{', '.join(node.origin.ops)} mixes tensors of {' and '.join(sorted(mixed))}"
    if "cpu" in _loop_devices(graph):
        try:
            probe(options.cxx)
        except ToolchainError as error:
            return str(error)
    return None


def _devices(graph: Graph) -> set[str]:
    return {found.device for found in graph.defs.values() if isinstance(found, Value)}


def _loop_devices(graph: Graph) -> set[str]:
    """Devices that kernels are compiled for; copies of views on a device become kernels too."""
    return {n.defs[0].device for n in graph.nodes if isinstance(n, Loop | View)}


def _touched(graph: Graph, node: Loop) -> set[str]:
    """Devices of the tensors a loop reads and writes."""
    return {node.defs[0].device} | {graph.value(name).device for name in node.operands}


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
