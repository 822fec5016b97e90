"""Random programs through the scheduling passes: the numbers stay, and every plan is proven safe."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcompile.analyse.context import Context
from dcompile.analyse.cost import CostModel
from dcompile.analyse.dependence import predecessors
from dcompile.analyse.verify import verify
from dcompile.collectives.text import parse_graph
from dcompile.errors import CompilerBug
from dcompile.ir.graph import Graph
from dcompile.options import Options
from dcompile.plan import Plan
from dcompile.reference import run_reference
from dcompile.schedule.bucket import bucket_collectives
from dcompile.schedule.fuse import fuse
from dcompile.schedule.memory import plan_memory
from dcompile.schedule.order import reorder
from dcompile.schedule.overlap import overlap, predict
from dcompile.schedule.simplify import simplify_graph
from tests.strategies import GROUP, assert_same, copy_inputs, graphs, random_inputs

RANKS = GROUP.size


LEGAL_ORDERS = 10_000 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 60
"""Random programs with a random legal order each."""


def context(bucket_bytes: int | None = None, in_flight_bytes: int = 2**20) -> Context:
    options = Options(bucket_bytes=bucket_bytes, in_flight_bytes=in_flight_bytes)
    return Context(options, CostModel.analytical("cpu", RANKS))


def assert_same_results(before: Graph, after: Graph) -> None:
    """Both programs return the same on every rank, and leave the same in their inputs."""
    inputs = random_inputs(before, RANKS)
    first, second = copy_inputs(inputs), copy_inputs(inputs)
    assert_same(run_reference([after] * RANKS, second), run_reference([before] * RANKS, first))
    assert_same(second, first)


def checked_plan(graph: Graph, ctx: Context) -> Plan:
    plan = plan_memory(graph, ctx)
    verify(plan)
    return plan


def kernels_of(graph: Graph, ctx: Context) -> Graph:
    """The KERNELS graph of a LOOPS graph; fusion relies on simplification (stores that read their own target)."""
    return fuse(bucket_collectives(simplify_graph(graph, ctx), ctx), ctx)


def random_order(graph: Graph, seed: int) -> list[int]:
    """A random order that respects all dependences."""
    draw = random.Random(seed)
    before = predecessors(graph)
    left = list(range(len(graph.nodes)))
    order: list[int] = []
    while left:
        done = set(order)
        chosen = draw.choice([p for p in left if before[p] <= done])
        left.remove(chosen)
        order.append(chosen)
    return order


@settings(max_examples=60)
@given(graph=graphs(max_nodes=14), bucket_bytes=st.sampled_from([None, 16, 64, 2**20]))
def test_bucketing_keeps_the_numbers(graph: Graph, bucket_bytes: int | None) -> None:
    assert_same_results(graph, bucket_collectives(graph, context(bucket_bytes)))


@settings(max_examples=60)
@given(
    graph=graphs(max_nodes=14),
    bucket_bytes=st.sampled_from([None, 64, 2**20]),
    in_flight_bytes=st.sampled_from([1, 64, 2**20]),
)
def test_all_passes_keep_the_numbers_and_give_a_safe_plan(
    graph: Graph, bucket_bytes: int | None, in_flight_bytes: int
) -> None:
    ctx = context(bucket_bytes, in_flight_bytes)
    kernels = kernels_of(graph, ctx)
    ordered = overlap(kernels, ctx)
    assert_same_results(graph, ordered)
    plan = checked_plan(ordered, ctx)
    assert sum(plan.arena_bytes.values()) <= plan.peak_bytes
    times = predict(ordered, ctx, kernels)
    assert times.lower_bound_us <= times.makespan_us * (1 + 1e-9) <= times.program_order_us * (1 + 2e-9)


@settings(max_examples=15)
@given(graph=graphs(max_nodes=10, symbolic=True))
def test_symbolic_sizes_pass_through_all_passes(graph: Graph) -> None:
    ctx = context(2**20)
    ordered = overlap(kernels_of(graph, ctx), ctx)
    assert_same_results(graph, ordered)
    checked_plan(ordered, ctx)


@settings(max_examples=LEGAL_ORDERS)
@given(graph=graphs(max_nodes=12), seed=st.integers(0, 2**16))
@pytest.mark.row("T7")
def test_every_legal_order_keeps_the_numbers_and_has_a_safe_plan(graph: Graph, seed: int) -> None:
    kernels = fuse(simplify_graph(graph, context()), context())
    shuffled = reorder(kernels, random_order(kernels, seed))
    assert_same_results(graph, shuffled)
    checked_plan(shuffled, context())


@pytest.mark.parametrize(
    "store",
    [
        "store add t (i0: 2) [q0 | q0 = at[0] % 2:i64] = neg(t[q0 | q0 = wrap_index(at[0] % 2:i64, 2:i64)])",
        "store set t (i0: 2) [q0 | q0 = at[0] % 2:i64] = t[q0 | q0 = at[0] % 2:i64] + 1.0:f32",
        "store add t (i0: 2) [1] = t[1]",
    ],
)
def test_a_store_that_meets_a_position_twice_reads_it_as_it_was(store: str) -> None:
    """Found by the long run: iterations one after another read what the one before them wrote."""
    before = parse_graph(f"""
    graph f(x: f32[2], at: i64[1]) {{
      t: f32[2] = pack (x)
      y: f32[2] = {store}
      return %y
    }}""").check()
    assert_same_results(before, kernels_of(before, context()))


def test_a_kernel_does_not_work_in_place_on_what_it_writes_as_a_target() -> None:
    """Found by the long run: the copy and the next version of ``t`` were given the same bytes."""
    before = parse_graph("""
    graph f(x: f32[1, 2]) {
      t: f32[2] = pack (x)
      a: f32[2] = pointwise (i0: 2) t[i0]
      p: pending (r: f32[4]) = start all_gather (a) @g0[2]
      t2: f32[2] = store set t (i0: 2) [i0] = t[i0]
      r: f32[4] = wait p
      return %r
    }""").check()
    checked_plan(kernels_of(before, context()), context())


@settings(max_examples=10)
@given(graph=graphs(max_nodes=12), bucket_bytes=st.sampled_from([None, 2**20]))
def test_scheduling_twice_gives_the_same_plan(graph: Graph, bucket_bytes: int | None) -> None:
    def run() -> Plan:
        ctx = context(bucket_bytes)
        return plan_memory(overlap(kernels_of(graph, ctx), ctx), ctx)

    first, second = run(), run()
    assert first == second
    assert first.verdicts == second.verdicts


def swap(order: Sequence[int], a: int, b: int) -> list[int]:
    swapped = list(order)
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return swapped


@settings(max_examples=15)
@given(graph=graphs(max_nodes=8))
def test_an_order_that_breaks_a_dependence_is_refused(graph: Graph) -> None:
    found = [(max(before), at) for at, before in enumerate(predecessors(graph)) if before]
    for first, second in found:
        with pytest.raises(CompilerBug):
            reorder(graph, swap(range(len(graph.nodes)), first, second))
