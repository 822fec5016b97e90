"""Rows P: sizes that differ from call to call, sizes that depend on data, numbers read from tensors, checks of them.

The helper ``chk`` compiles once for all argument lists; ``len(graphs)`` says how often it was compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, tensor

import dcompile
from dcompile.analyse.dependence import is_legal, predecessors
from dcompile.collectives.text import parse_graph, print_graph
from dcompile.errors import CompilerBug
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Extern
from dcompile.ir.symbolic import is_check, learned
from dcompile.reference import run_reference
from tests.rows.check import Seen, chk

PRIVATE: dict[str, Any] = {"cache_dir": None}


@pytest.fixture(autouse=True)
def _capture_numbers() -> Iterator[None]:
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        yield


check: Any = torch._check


def bindings(seen: Seen) -> list[str]:
    """Names of the numbers each graph learns."""
    return [number.name for p in seen.plans for n in p.graph.nodes if isinstance(n, Extern) for number in n.binds]


# backed sizes


@pytest.mark.row("P1")
def test_one_program_serves_all_sizes() -> None:
    others = [(torch.randn(n, n + 1),) for n in (7, 1024, 3)]
    seen = chk(lambda x: torch.softmax(x[1:] * x.shape[0], -1).sum(0), torch.randn(5, 6), also=others, dynamic=True)
    assert len(seen.graphs) == 1


@pytest.mark.row("P1")
def test_size_one_and_broken_guards_compile_again() -> None:
    def two_ways(x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] > 100 else x + 2

    seen = chk(
        two_ways, torch.randn(5), also=[(torch.randn(200),), (torch.randn(300),), (torch.randn(1),)], dynamic=True
    )
    assert len(seen.graphs) == 3


@pytest.mark.row("P1")
def test_empty_tensors_of_a_dynamic_size() -> None:
    def empty(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.relu() + 1, x.sum(0)

    chk(empty, torch.randn(5, 3), also=[(torch.randn(9, 3),), (torch.randn(0, 3),)], dynamic=True)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.before(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.after(x))))


class Transformer(nn.Module):
    def __init__(self, words: int = 31, width: int = 16, length: int = 64) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.block, self.head = Block(width, 2), nn.Linear(width, words, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.words(text) + self.places(torch.arange(text.shape[1]))
        return self.head(self.block(x))


@pytest.mark.row("P1")
def test_a_transformer_trains_with_dynamic_batch_and_length() -> None:
    torch.compiler.reset()
    dcompile.reset_counters()
    model = Transformer()
    compiled = torch.compile(model, backend="dcompile", dynamic=True, options=PRIVATE)
    for batch, length in ((4, 16), (3, 9), (8, 64), (2, 33)):
        text = torch.randint(31, (batch, length))
        losses, gradients = [], []
        for function in (model, compiled):
            model.zero_grad()
            loss = F.cross_entropy(function(text)[:, :-1].flatten(0, 1), text[:, 1:].flatten())
            loss.backward()
            losses.append(loss.detach())
            gradients.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(losses[1], losses[0])
        torch.testing.assert_close(gradients[1], gradients[0])
    assert dcompile.counters().graphs == 2


@pytest.mark.row("P1")
def test_floats_computed_from_sizes() -> None:
    def scaled(x: Tensor) -> Tensor:
        return x.sum(0) * (1.0 / x.shape[0]) + x.shape[1] ** 0.5

    seen = chk(scaled, torch.randn(5, 3), also=[(torch.randn(9, 4),)], dynamic=True)
    assert (len(seen.graphs), seen.fallbacks) == (1, ())


@pytest.mark.row("P1")
@pytest.mark.parametrize("factor", [0.5, 1.5, 2.0])
def test_sizes_scaled_by_exact_fractions(factor: float) -> None:
    seen = chk(lambda x: x[: int(x.shape[0] * factor)] * 2, torch.randn(6), also=[(torch.randn(9),)], dynamic=True)
    assert len(seen.graphs) == 1


@pytest.mark.row("P1")
def test_a_dynamic_integer_argument_may_be_negative() -> None:
    def shifted(x: Tensor, n: int) -> Tensor:
        return x + n // 3 + n % 4

    chk(shifted, torch.randn(6), 5, also=[(torch.randn(6), -7), (torch.randn(6), -3)], dynamic=True)


# sizes that depend on data

MASK = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0])
DATA_SIZED: dict[str, tuple[Any, list[tuple[Any, ...]]]] = {
    "nonzero": (lambda x: (x.nonzero() * 2).sum(0), [(tensor([1, 0, 2]),), (tensor([0, 0, 0]),), (tensor([4, 4, 4]),)]),
    "mask": (lambda x: x[x > 0] * 2, [(MASK,), (MASK.abs(),), (-MASK.abs(),)]),
    "masked_select": (lambda x: x.masked_select(x > 0).sum() + 1, [(MASK,), (-MASK.abs(),)]),
    "unique": (
        lambda x: [a * 2 for a in torch.unique(x, return_counts=True)],
        [(tensor([1, 1, 2]),), (tensor([7, 7, 7]),)],
    ),
    "repeat_interleave": (
        lambda x, n: torch.repeat_interleave(x, n, 0).exp(),
        [(torch.ones(3, 2), tensor([1, 2, 3])), (torch.ones(3, 2), tensor([0, 0, 0]))],
    ),
    "where": (lambda x: x[torch.where(x > 0)] + 1, [(MASK,), (-MASK.abs(),)]),
    "matmul": (lambda x, w: x[x[:, 0] > 0] @ w, [(torch.randn(8, 4), torch.randn(4, 3))]),
    "layer_norm": (lambda x: F.layer_norm(x[x[:, 0] > 0], (4,)), [(torch.randn(8, 4),)]),
    "twice": (lambda x: torch.cat([x.nonzero(), x.nonzero() + 1]) * 3, [(tensor([1, 0, 2]),), (tensor([0, 0, 0]),)]),
}


@pytest.mark.row("P2")
@pytest.mark.parametrize("name", DATA_SIZED)
def test_results_whose_size_depends_on_data(name: str) -> None:
    function, calls = DATA_SIZED[name]
    seen = chk(function, *calls[0], also=calls[1:])
    assert len(seen.graphs) == 1
    assert seen.fallbacks == ()
    names = bindings(seen)
    assert names
    assert len(names) == len(set(names))


@pytest.mark.row("P2")
def test_two_results_of_one_unknown_size_define_it_once() -> None:
    seen = chk(lambda x: torch.unique(x, return_counts=True), tensor([3, 1, 3]), also=[(tensor([1, 2, 3]),)])
    assert len(bindings(seen)) == 1
    (call,) = [n for n in seen.plan.graph.nodes if isinstance(n, Extern) and n.binds]
    symbols = [out.shape[0] for out in call.outs if out is not None and out.shape[0] != 0]
    assert len(symbols) == 2
    assert len(set(symbols)) == 1


@pytest.mark.row("P2")
def test_gradients_through_a_boolean_mask() -> None:
    def loss(x: Tensor) -> Tensor:
        return (x[x > 0].exp() * 3).sum()

    values = [torch.randn(7, requires_grad=True) for _ in range(3)]
    seen = chk(loss, values[0], also=[(v,) for v in values[1:]], grad=True)
    assert len(seen.graphs) == 2


@pytest.mark.row("P2")
def test_split_by_numbers_from_a_tensor() -> None:
    def split(x: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.split(sizes.tolist())
        return a * 2, b + 1

    x = torch.randn(5, 3)
    seen = chk(split, x, tensor([2, 3]), also=[(x, tensor([0, 5])), (x, tensor([4, 1]))])
    assert len(seen.graphs) == 1
    compiled = torch.compile(split, backend="dcompile", options=PRIVATE)
    compiled(x, tensor([2, 3]))
    with pytest.raises(RuntimeError, match="u0 \\+ u1, 5"):
        compiled(x, tensor([2, 2]))


# uses


def item_program() -> Graph:
    return parse_graph("""
    graph g(x: i64[3], z: f32[4]) {
      s: i64[] = reduce sum (; r0: 3) x[r0]
      _ = extern aten._local_scalar_dense.default(%s) binds (u0 = 3 at 0)
      extern dcompile.check(u0, "<=", 9, "too big") effect
      t: f32[] = reduce sum (; r0: 4) z[r0]
      y: f32[u0] = pointwise (i0: u0) t[] + 1.0:f32
      return %y, u0
    }
    """)


@pytest.mark.row("P3")
def test_users_of_a_number_follow_the_call_that_learns_it_and_its_checks() -> None:
    graph = item_program()
    assert parse_graph(print_graph(graph)) == graph
    assert learned(graph) == {"u0": 1}
    before = predecessors(graph)
    assert before[4] == {1, 2, 3}
    assert before[2] == {1}
    assert is_legal(graph, (3, 0, 1, 2, 4))
    assert not is_legal(graph, (0, 3, 4, 1, 2)), "used before it is learned"
    assert not is_legal(graph, (0, 1, 3, 4, 2)), "used before it is checked"


@pytest.mark.row("P3")
def test_a_number_that_is_used_too_early_is_a_bug_with_its_name() -> None:
    graph = item_program()
    early = (graph.nodes[0], graph.nodes[3], graph.nodes[4], graph.nodes[1], graph.nodes[2])
    with pytest.raises(CompilerBug, match="uses u0 before"):
        graph.with_nodes(early).check()


@pytest.mark.row("P3")
def test_the_definer_stays_first_in_the_schedule() -> None:
    def sized(x: Tensor, z: Tensor) -> Tensor:
        n: Any = x.sum().item()
        return torch.zeros(n) + z.sum()

    seen = chk(sized, tensor([1, 2]), torch.randn(4), also=[(tensor([0, 0]), torch.randn(4))])
    graph = seen.plan.graph
    (at,) = learned(graph).values()
    users = [
        step.position for step in seen.schedule if "aten.full.default" in step.ops or "aten.add.Tensor" in step.ops
    ]
    assert users
    assert all(at < position for position in users)


# binding


@torch.library.custom_op("dcompile_tests::twice_nonzero", mutates_args=())
def twice_nonzero(x: Tensor) -> Tensor:
    found = x.nonzero()
    return torch.cat([found, found]).reshape(-1).float()


@twice_nonzero.register_fake
def _(x: Tensor) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty((2 * size,), dtype=torch.float32)


@pytest.mark.row("P4")
def test_a_size_inside_an_expression_is_solved_for() -> None:
    def doubled(x: Tensor) -> Tensor:
        y = twice_nonzero(x)
        return y.view(2, -1).sum(0) + 1

    seen = chk(doubled, tensor([1, 0, 5]), also=[(tensor([1, 2, 3]),), (tensor([0, 0, 0]),)])
    names = bindings(seen)
    assert len(names) == 1
    lines = [line for line in seen.host.splitlines() if line.strip().startswith(f"{names[0]} = ")]
    assert len(lines) == 1
    assert ".size(0) // 2" in lines[0]


@pytest.mark.row("P4")
def test_a_number_that_cannot_be_found_is_named() -> None:
    graph = parse_graph("""
    graph g(x: i64[3]) {
      y: f32[u0**2] = extern mylib.square.default(%x) binds (u0 = 3)
      return %y
    }
    """)
    with pytest.raises(CompilerBug, match="does not tell u0"):
        graph.check()


# items


@pytest.mark.row("P5")
def test_an_integer_in_shape_and_arithmetic_is_read_once() -> None:
    def several(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        n: Any = x.sum().item()
        return torch.arange(n) * 2, y * n + n // 2

    seen = chk(several, tensor([1, 3]), torch.randn(3), also=[(tensor([4, 5]), torch.randn(3))])
    assert seen.externs.count("aten._local_scalar_dense.default") == 1


@pytest.mark.row("P5")
def test_an_item_may_be_negative() -> None:
    def signed(x: Tensor, y: Tensor) -> Tensor:
        n: Any = x.sum().item()
        return y * n + n // 2 + n % 3

    chk(signed, tensor([1, -4]), torch.randn(3), also=[(tensor([7, 1]), torch.randn(3))])


@pytest.mark.row("P5")
def test_a_truth_in_arithmetic() -> None:
    def masked(x: Tensor) -> Tensor:
        return x * (x.sum() > 0).item()

    seen = chk(masked, torch.ones(4), also=[(-torch.ones(4),)])
    assert seen.externs.count("aten._local_scalar_dense.default") == 1


@pytest.mark.row("P5")
def test_a_float_is_not_read_back_for_arithmetic() -> None:
    seen = chk(lambda x: x * x.sum().item() + 1, torch.randn(4), also=[(torch.randn(4),)])
    assert seen.X == 0


@pytest.mark.row("P5")
def test_numbers_are_returned_as_numbers() -> None:
    def results(x: Tensor) -> tuple[Any, ...]:
        n: Any = x.sum().item()
        return x + 1, n, n * 2, x.double().mean().item(), (x.sum() > 0).item()

    chk(results, tensor([1, 2]), also=[(tensor([-7, 1]),)])


@pytest.mark.row("P5")
def test_a_float_item_where_the_library_wants_a_number() -> None:
    chk(lambda x, y: torch.renorm(x, 2, 0, y.sum().item()), torch.randn(4, 3), torch.rand(2))


# checks


def checked(x: Tensor) -> Tensor:
    n: Any = x.sum().item()
    check(n < 10, lambda: "n is too big")
    return x + 1


@pytest.mark.row("P6")
def test_a_check_of_an_unused_number_runs() -> None:
    seen = chk(checked, tensor([1, 2]))
    assert sum(is_check(node) for node in seen.plan.graph.nodes) == 1
    compiled = torch.compile(checked, backend="dcompile", options=PRIVATE)
    compiled(tensor([1, 2]))
    with pytest.raises(RuntimeError, match="n is too big"):
        compiled(tensor([10, 2]))
    torch.testing.assert_close(compiled(tensor([4, 5])), tensor([5, 6]))


@pytest.mark.row("P6")
def test_a_check_guards_the_reads_that_rely_on_it() -> None:
    def head(x: Tensor, count: Tensor) -> Tensor:
        n: Any = count.item()
        check(n >= 0)
        check(n <= x.shape[0], lambda: "longer than x")
        return x[:n].sum(0) + 1

    x = torch.randn(5, 3)
    seen = chk(head, x, tensor(2), also=[(x, tensor(0)), (x, tensor(5))])
    compiled = torch.compile(head, backend="dcompile", options=PRIVATE)
    compiled(x, tensor(3))
    with pytest.raises(RuntimeError, match="longer than x"):
        compiled(x, tensor(6))
    assert all(is_check(n) is False or n.has_effect for n in seen.plan.graph.nodes)


@pytest.mark.row("P6")
def test_an_assertion_on_a_tensor_runs() -> None:
    def asserted(x: Tensor) -> Tensor:
        torch._assert_async(x.sum() > 0, "not positive")
        return x + 1

    chk(asserted, torch.ones(3))
    compiled = torch.compile(asserted, backend="dcompile", options=PRIVATE)
    compiled(torch.ones(3))
    with pytest.raises(RuntimeError, match="not positive"):
        compiled(-torch.ones(3))


@pytest.mark.row("P6")
def test_the_reference_interpreter_runs_checks() -> None:
    graph = item_program()
    ((y, n),) = run_reference([graph], [[tensor([1, 2, 0]), torch.ones(4)]])
    assert n == 3
    torch.testing.assert_close(y, torch.full((3,), 5.0))
    with pytest.raises(RuntimeError, match="too big"):
        run_reference([graph], [[tensor([10, 2, 0]), torch.ones(4)]])
