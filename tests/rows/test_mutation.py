"""Rows H and M, and those of L that write: mutation makes a new version of a value in the same storage.

There are no marker nodes: a step that writes names the operands it writes and defines their next versions, and
dependences go by storage. What a marker would order is ordered by that.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcompile.analyse.dependence import predecessors
from dcompile.backend import backend
from dcompile.collectives.text import parse_graph
from dcompile.ir.nodes import Extern
from dcompile.lower.storage import RESIZE
from dcompile.options import Options
from dcompile.pipeline import Built
from dcompile.plan import Home
from tests.rows import ops
from tests.rows.check import chk, memory, without_views

custom = torch.ops.dcompile_rows


@pytest.mark.row("A1")
def test_a_write_through_one_view_is_seen_through_all() -> None:
    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.view(-1)
        x.add_(1)
        return x, y

    seen = chk(program, torch.randn(4, 5))
    assert (seen.K, seen.X, seen.copies) == (1, 0, 0)
    moved = chk(lambda x: x.t(), torch.randn(4, 5))
    assert (moved.K, moved.X) == (0, 0)


@pytest.mark.row("H1")
def test_earlier_readers_keep_the_old_version() -> None:
    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        a = x + 1
        b = a * 2
        a.mul_(3)
        return a, b

    assert chk(program, torch.randn(6)).K == 1


@pytest.mark.row("H2")
def test_a_copy_into_a_tensor_comes_after_the_readers_of_what_it_held() -> None:
    def program(x: Tensor, z: Tensor) -> Tensor:
        y = x * 2
        x.copy_(z)
        return y

    seen = chk(program, torch.randn(6), torch.randn(6))
    assert seen.X == 0
    text = """graph g(x: f32[6], z: f32[6]) {
      y: f32[6] = pointwise (i0: 6) x[i0] * 2.0:f32
      x1: f32[6] = store set x (i0: 6) [i0] = z[i0]
      return %y }"""
    assert predecessors(parse_graph(text)) == (frozenset(), frozenset({0}))
    chk(lambda x, z: x.copy_(z), torch.randn(6), torch.randn(6, dtype=torch.float64))
    chk(lambda x, z: x.copy_(z) * 2, torch.randn(4, 6), torch.randn(6))


@pytest.mark.row("H3", "M3")
def test_an_op_that_writes_its_operand_stands_between_old_and_new_readers() -> None:
    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        old = x * 2
        custom.bump(x)
        return old, x + 1

    seen = chk(program, torch.randn(6))
    assert (seen.K, seen.X, seen.copies) == (2, 1, 0)  # the op writes the input itself
    before, call, after = without_views(seen.schedule)
    assert (before.kind, call.kind, after.kind) == ("kernel", "extern", "kernel")
    (old,), (new,) = call.mutates, call.makes
    assert old in before.reads
    assert new in after.reads
    assert new in call.aliases


@pytest.mark.row("H3", "L2")
def test_an_op_that_writes_two_of_three_operands() -> None:
    def program(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        old = a * b
        custom.two_of_three(a, b, c)
        return old, a + b

    seen = chk(program, torch.randn(6), torch.randn(6), torch.randn(6))
    before, call, after = without_views(seen.schedule)
    assert len(call.mutates) == 2
    assert set(call.mutates) <= set(before.reads)
    assert set(call.makes) <= set(after.reads)


@pytest.mark.row("L2")
def test_custom_ops_write_views_lists_and_temporaries() -> None:
    def program(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        a = y + 1
        custom.bump(x[1:3])
        custom.double_all([x, a])
        b = custom.halve(a, y)
        custom.fill_(y, 2.5)
        return a, b, y * 2

    seen = chk(program, torch.randn(6, 3), torch.randn(6, 3))
    assert seen.copies == 0
    assert len(seen.fallbacks) == 4


@pytest.mark.row("L2")
def test_a_value_that_is_still_needed_is_copied_before_it_is_written() -> None:
    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        a = x.exp()
        b = a.clone()
        custom.bump(b)
        return a, b

    chk(program, torch.randn(6))


@pytest.mark.row("L3", "U3")
def test_calls_that_write_stay_although_unused() -> None:
    def program(x: Tensor) -> Tensor:
        custom.bump(x * 2)
        custom.note(x)
        torch.sort(x)
        return x + 1

    ops.NOTED.clear()
    seen = chk(program, torch.randn(6))
    assert sorted(seen.externs) == ["dcompile_rows.bump.default", "dcompile_rows.note.default"]
    assert ops.NOTED == [6, 6]  # once in eager, once compiled


@pytest.mark.row("L3")
def test_calls_with_effects_stay_in_both_halves_of_a_training_step() -> None:
    def program(x: Tensor) -> Tensor:
        custom.bump((x * 2).detach())
        custom.note(x.detach())
        return (x.sin() * 2).sum()

    seen = chk(program, torch.randn(6, requires_grad=True), grad=True)
    assert sorted(seen.externs) == ["dcompile_rows.bump.default", "dcompile_rows.note.default"]


@pytest.mark.row("H4")
def test_memory_lives_as_long_as_anything_that_shares_it() -> None:
    def program(x: Tensor) -> Tensor:
        base = torch.mm(x, x)
        view = base.t()[1:]
        other = torch.mm(x, x + 1)
        return torch.mm(view, other).sum(0)

    seen = chk(program, torch.randn(5, 5), rtol=1e-4, atol=1e-4)
    last = {}
    for step in seen.schedule:
        for name in step.reads:
            last[seen.plan.slots[name].storage] = step.position
    for event in seen.memory:
        if event.what == "free":
            assert event.position == last.get(event.name, event.position)


@pytest.mark.row("H5", "I4")
def test_what_is_mutated_is_read_from_memory() -> None:
    def program(i: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.zeros(4)
        a[i] = 1
        return a * 2, torch.zeros(4) + 3

    chk(program, torch.tensor([2]))


@pytest.mark.row("G10", "H2")
def test_a_slice_is_written_in_place() -> None:
    def program(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        x[:, 1:3].add_(y)
        x[0] = z
        x.diagonal().mul_(2)
        return x.sum()

    seen = chk(program, torch.randn(4, 6), torch.randn(4, 2), torch.randn(6), rtol=1e-4)
    assert (seen.X, seen.copies) == (0, 0)
    assert not [e for e in seen.memory if e.what == "allocate" and seen.plan.storages[e.name].nbytes == 96]


@pytest.mark.row("M1")
def test_random_numbers_drawn_into_a_tensor() -> None:
    chk(lambda x, y: (x.bernoulli_(1.0) + 1, y.bernoulli_(0.0) - 1), torch.randn(50), torch.randn(50))

    def half(x: Tensor) -> tuple[Tensor, Tensor]:
        old = x.sum()
        x.bernoulli_(0.5)
        return old, x * 2

    # drawn by the compiler's own generator: eager's numbers come only from eager's op
    seen = chk(half, torch.randn(64), eager_ops={"bernoulli", "bernoulli_"}, seed=3, rtol=1e-4)
    assert seen.X == 1
    torch.compiler.reset()
    compiled = torch.compile(half, backend="dcompile")
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(compiled(torch.randn(64))[1])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert set(drawn[0].tolist()) == {0.0, 2.0}


@pytest.mark.row("M2")
def test_complex_tensors_are_copied_by_the_library() -> None:
    def program(d: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        old = d.real * 2
        d.copy_(s)
        return old, d.real + 1

    z = torch.randn(6, dtype=torch.complex64)
    seen = chk(program, z, torch.randn(6, dtype=torch.complex64))
    assert "aten.copy_.default" in seen.externs


@pytest.mark.row("L9")
def test_complex_tensors_seen_as_real_share_their_storage() -> None:
    def program(z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        torch.view_as_real(z).mul_(2)
        return z, torch.view_as_real(w * 2)

    chk(program, torch.randn(6, dtype=torch.complex64), torch.randn(3, dtype=torch.complex64))


REDUCES = ["sum", "prod", "mean", "amax", "amin"]


@pytest.mark.row("M5")
@pytest.mark.parametrize("reduce", REDUCES)
def test_scatter_reduce_in_place(reduce: str) -> None:
    def program(x: Tensor, y: Tensor, i: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        x.scatter_reduce_(0, i, v, reduce, include_self=True)
        y.scatter_reduce_(1, i, v, reduce, include_self=False)
        return x, y * 2

    chk(program, torch.randn(5, 3), torch.randn(5, 5), torch.randint(0, 3, (4, 3)), torch.randn(4, 3))


@pytest.mark.row("M5")
def test_scatter_in_place() -> None:
    def program(x: Tensor, i: Tensor, v: Tensor, flat: Tensor, j: Tensor) -> tuple[Tensor, ...]:
        x.scatter_(0, i, v)
        flat.scatter_(0, j, 1.5)
        flat.scatter_(0, j, flat[:3] * 2, reduce="add")
        flat.scatter_(0, j, 3.0, reduce="multiply")
        return x + 1, flat

    places = torch.stack([torch.randperm(5)[:4] for _ in range(3)], 1)
    seen = chk(program, torch.randn(5, 3), places, torch.randn(4, 3), torch.randn(9), torch.tensor([7, 0, 4]))
    assert seen.copies == 0
    alone = chk(lambda x, i, v: x.scatter_(0, i, v), torch.randn(5, 3), places, torch.randn(4, 3))
    assert (alone.K, alone.X, alone.memory) == (1, 0, ())


@pytest.mark.row("M6")
def test_index_put_in_place() -> None:
    def program(x: Tensor, y: Tensor, i: Tensor, j: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        x[:, i] = v
        x[j, :, i] = 2.0
        y[y > 0] = -1.0
        y.index_put_((j,), y[0] * 2, accumulate=True)
        return x * 2, y

    i, j = torch.tensor([1, 3]), torch.tensor([2, 2])
    seen = chk(program, torch.randn(4, 5, 5), torch.randn(6, 3), i, j, torch.randn(4, 2, 5))
    assert seen.copies == 0
    alone = chk(lambda x, i, v: x.index_put_((i,), v, accumulate=True), torch.randn(5), j, torch.randn(2))
    assert (alone.K, alone.X, alone.memory) == (1, 0, ())


@pytest.mark.row("H2", "M6")
def test_writes_that_read_what_they_overwrite() -> None:
    def program(x: Tensor, y: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        x[1:] = x[:-1].clone()
        y[i] = y[:3].clone() * 2
        return x, y + 1

    chk(program, torch.randn(9), torch.randn(6, 2), torch.tensor([5, 0, 3]))


@pytest.mark.row("H1", "M6")
def test_old_versions_read_later_are_kept() -> None:
    def program(x: Tensor, i: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        old = x.clone()
        view = x.t()
        x[i] = v
        return old, view * 2, (x + old).sum(0)

    chk(program, torch.randn(5, 3), torch.tensor([1, 4]), torch.randn(2, 3))


def _without_bytes(*shape: int) -> Tensor:
    tensor = torch.empty(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.row("M4", "U2")
def test_a_gathered_parameter_gives_up_its_bytes_after_its_use() -> None:
    def program(shard: Tensor, full: Tensor, x: Tensor) -> Tensor:
        full.untyped_storage().resize_(full.numel() * full.itemsize)
        full.copy_(torch.cat([shard, shard * 2]))  # stands for the gather
        y = torch.mm(x, full)
        full.untyped_storage().resize_(0)
        return y.relu()

    # compared by hand: a copy of a tensor without bytes cannot be made
    shard, x, full = torch.randn(4, 3), torch.randn(5, 8), _without_bytes(8, 3)
    seen: list[Built] = []
    torch.compiler.reset()
    compiled = torch.compile(program, backend=backend(Options.from_env({"cache_dir": None}), seen.append))
    for _ in range(2):
        found = compiled(shard, full, x)
        assert full.untyped_storage().nbytes() == 0
        torch.testing.assert_close(found, torch.mm(x, torch.cat([shard, shard * 2])).relu())
    plan = seen[0].plan
    assert plan is not None
    resized = [node for node in plan.graph.nodes if isinstance(node, Extern) and node.op == RESIZE]
    assert [node.args[1] for node in resized] == [96, 0]
    name = resized[0].args[0].name
    assert plan.storages[plan.slots[name].storage].home is Home.INPUT
    assert name not in {event.name for event in memory(plan)}


@pytest.mark.row("M4")
def test_storages_are_resized_to_symbolic_sizes() -> None:
    def program(x: Tensor, full: Tensor) -> Tensor:
        full.untyped_storage().resize_(x.shape[0] * 12)
        full.copy_(x)
        y = full * 2
        x.untyped_storage().resize_(0)
        return y

    torch.compiler.reset()
    compiled = torch.compile(program, backend=backend(Options.from_env({"cache_dir": None})), dynamic=True)
    for rows in (8, 5):
        x, full = torch.randn(rows, 3), _without_bytes(rows, 3)
        expected = x.clone()
        torch.testing.assert_close(compiled(x, full), expected * 2)
        assert (x.untyped_storage().nbytes(), full.untyped_storage().nbytes()) == (0, rows * 12)
        torch.testing.assert_close(full, expected)


@pytest.mark.row("M4")
def test_memory_of_the_programs_own_is_given_back_by_the_plan() -> None:
    def program(x: Tensor, w: Tensor) -> Tensor:
        y = torch.mm(x, w)
        z = torch.mm(y, w)
        y.untyped_storage().resize_(0)
        return torch.mm(z, w)

    assert RESIZE not in chk(program, torch.randn(4, 4), torch.randn(4, 4), rtol=1e-4, atol=1e-4).externs
