from __future__ import annotations

import pytest

from dcompile.analyse.context import Context
from dcompile.analyse.cost import CostModel
from dcompile.collectives.nodes import Start
from dcompile.collectives.text import parse_graph, print_graph
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Pack
from dcompile.options import Options
from dcompile.reference import run_reference
from dcompile.schedule.bucket import bucket_collectives
from dcompile.schedule.overlap import overlap, predict
from tests.strategies import assert_same, copy_inputs, random_inputs

WHOLE = 2**30


def context(bucket_bytes: int | None = WHOLE) -> Context:
    return Context(Options(bucket_bytes=bucket_bytes), CostModel.analytical("cpu", 2))


def bucketed(text: str, bucket_bytes: int | None = WHOLE) -> tuple[Graph, Context]:
    """``text`` after the pass, checked on two ranks against the reference interpreter."""
    ctx, before = context(bucket_bytes), parse_graph(text).check()
    after = bucket_collectives(before, ctx).check()
    inputs = random_inputs(before, 2)
    first, second = copy_inputs(inputs), copy_inputs(inputs)
    assert_same(run_reference([after] * 2, second), run_reference([before] * 2, first))
    assert_same(second, first)
    return after, ctx


def same(text: str) -> str:
    return print_graph(parse_graph(text))


def reasons(ctx: Context, decision: str) -> dict[str, str]:
    return {v.subject: v.reason for v in ctx.verdicts if v.decision == decision}


TWO_GRADIENTS = """
graph f(x: f32[4, 4], w: f32[4, 4]) {
  a: f32[4, 4] = extern aten.mm.default(%x, %w)
  p: pending (r: f32[4, 4]) = start all_reduce.avg (a) @g0[2]
  r: f32[4, 4] = wait p
  b: f32[3] = reduce sum (i0: 3; r0: 4) a[i0, r0]
  q: pending in place (s: f32[3]) = start all_reduce.avg (b) @g0[2]
  s: f32[3] = wait q
  c: f32[4, 4] = pointwise (i0: 4, i1: 4) x[i0, i1] + 1.0:f32
  d: f32[4, 4] = pointwise (i0: 4, i1: 4) c[i0, i1] + r[i0, i1]
  return %d, %s
}"""


def test_gradients_are_packed_reduced_in_place_and_viewed() -> None:
    after, _ = bucketed(TWO_GRADIENTS)
    assert print_graph(after) == same("""
    graph f(x: f32[4, 4], w: f32[4, 4]) {
      a: f32[4, 4] = extern aten.mm.default(%x, %w)
      b: f32[3] = reduce sum (i0: 3; r0: 4) a[i0, r0]
      bucket0: f32[19] = pack (a, b)
      bucket0_flight: pending in place (bucket0_reduced: f32[19]) = start all_reduce.avg (bucket0) @g0[2]
      c: f32[4, 4] = pointwise (i0: 4, i1: 4) x[i0, i1] + 1.0:f32
      bucket0_reduced: f32[19] = wait bucket0_flight
      r: f32[4, 4] = view bucket0_reduced (i0: 4, i1: 4) -> [4*i0 + i1]
      s: f32[3] = view bucket0_reduced (i0: 3) -> [i0 + 16]
      d: f32[4, 4] = pointwise (i0: 4, i1: 4) c[i0, i1] + r[i0, i1]
      return %d, %s
    }""")


def chain(count: int, each: str = "f32[8]") -> str:
    """``count`` independent all-reduces of 32 bytes, one after another."""
    rows = "".join(
        f"a{n}: {each} = extern aten.mul.Tensor(%x, {n + 1})\n"
        f"p{n}: pending (r{n}: {each}) = start all_reduce.sum (a{n}) @g0[2]\n"
        f"r{n}: {each} = wait p{n}\n"
        for n in range(count)
    )
    return f"graph f(x: {each}) {{\n{rows}return {', '.join(f'%r{n}' for n in range(count))}\n}}"


@pytest.mark.parametrize(
    ("limit", "parts"),
    [(31, []), (32, []), (64, [2, 2]), (95, [2, 2]), (96, [3, 2]), (WHOLE, [5])],
)
def test_a_bucket_holds_no_more_than_its_limit(limit: int, parts: list[int]) -> None:
    after, _ = bucketed(chain(5), limit)
    assert [len(node.parts) for node in after.nodes if isinstance(node, Pack)] == parts


def test_parts_that_keep_alignment_come_first() -> None:
    after, _ = bucketed("""
    graph f(x: f32[3], y: f32[16], z: f32[32]) {
      p: pending (r: f32[3]) = start all_reduce.sum (x) @g0[2]
      q: pending (s: f32[16]) = start all_reduce.sum (y) @g0[2]
      o: pending (t: f32[32]) = start all_reduce.sum (z) @g0[2]
      r: f32[3] = wait p
      s: f32[16] = wait q
      t: f32[32] = wait o
      return %r, %s, %t
    }""")
    assert next(node.parts for node in after.nodes if isinstance(node, Pack)) == ("y", "z", "x")


@pytest.mark.parametrize(
    "second",
    [
        "start all_reduce.max (y) @g0[2]",
        "start all_reduce.sum (y) @g1[2]",
        "start broadcast (y) @g0[2] root 0",
    ],
)
def test_only_equal_kinds_reductions_and_groups_share_a_bucket(second: str) -> None:
    text = f"""
    graph f(x: f32[4], y: f32[4]) {{
      p: pending (r: f32[4]) = start all_reduce.sum (x) @g0[2]
      q: pending (s: f32[4]) = {second}
      r: f32[4] = wait p
      s: f32[4] = wait q
      return %r, %s
    }}"""
    after, _ = bucketed(text)
    assert print_graph(after) == same(text)


def test_each_dtype_has_its_bucket() -> None:
    text = """
    graph f(x: f32[4], y: f64[4], z: f32[4], w: f64[4]) {
      p: pending (r: f32[4]) = start all_reduce.sum (x) @g0[2]
      q: pending (s: f64[4]) = start all_reduce.sum (y) @g0[2]
      o: pending (t: f64[4]) = start all_reduce.sum (w) @g0[2]
      n: pending (u: f32[4]) = start all_reduce.sum (z) @g0[2]
      r: f32[4] = wait p
      s: f64[4] = wait q
      t: f64[4] = wait o
      u: f32[4] = wait n
      return %r, %s, %t, %u
    }"""
    after, _ = bucketed(text)
    # launched in the order of their last members
    assert [node.parts for node in after.nodes if isinstance(node, Pack)] == [("y", "w"), ("x", "z")]


def test_a_collective_that_needs_the_result_of_another_travels_alone() -> None:
    text = """
    graph f(x: f32[4]) {
      p: pending (r: f32[4]) = start all_reduce.sum (x) @g0[2]
      r: f32[4] = wait p
      a: f32[4] = pointwise (i0: 4) tanh(r[i0])
      q: pending (s: f32[4]) = start all_reduce.sum (a) @g0[2]
      s: f32[4] = wait q
      return %s
    }"""
    after, _ = bucketed(text)
    assert print_graph(after) == same(text)


def test_buckets_that_would_wait_for_each_other_are_refused() -> None:
    text = """
    graph f(x: f32[4], y: f64[4]) {
      p: pending (r: f32[4]) = start all_reduce.sum (x) @g0[2]
      r: f32[4] = wait p
      a: f64[4] = pointwise (i0: 4) to_f64(r[i0])
      q: pending (s: f64[4]) = start all_reduce.sum (a) @g0[2]
      o: pending (t: f64[4]) = start all_reduce.sum (y) @g0[2]
      s: f64[4] = wait q
      t: f64[4] = wait o
      b: f32[4] = pointwise (i0: 4) to_f32(t[i0])
      n: pending (u: f32[4]) = start all_reduce.sum (b) @g0[2]
      u: f32[4] = wait n
      return %s, %u
    }"""
    after, ctx = bucketed(text)
    assert len([node for node in after.nodes if isinstance(node, Pack)]) == 1
    assert "together they would wait for their own results" in reasons(ctx, "not merged").values()


def test_a_source_written_after_its_wait_is_packed_before_the_write() -> None:
    after, _ = bucketed("""
    graph f(x: f32[4], y: f32[4]) {
      a: f32[4] = pointwise (i0: 4) tanh(x[i0])
      p: pending (r: f32[4]) = start all_reduce.sum (a) @g0[2]
      r: f32[4] = wait p
      a2: f32[4] = store set a (i0: 4) [i0] = y[i0]
      b: f32[4] = pointwise (i0: 4) sin(y[i0])
      q: pending (s: f32[4]) = start all_reduce.sum (b) @g0[2]
      s: f32[4] = wait q
      return %r, %s, %a2
    }""")
    assert any(isinstance(node, Pack) for node in after.nodes)


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ("%v, %s", "v, which shares its memory, is returned"),
        ("%r, %s, %w", "v, which shares its memory, is used later"),
    ],
)
def test_an_in_place_collective_whose_memory_is_seen_stays(returned: str, reason: str) -> None:
    _, ctx = bucketed(f"""
    graph f(x: f32[4], y: f32[4]) {{
      a: f32[4] = pointwise (i0: 4) tanh(x[i0])
      v: f32[2] = view a (i0: 2) -> [i0]
      p: pending in place (r: f32[4]) = start all_reduce.sum (a) @g0[2]
      r: f32[4] = wait p
      q: pending (s: f32[4]) = start all_reduce.sum (y) @g0[2]
      s: f32[4] = wait q
      w: f32[2] = pointwise (i0: 2) neg(v[i0])
      return {returned}
    }}""")
    assert reasons(ctx, "not merged")["p"] == reason


def test_an_input_reduced_in_place_stays() -> None:
    _, ctx = bucketed("""
    graph f(x: f32[4], y: f32[4]) {
      p: pending in place (r: f32[4]) = start all_reduce.sum (x) @g0[2]
      r: f32[4] = wait p
      q: pending (s: f32[4]) = start all_reduce.sum (y) @g0[2]
      s: f32[4] = wait q
      return %s
    }""")
    assert reasons(ctx, "not merged")["p"] == "it overwrites the input x in place"


def test_a_result_that_is_written_stays() -> None:
    _, ctx = bucketed("""
    graph f(x: f32[4], y: f32[4]) {
      p: pending (r: f32[4]) = start all_reduce.sum (x) @g0[2]
      r: f32[4] = wait p
      v: f32[2] = view r (i0: 2) -> [i0]
      v2: f32[2] = store set v (i0: 2) [i0] = 1.0:f32
      q: pending (s: f32[4]) = start all_reduce.sum (y) @g0[2]
      s: f32[4] = wait q
      return %v2, %s
    }""")
    assert reasons(ctx, "not merged")["p"] == "its result v is written later"


@pytest.mark.parametrize(("kind", "rows"), [("all_gather", 8), ("reduce_scatter.sum", 2)])
def test_gathers_and_scatters_become_one_launch(kind: str, rows: int) -> None:
    after, _ = bucketed(f"""
    graph f(x: f32[4], y: f32[4, 3]) {{
      p: pending (r: f32[{rows}]) = start {kind} (x) @g0[2]
      r: f32[{rows}] = wait p
      q: pending (s: f32[{rows}, 3]) = start {kind} (y) @g0[2]
      s: f32[{rows}, 3] = wait q
      return %r, %s
    }}""")
    assert [node.sources for node in after.nodes if isinstance(node, Start)] == [("x", "y")]
    assert len(after.nodes) == 2


def test_symbolic_sizes_have_symbolic_offsets() -> None:
    after, _ = bucketed("""
    graph f(s0: size = 3, x: f32[s0], y: f32[s0, 2]) {
      p: pending (r: f32[s0]) = start all_reduce.sum (x) @g0[2]
      r: f32[s0] = wait p
      q: pending (s: f32[s0, 2]) = start all_reduce.sum (y) @g0[2]
      s: f32[s0, 2] = wait q
      return %r, %s
    }""")
    assert "view bucket0_reduced (i0: s0, i1: 2) -> [2*i0 + i1 + s0]" in print_graph(after)


def test_names_the_graph_uses_are_not_taken() -> None:
    after, _ = bucketed(chain(2).replace("a0", "bucket0"))
    assert any(node.out.name == "bucket1" for node in after.nodes if isinstance(node, Pack))


def test_many_small_collectives_share_one_latency() -> None:
    after, ctx = bucketed(chain(6), None)
    assert [len(node.parts) for node in after.nodes if isinstance(node, Pack)] == [6]
    found = {v.subject: v.decision for v in ctx.verdicts}
    assert found == {"f: no bucketing": "not taken", "f: buckets of 1048576 bytes": "taken"}


def test_the_last_bucket_is_not_made_so_large_that_it_ends_exposed() -> None:
    """On a fast link the latency is small beside long matmuls: one bucket would leave all transfers to the end."""
    size = "f32[4096, 4096]"
    rows = "".join(
        f"g{n}: {size} = extern aten.mm.default(%a{n}, %x) -> aten.mm.out\n"
        f"p{n}: pending (r{n}: {size}) = start all_reduce.sum (g{n}) @g0[2]\n"
        f"r{n}: {size} = wait p{n}\n"
        f"a{n + 1}: {size} = extern aten.mm.default(%g{n}, %x) -> aten.mm.out\n"
        for n in range(6)
    )
    text = f"graph f(x: {size}, a0: {size}) {{\n{rows}return {', '.join(f'%r{n}' for n in range(6))}\n}}"
    ctx = Context(Options(in_flight_bytes=2**31), CostModel.analytical("cuda", 2))
    before = parse_graph(text.replace("4096]", "4096]@cuda")).check()
    after = bucket_collectives(before, ctx)
    assert max((len(node.parts) for node in after.nodes if isinstance(node, Pack)), default=1) < 6
    assert sum(v.decision == "taken" for v in ctx.verdicts) == 1
    assert len(ctx.verdicts) > 3


def test_a_graph_with_one_collective_is_left_alone() -> None:
    ctx, before = context(), parse_graph(chain(1))
    assert bucket_collectives(before, ctx) is before


def deep(layers: int, rows: int) -> Graph:
    """A backward pass: the product of each layer, a gradient of ``rows * 64`` floats and its all-reduce."""
    size, each = f"f32[{rows}, {rows}]", f"f32[{rows}, 64]"
    nodes = "".join(
        f"d{n + 1}: {size} = extern aten.mm.default(%d{n}, %w) -> aten.mm.out\n"
        f"g{n}: {each} = extern aten.mm.default(%d{n + 1}, %x) -> aten.mm.out\n"
        f"p{n}: pending (r{n}: {each}) = start all_reduce.sum (g{n}) @g0[2]\n"
        f"r{n}: {each} = wait p{n}\n"
        for n in range(layers)
    )
    head = f"graph f(d0: {size}, w: {size}, x: {each})"
    return parse_graph(f"{head} {{\n{nodes}return {', '.join(f'%r{n}' for n in range(layers))}\n}}").check()


@pytest.mark.parametrize("rows", [64, 512, 1024])
@pytest.mark.parametrize("full_search", [True, False])
def test_the_chosen_size_is_no_worse_than_usual_ones(
    rows: int, full_search: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcompile.schedule.bucket.FULL_SEARCH_NODES", 10**6 if full_search else 0)
    before, layers = deep(12, rows), 12

    def predicted_us(bucket_bytes: int | None) -> float:
        ctx = Context(Options(bucket_bytes=bucket_bytes), CostModel.analytical("cpu", 2))
        return predict(overlap(bucket_collectives(before, ctx), ctx), ctx).makespan_us

    layer = rows * 64 * 4
    usual = [predicted_us(limit) for limit in (1, layer, 3 * layer, layers * layer)]
    assert predicted_us(None) <= 1.05 * min(usual), usual


def test_no_bucket_holds_more_than_may_be_in_flight() -> None:
    text = chain(8, "f32[65536]")
    before = parse_graph(text).check()
    for in_flight, launches in ((2**30, 1), (2**21, 2)):
        ctx = Context(Options(in_flight_bytes=in_flight), CostModel.analytical("cpu", 2))
        after = bucket_collectives(before, ctx)
        assert sum(isinstance(node, Start) for node in after.nodes) == launches
