"""Rows S and T on two ranks: every kind of collective, compiled, against eager on each rank."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.multi_gpu.ranks import run_ranks

pytestmark = pytest.mark.multi_rank

Program = Callable[..., Any]


def _rows_from(sizes: Tensor, x: Tensor, group: Any) -> Any:
    """Shares whose sizes are known at run time only, sent and sent back."""
    import torch.distributed._functional_collectives as fc

    sent = sizes.tolist()
    for rows in sent:
        torch._check(rows >= 0)
    got = fc.all_to_all_single(sizes, None, None, group).tolist()
    for rows in got:
        torch._check(rows >= 0)
    there = fc.all_to_all_single(x[: sum(sent)] * 2, got, sent, group)
    return fc.all_to_all_single(there + 1, sent, got, group)


def _programs(rank: int) -> dict[str, tuple[Any, ...]]:
    """Each program with its arguments on this rank, and what to run in eager where that is another one."""
    import torch.distributed._functional_collectives as fc

    ops, wait, group = torch.ops._c10d_functional, torch.ops._c10d_functional.wait_tensor, dist.group.WORLD
    name = group.group_name
    torch.manual_seed(rank)
    x = torch.randn(6, 4)
    rows = [[2, 4], [1, 5]]
    mine, theirs = rows[rank], [row[rank] for row in rows]

    def uneven(t: Tensor) -> Any:
        return fc.all_to_all_single(t * 2, theirs, mine, group) + 1

    def permute(t: Tensor) -> Any:
        return fc.permute_tensor(t.sin(), [1, 0], group) * 2

    def old_generation(t: Tensor) -> Any:
        old = torch.ops.c10d_functional
        total = old.wait_tensor(old.all_reduce(t + 1, "sum", "", [0, 1], 2))
        both = old.wait_tensor(old.all_gather_into_tensor(t[0], "", [0, 1], 2))
        half = old.wait_tensor(old.reduce_scatter_tensor(t * 2, "sum", "", [0, 1], 2))
        several = [old.wait_tensor(p) for p in old.all_reduce_coalesced([t[0] * 3, t[1] + 2], "sum", "", [0, 1], 2)]
        return total, both, half, several

    def in_place_views(t: Tensor) -> Any:
        t = t.clone()
        part = t[2:4]
        dist.all_reduce(part)
        dist.all_reduce(t.view(-1)[:4], op=dist.ReduceOp.MAX)
        before = t * 2
        wait(ops.broadcast_(t[5], 1, name))
        return t + 1, before

    def kept(t: Tensor) -> Any:
        ops.all_reduce(t * 2, "sum", name)  # never waited for
        gathered = t.new_empty(12, 4)
        dist.all_gather_into_tensor(gathered, t.t().contiguous().t())
        return gathered * 2, t - 1

    def bools_eagerly(t: Tensor) -> Any:  # gloo itself moves neither bool nor int16
        flags, short = (t > 0).int(), (t * 4).to(torch.int16).int()
        everyone = wait(ops.all_gather_into_tensor(flags, 2, name))
        either = wait(ops.all_reduce(flags, "max", name))
        counts = wait(ops.all_reduce(short, "sum", name))
        return everyone.bool(), either.bool(), counts.to(torch.int16)

    def bools(t: Tensor) -> Any:
        flags, short = t > 0, (t * 4).to(torch.int16)
        everyone = wait(ops.all_gather_into_tensor(flags, 2, name))
        either = wait(ops.all_reduce(flags, "max", name))
        counts = wait(ops.all_reduce(short, "sum", name))
        return everyone, either.clone(), counts

    def empty(t: Tensor) -> Any:
        none = t[:0] * 2
        a = wait(ops.all_reduce(none, "sum", name)) + 1
        b = wait(ops.all_gather_into_tensor(none, 2, name)) + 1
        return a, b, t * 2

    def through_views(t: Tensor) -> Any:
        pending = ops.all_reduce(t + 1, "sum", name)
        view = pending.view(4, 6)[1:]
        done = wait(view)
        return done * 2, t @ t.t()

    def loss(t: Tensor) -> Any:
        shares = fc.all_to_all_single_autograd(t.tanh(), theirs, mine, group)
        whole = fc.all_gather_tensor_autograd(t[:2].sin(), 0, group)
        part = fc.reduce_scatter_tensor_autograd(t.exp(), "sum", 0, group)
        return (shares * shares).sum() + (whole**3).sum() + part.cos().sum()

    return {
        "uneven": (uneven, (x,)),
        "permute": (permute, (x.flatten(),)),
        "old generation": (old_generation, (x,)),
        "in place on views": (in_place_views, (x,)),
        "never waited": (kept, (x,)),
        "bool and int16": (bools, (x,), bools_eagerly),
        "empty": (empty, (x,)),
        "through views": (through_views, (x,)),
        "sizes from data": (_rows_from, (torch.tensor([rank + 1, 3 - rank]), x, name)),
        "autograd": (loss, (x.clone().requires_grad_(),)),
        "half": (uneven, (x.bfloat16(),)),
        "float16": (permute, (x.flatten().half(),)),
    }


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _gradients(arguments: tuple[Any, ...], result: Any) -> list[Any]:
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.requires_grad:
            result.backward()
            return [argument.grad]
    return []


def _compare(rank: int) -> dict[str, Any]:
    import dcompile

    torch._dynamo.config.capture_scalar_outputs = True
    found: dict[str, Any] = {}
    for name, (program, arguments, *eager) in _programs(rank).items():
        sides = []
        compiled = dcompile.compile(program, cache_dir=tempfile.mkdtemp())
        for run in (*(eager or [program]), compiled):
            mine = pytree.tree_map_only(Tensor, _copy, arguments)
            try:
                result = run(*mine)
                sides.append([t.detach() for t in pytree.tree_leaves(result)] + _gradients(mine, result))
            except Exception as error:
                sides.append(f"{type(error).__name__}: {error}")
        found[name] = sides
        torch._dynamo.reset()
    return found


@pytest.mark.row("S1", "S2", "S4", "S5", "S6", "S7", "S8", "S9", "S12", "S13", "T1", "T4")
def test_every_kind_of_collective_gives_eagers_result_on_each_rank() -> None:
    for rank, found in enumerate(run_ranks(_compare, deadline_s=240)):
        for name, (expected, got) in found.items():
            assert not isinstance(got, str), f"{name} on rank {rank}: {got}"
            assert not isinstance(expected, str), f"{name} on rank {rank}, eager: {expected}"
            assert len(got) == len(expected), name
            for a, b in zip(got, expected, strict=True):
                assert (a.dtype, a.shape) == (b.dtype, b.shape), name
                torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
