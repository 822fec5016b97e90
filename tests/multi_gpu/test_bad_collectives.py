"""Collectives that cannot work, on two ranks: every rank concerned gets an error with ranks and the user's line in it,
in seconds; where nothing was launched the ranks can go on together afterwards."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.multi_gpu.ranks import drill, run_ranks

pytestmark = pytest.mark.multi_rank

Outcome = tuple[str, str, float]
"""Type of the error or "", its text or the result's, seconds."""

DEADLINE_S = 6.0
IN_TIME_S = 25.0
"""A compile, the deadline, and a busy machine."""


def _reduced(x: Tensor) -> Tensor:
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x * 2, "sum", dist.group.WORLD.group_name)) + 1  # type: ignore[no-any-return]


def shapes(rank: int, name: str) -> Any:
    return _reduced, torch.ones(3 + rank)


def dtypes(rank: int, name: str) -> Any:
    return _reduced, torch.ones(3, dtype=torch.float64 if rank else torch.float32)


def skips(rank: int, name: str) -> Any:
    """Rank 1 computes without the collective: it needs nobody, and rank 0 waits for it in vain."""
    return (lambda x: x.sin() if rank else _reduced(x)), torch.ones(3)


def one_less(rank: int, name: str) -> Any:
    def program(x: Tensor) -> Tensor:
        return _reduced(x) if rank else _reduced(_reduced(x))

    return program, torch.ones(3)


def not_a_member(rank: int, name: str) -> Any:
    """A group of rank 0 alone, used by both."""
    ops = torch.ops._c10d_functional
    return (lambda x: ops.wait_tensor(ops.all_reduce(x.exp(), "sum", name))), torch.ones(3)


def wait_on_an_input(rank: int, name: str) -> Any:
    """Nothing to wait for: the tensor itself."""
    ops = torch.ops._c10d_functional
    return (lambda x: ops.wait_tensor(x) * 3), torch.ones(3) * rank


def unwaited(rank: int, name: str) -> Any:
    """The result is read before the user waits for it: the program waits for it first."""
    ops, world = torch.ops._c10d_functional, dist.group.WORLD.group_name

    def program(x: Tensor) -> Any:
        pending = ops.all_reduce(x * 2, "sum", world)
        early = pending + 1
        return early, ops.wait_tensor(pending)

    return program, torch.ones(3)


def in_place_unwaited(rank: int, name: str) -> Any:
    ops, world = torch.ops._c10d_functional, dist.group.WORLD.group_name

    def program(x: Tensor) -> Any:
        y = x * 2
        pending = ops.all_reduce_(y, "sum", world)
        early = y + 1
        return early, ops.wait_tensor(pending)

    return program, torch.ones(3)


CASES: tuple[Callable[[int, str], Any], ...] = (
    shapes, dtypes, one_less, not_a_member, wait_on_an_input, unwaited, in_place_unwaited,
)  # fmt: skip


def _run(rank: int) -> dict[str, Outcome]:
    import dcompile

    found = {}
    for case in CASES:
        alone = dist.new_group([0])
        names = [str(alone.group_name) if rank == 0 else ""]
        dist.broadcast_object_list(names, 0)
        program, x = case(rank, names[0])
        torch.compiler.reset()
        dist.barrier()
        began = time.monotonic()
        try:
            options = {"cache_dir": tempfile.mkdtemp(), "deadline_s": DEADLINE_S}
            found[case.__name__] = ("", str(dcompile.compile(program, **options)(x)), time.monotonic() - began)
        except Exception as error:
            found[case.__name__] = (type(error).__name__, str(error), time.monotonic() - began)
        dist.barrier()
    return found


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, Outcome]]:
    return run_ranks(_run, deadline_s=120)


@pytest.mark.parametrize(
    ("case", "difference"),
    [
        ("shapes", ("(f32[3])", "(f32[4])")),
        ("dtypes", ("(f32[3])", "(f64[3])")),
        ("one_less", ("(f32[3])", "(the program ends here)")),
    ],
)
def test_ranks_that_launch_different_things_are_told_the_first_difference(
    outcomes: list[dict[str, Outcome]], case: str, difference: tuple[str, str]
) -> None:
    for found in outcomes:
        kind, text, seconds = found[case]
        assert kind == "Divergence"
        assert seconds < IN_TIME_S
        for part in ("rank 0", "rank 1", "test_bad_collectives.py", *difference):
            assert part in text


def test_a_group_without_this_rank_is_named_where_it_is_not(outcomes: list[dict[str, Outcome]]) -> None:
    assert outcomes[0]["not_a_member"][0] == ""
    _, text, seconds = outcomes[1]["not_a_member"]
    for part in ("process group", "does not exist on rank 1", "test_bad_collectives.py"):
        assert part in text
    assert seconds < IN_TIME_S


def test_a_wait_on_an_input_waits_for_nothing(outcomes: list[dict[str, Outcome]]) -> None:
    for rank, found in enumerate(outcomes):
        assert found["wait_on_an_input"][:2] == ("", str(torch.ones(3) * rank * 3))


@pytest.mark.parametrize("case", ["unwaited", "in_place_unwaited"])
def test_a_result_read_before_its_wait_is_the_result(outcomes: list[dict[str, Outcome]], case: str) -> None:
    for found in outcomes:
        assert found[case][:2] == ("", str((torch.full((3,), 5.0), torch.full((3,), 4.0))))


def _skips(rank: int) -> str:
    import dcompile
    from dcompile.errors import DCompileError

    program, x = skips(rank, "")
    compiled = dcompile.compile(program, cache_dir=tempfile.mkdtemp(), deadline_s=DEADLINE_S)
    try:
        return str(compiled(x))
    except DCompileError as error:
        return f"{type(error).__name__}: {error}"


def test_a_rank_that_skips_a_collective_is_named_after_the_deadline() -> None:
    waiting, skipping = drill(_skips, deadline_s=60.0)
    assert waiting.seconds < IN_TIME_S + DEADLINE_S
    for part in ("DeadlineExceeded: ", "rank 0", "rank 1", "test_bad_collectives.py", f"within {DEADLINE_S:g} s"):
        assert part in str(waiting.result)
    assert skipping.result == str(torch.ones(3).sin())
