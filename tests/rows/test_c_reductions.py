"""Rows C: reductions, how they are cut over a GPU, and what they give for nothing, one element and NaN.

Cutting is decided by pure functions and is a pass over the IR, so it is tested without a GPU: the reference interpreter
runs the program before and after. Sizes that would take long are replaced by a processor with few multiprocessors.
"""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import replace
from functools import reduce

import pytest
import torch
from torch import Tensor

from dcompile.analyse.context import Context
from dcompile.analyse.cost import H200, CostModel
from dcompile.codegen.triton_launch import choose_launch
from dcompile.collectives.text import parse_graph, print_graph
from dcompile.errors import ParseError
from dcompile.ir.combine import extreme, neutral, rule
from dcompile.ir.graph import Graph
from dcompile.ir.kernel import Fold, Kernel, Nest, Role, statements
from dcompile.ir.nodes import Reduction
from dcompile.ir.types import DType
from dcompile.options import Options
from dcompile.reference import run_reference
from dcompile.schedule.fuse import fuse
from dcompile.schedule.inline import inline_pointwise
from dcompile.schedule.simplify import simplify_graph
from dcompile.schedule.split import (
    CPU,
    Hint,
    Processor,
    choose_parts,
    parts_of_column,
    parts_of_row,
    second_stage_hint,
)
from dcompile.schedule.stages import runs_along, split_reductions
from tests.rows.check import chk

FEW = 2
"""Multiprocessors of the processor most programs here are cut for."""


def context(multiprocessors: int = 132) -> Context:
    costs = CostModel.analytical("cuda", 1)
    roof = replace(H200, multiprocessors=multiprocessors)
    return Context(Options.from_env({"cache_dir": None}), replace(costs, compute={**costs.compute, "cuda": roof}))


def graph_of(line: str, inputs: str, out: str = "y") -> Graph:
    return parse_graph(f"graph f({inputs}) {{\n{line}\nreturn %{out}\n}}").check()


def reductions(graph: Graph) -> list[Reduction]:
    return [node for node in graph.nodes if isinstance(node, Reduction)]


def kernels(graph: Graph) -> list[Kernel]:
    return [node for node in graph.nodes if isinstance(node, Kernel)]


def cut(graph: Graph, multiprocessors: int = FEW, reuse: bool = True) -> Graph:
    return split_reductions(graph, context(multiprocessors), reuse).check()


def assert_same(before: Graph, after: Graph, *inputs: Tensor, rtol: float = 0.0) -> Tensor:
    """Both programs give the same; returns what they give."""
    want = run_reference([before], [[x.clone() for x in inputs]])[0][0]
    for program in (after, fuse(after, context())):
        have = run_reference([program], [[x.clone() for x in inputs]])[0][0]
        assert isinstance(want, Tensor)
        assert isinstance(have, Tensor)
        torch.testing.assert_close(have, want, rtol=rtol, atol=0.0, equal_nan=True)
    assert isinstance(want, Tensor)
    return want


# kinds and special sizes ---------------------------------------------------------------------------------------------


@pytest.mark.row("C1")
def test_every_kind_over_every_subset_of_dimensions() -> None:
    subsets = [dims for n in (1, 2, 3) for dims in itertools.combinations(range(3), n)]

    def program(x: Tensor) -> list[Tensor]:
        found = []
        for n, dims in enumerate(subsets):
            keep = n % 2 == 0
            found += [x.sum(dims, keepdim=keep), x.amax(dims, keepdim=keep), x.amin(dims, keepdim=keep)]
            found.append((x > 0).any(dims, keepdim=keep) if n < 3 else x.mean(dims, keepdim=keep))
        return [*found, x.prod(1), x.prod(0, keepdim=True)]

    seen = chk(program, torch.randn(3, 4, 5))
    assert seen.X == 0
    assert len(subsets) + 2 >= seen.K
    alone = chk(lambda x: (x.sum((0, 2)), x.amax((0, 2))), torch.randn(3, 4, 5))
    assert (alone.K, alone.X) == (1, 0)
    xor = graph_of("y: i32[3] = reduce xor (i0: 3; r0: 40) x[i0, r0]", "x: i32[3, 40]")
    bits = torch.randint(0, 2**20, (3, 40), dtype=torch.int32)
    got = assert_same(xor, xor, bits)
    assert got.tolist() == [reduce(operator.xor, row) for row in bits.tolist()]


@pytest.mark.row("C2")
def test_max_and_min_propagate_nan_in_every_form() -> None:
    x = torch.randn(40, 300)
    x[3, 7] = x[5, 299] = math.nan
    chk(lambda x: (x.amax(1), x.amin(1), x.amax(0), x.amin(0), x.amax(), x[:, 5:9].amin(1)), x)
    for kind in ("max", "min"):
        before = graph_of(f"y: f32[2]@cuda = reduce {kind} (i0: 2; r0: 9001) x[i0, r0]", "x: f32[2, 9001]@cuda")
        long = torch.randn(2, 9001)
        long[1, 8999] = math.nan
        after = cut(before, 132)
        assert len(reductions(after)) == 2
        assert_same(before, after, long)
    with pytest.raises(ValueError, match="foo"):
        rule("foo", DType.F32)
    with pytest.raises(ParseError, match="reduction"):
        graph_of("y: f32[] = reduce foo (; r0: 9) x[r0]", "x: f32[9]")


@pytest.mark.row("C3")
def test_positions_of_the_best_with_nan_and_ties() -> None:
    nan = math.nan

    def program(small: Tensor, cube: Tensor, long: Tensor) -> list[Tensor]:
        return [small.argmax(1), small.argmin(1), cube.argmax(), cube.argmin(), cube.argmax(1), long.argmax(0)]

    small = torch.tensor([[1, nan, 5, nan], [1, nan, -5, nan], [1, 5, 5, 0], [-3, -3, -3, -3]])
    cube = torch.randint(0, 5, (2, 3, 5)).float()
    long = torch.randint(0, 100, (100_000,)).float()
    seen = chk(program, small, cube, long)
    assert seen.X == 0
    assert seen.result[0].tolist()[:3] == [1, 1, 1]
    assert seen.result[1].tolist()[:2] == [1, 1]
    assert chk(lambda x: x.argmax(0), long).K == 1
    before = graph_of("y: i64[]@cuda = reduce argmax (; r0: 1000000) x[r0]", "x: f32[1000000]@cuda")
    assert cut(before, 132) is before


@pytest.mark.row("C4")
def test_reductions_of_nothing() -> None:
    def program(x: Tensor, n: Tensor, outer: Tensor) -> list[Tensor]:
        flags = x > 0
        return [x.sum(1), n.sum(1), x.prod(1), n.prod(1), flags.any(1), flags.all(1), x.mean(1), outer.amax(1), x.sum()]

    seen = chk(program, torch.empty(3, 0), torch.empty(3, 0, dtype=torch.int32), torch.empty(0, 3))
    assert seen.X == 0
    assert [r.dtype for r in seen.result[:5]] == [torch.float32, torch.int64, torch.float32, torch.int64, torch.bool]
    for wrong in (lambda x: x.amax(1), lambda x: x.argmin(1), lambda x: x.max()):
        torch.compiler.reset()
        compiled = torch.compile(wrong, backend="dcompile")
        with pytest.raises((IndexError, RuntimeError)) as eager:
            wrong(torch.empty(3, 0))
        with pytest.raises((type(eager.value), RuntimeError), match=r"dim|empty|numel|reduction"):
            compiled(torch.empty(3, 0))


@pytest.mark.row("C5")
def test_reductions_of_one_element() -> None:
    def program(x: Tensor, flags: Tensor, n: Tensor) -> list[Tensor]:
        return [x.any(1), x.all(1), flags.sum(1), n.sum(1), x.argmax(1), n.prod(1), x.amax(1), x.sum(1), flags.any(1)]

    x = torch.tensor([[2.5], [0.0]])
    seen = chk(program, x, torch.ones(2, 1, dtype=torch.bool), torch.tensor([[3], [4]], dtype=torch.int8))
    assert seen.X == 0
    assert "reduction(" not in seen.code
    assert not any(isinstance(s, Fold) for k in kernels(seen.plan.graph) for s in statements(k.body))
    assert (seen.result[0].tolist(), seen.result[0].dtype) == ([True, False], torch.bool)
    assert seen.result[2].dtype is torch.int64


@pytest.mark.row("C6")
def test_short_reductions_are_written_out() -> None:
    def folds(seen: object) -> int:
        return sum(isinstance(s, Fold) for k in kernels(seen.plan.graph) for s in statements(k.body))  # type: ignore[attr-defined]

    short = chk(lambda x: (x * 2).sum(-1) + 1, torch.randn(32, 7))
    assert (short.K, short.X, folds(short)) == (1, 0, 0)
    nan = math.nan
    rows = torch.tensor([[1, nan, 5], [5, 5, 1], [-1, -2, -2]])
    kinds = chk(lambda x: (x.amax(1), x.argmax(1), x.argmin(1), x.var(1), x.prod(1), (x > 0).all(1)), rows)
    assert (kinds.K, folds(kinds)) == (1, 0)
    inner = chk(lambda x: x - x.mean(1, keepdim=True), torch.randn(20, 3))
    assert (inner.K, folds(inner)) == (1, 0)
    assert folds(chk(lambda x: (x * 2).sum(-1), torch.randn(32, 8))) == 1
    assert folds(chk(lambda x: (x * 2).sum(), torch.randn(7))) == 1


# how many parts ------------------------------------------------------------------------------------------------------

ROWS_132 = {
    (8192, 1): 1, (8193, 1): 2, (10_000, 1): 2, (10**6, 1): 123, (2**20, 1): 128, (2**23, 1): 1024, (10**7, 1): 489,
    (2**24, 1): 512, (2**26, 1): 512, (2**27, 1): 528, (2**28, 1): 2048, (65536, 16): 8, (65536, 263): 4,
    (65536, 264): 1,
}  # fmt: skip
COLUMNS_132 = {
    (33, 64): 1, (1024, 64): 8, (65536, 64): 512, (2**20, 64): 1024, (65536, 1024): 128, (4096, 4096): 32,
    (2**20, 4096): 512,
}  # fmt: skip


@pytest.mark.row("C7")
def test_parts_of_rows() -> None:
    big, small = Processor(132), Processor(108)
    assert {key: parts_of_row(*key, big) for key in ROWS_132} == ROWS_132
    assert [parts_of_row(n, 1, small) for n in (10**7, 2**26)] == [391, 432]
    before = graph_of("y: f32[]@cuda = reduce sum (; r0: 1048576) x[r0]", "x: f32[1048576]@cuda")
    first, second = reductions(cut(before, 132))
    assert (first.out.shape, first.out.dtype, first.raxes[0][1]) == ((128,), DType.F32, 8192)
    assert second.raxes[0][1] == 128
    assert len(kernels(fuse(cut(before, 132), context()))) == 2
    short = graph_of("y: f32[]@cuda = reduce sum (; r0: 8192) x[r0]", "x: f32[8192]@cuda")
    assert cut(short, 132) is short


@pytest.mark.row("C8")
def test_parts_of_columns() -> None:
    big = Processor(132)
    assert {key: parts_of_column(*key, big) for key in COLUMNS_132} == COLUMNS_132
    assert parts_of_column(2**20, 64, Processor(108)) == 863
    before = graph_of("y: f32[64]@cuda = reduce sum (i0: 64; r0: 65536) x[r0, i0]", "x: f32[65536, 64]@cuda")
    first, second = reductions(cut(before, 132))
    assert first.out.shape == (64, 512)
    assert first.out.stride == (1, 64)  # columns stay neighbours in memory
    assert len(kernels(fuse(cut(before, 132), context()))) == 2
    short = graph_of("y: f32[64]@cuda = reduce sum (i0: 64; r0: 33) x[r0, i0]", "x: f32[33, 64]@cuda")
    assert cut(short, 132) is short
    assert second.raxes[0][1] == 512


@pytest.mark.row("C9")
def test_what_is_not_cut() -> None:
    big = Processor(132)
    assert choose_parts(2**20, 1, Hint.INNER, CPU) == (Hint.DEFAULT, 1)
    assert choose_parts(32, 64, Hint.OUTER, big) == (Hint.DEFAULT, 1)
    assert choose_parts(2**20, 64 * 132, Hint.OUTER, big) == (Hint.DEFAULT, 1)
    assert choose_parts(2**20, 0, Hint.OUTER, big) == (Hint.DEFAULT, 1)
    on_cpu = graph_of("y: f32[] = reduce sum (; r0: 1048576) x[r0]", "x: f32[1048576]")
    assert cut(on_cpu, 132) is on_cpu
    backed = graph_of("y: f32[]@cuda = reduce sum (; r0: s0) x[r0]", "s0: size = 9000, x: f32[s0]@cuda")
    after = cut(backed, 132)
    assert len(reductions(after)) == 2
    for n in (9000, 8, 3, 1, 12345):
        x = torch.randn(n).double().round().float()
        for program in (after, fuse(after, context())):
            (got,) = run_reference([program], [[n, x]])[0]
            assert isinstance(got, Tensor)
            assert float(got) == float(x.sum())
    seen = chk(lambda x: x[x > 0].sum(), torch.randn(1000))
    assert all(len(k.outs) == 1 for k in kernels(seen.plan.graph))


@pytest.mark.row("C10")
def test_which_way_memory_runs() -> None:
    def runs(line: str, inputs: str = "x: f32[64, 128]@cuda, a: f32[64]@cuda, b: f32[128]@cuda") -> Hint:
        (node,) = reductions(graph_of(line, inputs))
        graph = graph_of(line, inputs)
        found = runs_along(graph, node)
        assert print_graph(graph) == print_graph(graph_of(line, inputs))  # asking changes nothing
        return found

    assert runs("y: f32[64]@cuda = reduce sum (i0: 64; r0: 128) x[i0, r0]") is Hint.INNER
    assert runs("y: f32[128]@cuda = reduce sum (i0: 128; r0: 64) x[r0, i0]") is Hint.OUTER
    transposed = "x: f32[128, 64]{1, 128}@cuda"
    assert runs("y: f32[128]@cuda = reduce sum (i0: 128; r0: 64) x[i0, r0]", transposed) is Hint.OUTER
    # broadcast operands count by the bytes they have, which lets outer products be cut
    assert runs("y: f32[64]@cuda = reduce sum (i0: 64; r0: 128) a[i0] * b[r0]") is Hint.INNER
    assert runs("y: f32[64]@cuda = reduce sum (i0: 64; r0: 64) x[i0, r0] + x[r0, i0]") is Hint.OUTER  # a tie
    assert runs("y: f32[64]@cuda = reduce sum (i0: 64; r0: 128) to_f32(index(r0 * i0))") is Hint.DEFAULT
    assert choose_parts(10**6, 4, Hint.DEFAULT, Processor(132)) == (Hint.DEFAULT, 1)


@pytest.mark.row("C11")
def test_a_reduction_of_everything_shares_the_kernel_of_its_rows() -> None:
    text = """\
    m: f32[1024, 1]@cuda = reduce max (i0: 1024, i1: 1; r0: 4096) x[i0, r0]
    e: f32[1024, 4096]@cuda = pointwise (i0: 1024, i1: 4096) exp(x[i0, i1] - m[i0, 0])
    y: f32[{kept}]@cuda = reduce sum ({axes}; r0: 1024, r1: 4096) e[r0, r1]
    """
    for kept, axes in (("", ""), ("1, 1", "i0: 1, i1: 1")):
        graph = graph_of(text.format(kept=kept, axes=axes), "x: f32[1024, 4096]@cuda")
        graph = inline_pointwise(simplify_graph(graph, context()), context())
        counts = {}
        for reuse in (True, False):
            after = cut(graph, 132, reuse)
            counts[reuse] = len(kernels(fuse(after, context())))
            parts = [node for node in reductions(after) if node.out.name.endswith("_part")]
            assert len(parts) == 1
            assert (parts[0].out.numel == 1024) is reuse
        assert counts[True] == counts[False] - 1 == 2


KINDS = ("sum", "prod", "max", "min", "any", "xor")


@pytest.mark.row("C12")
def test_ragged_and_empty_parts_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    long = graph_of("y: f32[]@cuda = reduce sum (; r0: 8193) x[r0]", "x: f32[8193]@cuda")
    after = cut(long, 132)
    assert [node.raxes[0][1] for node in reductions(after)] == [4097, 2]
    assert_same(long, after, torch.randint(-9, 9, (8193,)).float())
    monkeypatch.setattr("dcompile.schedule.stages.choose_parts", lambda *_: (Hint.INNER, 7))
    for kind in KINDS:
        dtype, torch_dtype = ("bool", torch.bool) if kind == "any" else ("i32", torch.int32)
        before = graph_of(f"y: {dtype}[]@cuda = reduce {kind} (; r0: 10) x[r0]", f"x: {dtype}[10]@cuda")
        stages = split_once(before)
        assert [node.raxes[0][1] for node in reductions(stages)] == [2, 7]
        assert_same(before, stages, torch.randint(1, 7, (10,)).to(torch_dtype))


def split_once(graph: Graph) -> Graph:
    """The reduction of ``graph`` cut once."""
    from dcompile.schedule import stages

    (node,) = reductions(graph)
    found = stages._cut(graph, node, context(), reuse=False)
    assert found is not None
    return graph.with_nodes(found).check()


@pytest.mark.row("C12")
def test_partial_results_of_16_bit_floats_are_32_bits() -> None:
    before = graph_of("y: bf16[]@cuda = reduce sum (; r0: 65536) to_f32(x[r0])", "x: bf16[65536]@cuda")
    after = cut(before, 132)
    first = reductions(after)[0]
    assert (first.out.dtype, first.out.shape) == (DType.F32, (8,))
    x = torch.ones(65536).mul(0.1).bfloat16()
    exact = float(x.double().sum())
    (got,) = run_reference([after], [[x]])[0]
    assert isinstance(got, Tensor)
    assert abs(float(got) - exact) <= abs(float(x.sum()) - exact)


@pytest.mark.row("C12")
def test_a_first_stage_may_be_cut_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([4, 3, 1, 1, 1])
    monkeypatch.setattr("dcompile.schedule.stages.choose_parts", lambda *_: (Hint.INNER, next(sizes)))
    before = graph_of("y: i64[2]@cuda = reduce sum (i0: 2; r0: 50, r1: 3) x[i0, r0, r1]", "x: i64[2, 50, 3]@cuda")
    after = cut(before)
    assert len(reductions(after)) == 3
    assert_same(before, after, torch.randint(0, 100, (2, 50, 3)))


@pytest.mark.row("C13")
def test_neutral_elements_change_nothing() -> None:
    dtypes = (DType.F32, DType.F64, DType.I64, DType.I32, DType.I8, DType.U8, DType.BOOL)
    for dtype, kind in itertools.product(dtypes, ("max", "min", "sum", "prod", "xor", "any")):
        if (kind == "any") != (dtype is DType.BOOL and kind == "any") or (kind == "xor" and dtype.is_float):
            continue
        (value,) = neutral(kind, dtype)
        size = 10
        line = f"y: {dtype.value}[]@cuda = reduce {kind} (; r0: {size}) x[r0]"
        before = graph_of(line, f"x: {dtype.value}[{size}]@cuda")
        low = 90 if kind == "min" or dtype is DType.U8 else -90  # far from zero on the side where zero would win
        x = torch.randint(low, low + 9, (size,)).to(dtype.torch)
        padded = torch.cat([x[:5], torch.full((5,), value.value, dtype=dtype.torch)])
        short = graph_of(line.replace("r0: 10", "r0: 5"), f"x: {dtype.value}[5]@cuda")
        want = run_reference([short], [[x[:5]]])[0][0]
        have = run_reference([before], [[padded]])[0][0]
        assert isinstance(want, Tensor)
        assert torch.equal(want, have), (kind, dtype)  # type: ignore[arg-type]
    assert (extreme(DType.I8, False), extreme(DType.U8, True), extreme(DType.BOOL, False)) == (-128, 255, False)
    assert [c.value for c in neutral("welford", DType.F32)] == [0.0, 0.0, 0.0]


@pytest.mark.row("C14")
def test_hints_of_second_stages_and_their_blocks() -> None:
    table = {
        (512, 512, Hint.OUTER): Hint.OUTER_TINY, (513, 512, Hint.OUTER): Hint.OUTER, (512, 513, Hint.OUTER): Hint.OUTER,
        (1024, 256, Hint.OUTER): Hint.OUTER_TINY, (1024, 257, Hint.OUTER): Hint.OUTER, (8, 1, Hint.INNER): Hint.INNER,
        (8, 8, Hint.DEFAULT): Hint.DEFAULT,
    }  # fmt: skip
    assert {key: second_stage_hint(*key) for key in table} == table
    row = graph_of("y: f32[4096]@cuda = reduce sum (i0: 4096; r0: 4096) x[i0, r0]", "x: f32[4096, 4096]@cuda")
    column = graph_of("y: f32[4096]@cuda = reduce sum (i0: 4096; r0: 4096) x[r0, i0]", "x: f32[4096, 4096]@cuda")
    launches = [choose_launch(kernels(fuse(g, context()))[0], {}) for g in (row, column)]
    assert launches[0].block < launches[1].block
    nests = [kernels(fuse(g, context()))[0].body[0] for g in (row, column)]
    assert [nest.roles[-1] for nest in nests if isinstance(nest, Nest)] == [Role.PARALLEL, Role.SIMD]
