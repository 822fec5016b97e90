"""The compiler as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from dcompile.analyse.context import Context
from dcompile.analyse.verify import verify
from dcompile.collectives.nodes import Start, Wait
from dcompile.errors import CompilerBug, DCompileError
from dcompile.ir.graph import Graph
from dcompile.ir.kernel import Kernel
from dcompile.ir.nodes import Extern, Node, Pack, Pointwise, Reduction, Scan, Store, View
from dcompile.plan import Plan
from dcompile.schedule.async_matmul import async_matmuls
from dcompile.schedule.batch import batch_kernels
from dcompile.schedule.bucket import bucket_collectives
from dcompile.schedule.epilogue import library_epilogues
from dcompile.schedule.exchange import exchange_sums
from dcompile.schedule.fuse import fuse
from dcompile.schedule.in_place import donate_sources, recover_in_place
from dcompile.schedule.inline import inline_pointwise
from dcompile.schedule.layout import choose_layouts
from dcompile.schedule.lowering import choose_lowerings
from dcompile.schedule.memory import plan_memory
from dcompile.schedule.overlap import overlap, predict
from dcompile.schedule.products import product_kernels
from dcompile.schedule.scan_readers import fuse_scan_readers
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
    Pass(exchange_sums, takes=Level.LOOPS, gives=Level.LOOPS, optional=True),
    Pass(choose_lowerings, takes=Level.LOOPS, gives=Level.LOOPS, optional=True),
    Pass(bucket_collectives, takes=Level.LOOPS, gives=Level.LOOPS, optional=True),
    Pass(async_matmuls, takes=Level.LOOPS, gives=Level.LOOPS, optional=True),
    Pass(donate_sources, takes=Level.LOOPS, gives=Level.LOOPS, optional=True),
    Pass(choose_layouts, takes=Level.LOOPS, gives=Level.LOOPS, optional=True),
    Pass(inline_pointwise, takes=Level.LOOPS, gives=Level.LOOPS, optional=True),
    Pass(library_epilogues, takes=Level.LOOPS, gives=Level.LOOPS, optional=True),
    Pass(split_reductions, takes=Level.LOOPS, gives=Level.LOOPS, optional=True),
    Pass(fuse, takes=Level.LOOPS, gives=Level.KERNELS),
    Pass(fuse_scan_readers, takes=Level.KERNELS, gives=Level.KERNELS, optional=True),
    Pass(product_kernels, takes=Level.KERNELS, gives=Level.KERNELS, optional=True),
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
