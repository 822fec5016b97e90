"""Row Q1: ``torch.cond``. Each branch is a graph of its own, lowered and compiled once; the call names both."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dcompile.collectives.text import parse_graph, print_graph
from dcompile.errors import Unsupported
from dcompile.ir.nodes import calls_programs
from dcompile.lower import lower
from dcompile.pipeline import programs_of
from dcompile.reference import run_reference
from tests.rows.check import chk

UP, DOWN = torch.ones(4), -torch.ones(4)
cond: Any = torch.cond


def branches(x: Tensor) -> Tensor:
    found: Tensor = cond(x.sum() > 0, lambda x: x.sin() + 1, lambda x: (x * 2).cos(), (x,))
    return found * 2


@pytest.mark.row("Q1")
def test_both_branches_equal_eager_and_are_programs_of_their_own() -> None:
    seen = chk(branches, UP, also=[(DOWN,)])
    (built,) = seen.graphs
    assert [len(inner.kernels.calls) if inner.kernels else 0 for inner in built.inner] == [1, 1]
    assert seen.externs == ("dcompile.cond",)
    graph = seen.plan.graph
    assert parse_graph(print_graph(graph)) == graph
    assert len(list(programs_of(graph))) == 3


@pytest.mark.row("Q1")
def test_only_one_branch_runs() -> None:
    def watched(x: Tensor) -> Tensor:
        def good(x: Tensor) -> Tensor:
            return x + 1

        def bad(x: Tensor) -> Tensor:
            torch._assert_async(x.sum() > 0, "the other branch ran")
            return x - 1

        found: Tensor = cond(x.sum() > 0, good, bad, (x,))
        return found

    torch.compiler.reset()
    compiled = torch.compile(watched, backend="dcompile", options={"cache_dir": None})
    torch.testing.assert_close(compiled(UP), UP + 1)
    with pytest.raises(RuntimeError, match="the other branch ran"):
        compiled(DOWN)


@pytest.mark.row("Q1")
def test_conditions_inside_conditions() -> None:
    def nested(x: Tensor) -> Tensor:
        def positive(x: Tensor) -> Tensor:
            found: Tensor = cond(x.max() > 5, lambda x: x * 3, lambda x: x - 1, (x,))
            return found

        found: Tensor = cond(x.sum() > 0, positive, lambda x: x.exp(), (x,))
        return found

    seen = chk(nested, UP, also=[(DOWN,), (UP * 6,)])
    assert any(inner.inner for inner in seen.graphs[0].inner)


@pytest.mark.row("Q1")
def test_a_predicate_on_sizes() -> None:
    def sized(x: Tensor) -> Tensor:
        found: Tensor = cond(x.shape[0] > 3, lambda x: x.sin() + 1, lambda x: (x * 2).cos(), (x,))
        return found

    seen = chk(sized, torch.randn(5), also=[(torch.randn(3),), (torch.randn(4),)], dynamic=True)
    assert len(seen.graphs) == 1


WEIGHT = torch.randn(4, 4)


@pytest.mark.row("Q1")
def test_branches_take_constants_and_outer_tensors() -> None:
    def closures(x: Tensor) -> Tensor:
        def one(x: Tensor) -> Tensor:
            return x @ WEIGHT + torch.arange(4)

        found: Tensor = cond(x.sum() > 0, one, lambda x: x + tensor([1.0, 2, 3, 4]), (x,))
        return found

    chk(closures, UP, also=[(DOWN,)])


@pytest.mark.row("Q1")
def test_gradients_of_the_branch_that_ran() -> None:
    values = [v.clone().requires_grad_() for v in (UP, DOWN)]
    seen = chk(lambda x: branches(x).sum(), values[0], also=[(values[1],)], grad=True)
    assert len(seen.graphs) == 2


@pytest.mark.row("Q1")
def test_a_branch_that_returns_another_layout() -> None:
    """What torch's tracer lets through is copied into the layout of the conditional's result."""
    x = torch.randn(1, 4)

    def layouts(x: Tensor) -> Tensor:
        found: Tensor = cond(x.sum() > 0, lambda x: x.t().contiguous().t() + 1, lambda x: x * 2, (x,))
        return found

    chk(layouts, x.abs(), also=[(-x.abs(),)])


# what a branch may not return: torch's tracer refuses most of it, the lowering the rest, in both branches


def traced(when_true: Any, when_false: Any, *operands: Tensor) -> fx.GraphModule:
    """A graph with one conditional over hand-made branches."""

    def program(function: Any) -> fx.GraphModule:
        return make_fx(function, tracing_mode="fake")(*operands)

    graph = fx.Graph()
    module = torch.nn.Module()
    module.yes, module.no = program(when_true), program(when_false)
    with FakeTensorMode() as mode:
        values = [mode.from_tensor(t) for t in (tensor(True), *operands)]
        results = when_true(*values[1:])
    places = []
    for n, value in enumerate(values):
        places.append(graph.placeholder(f"a{n}"))
        places[-1].meta["val"] = value
    call = graph.call_function(
        torch.ops.higher_order.cond,
        (places[0], graph.get_attr("yes"), graph.get_attr("no"), tuple(places[1:])),
    )
    call.meta["val"] = tuple(results)
    call.meta["dcompile_source"] = "train.py:41"
    items = [graph.call_function(operator.getitem, (call, n)) for n in range(len(results))]
    for item, result in zip(items, results, strict=True):
        item.meta["val"] = result
    graph.output(tuple(items))
    return fx.GraphModule(module, graph)


ALIASES = {
    "operand": (lambda x: (x,), "memory of operand"),
    "view": (lambda x: (x.view(-1),), "memory of operand"),
}


@pytest.mark.row("Q1")
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("name", ALIASES)
def test_returning_an_operand_is_refused_in_both_branches(name: str, side: int) -> None:
    function, message = ALIASES[name]
    pair = [lambda x: (x + 1,), function]
    with pytest.raises(Unsupported, match=message):
        lower(traced(pair[1 - side], pair[side], UP), "inference")


@pytest.mark.row("Q1")
@pytest.mark.parametrize("side", [0, 1])
def test_returning_one_tensor_twice_is_refused_in_both_branches(side: int) -> None:
    def twice(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + 1
        return y, y

    pair = [lambda x: (x + 1, x + 2), twice]
    with pytest.raises(Unsupported, match=r"train.py:41.*another of its results"):
        lower(traced(pair[1 - side], pair[side], UP), "inference")


@pytest.mark.row("Q1")
def test_the_reference_interpreter_runs_the_same_branch() -> None:
    lowered = lower(traced(lambda x: (x + 1,), lambda x: (x * 2,), UP), "inference")
    assert parse_graph(print_graph(lowered.graph)) == lowered.graph
    assert any(calls_programs(node) for node in lowered.graph.nodes)
    for predicate, expected in ((True, DOWN + 1), (False, DOWN * 2)):
        ((found,),) = run_reference([lowered.graph], [[tensor(predicate), DOWN]])
        torch.testing.assert_close(found, expected)


@pytest.fixture
def two_fake_ranks() -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.row("Q1")
@pytest.mark.usefixtures("two_fake_ranks")
def test_a_collective_inside_a_branch_is_refused_by_name() -> None:
    functional = torch.distributed._functional_collectives

    def talking(x: Tensor) -> Tensor:
        def one(x: Tensor) -> Tensor:
            reduced: Tensor = functional.all_reduce(x + 1, "sum", dist.group.WORLD)
            return reduced * 2

        found: Tensor = cond(x.sum() > 0, one, lambda x: x * 2, (x,))
        return found

    torch.compiler.reset()
    with pytest.raises(Exception, match=r"test_q_cond.py.*all_reduce.* inside cond"):
        torch.compile(talking, backend="dcompile", options={"cache_dir": None})(UP)
