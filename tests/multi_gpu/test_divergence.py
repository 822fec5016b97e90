"""Ranks that part ways: nothing hangs, and the first difference is named long before the deadline of a wait.

All cases of a world share its ranks. Each has process groups of its own, because a group in which ranks have parted is
of no use afterwards. The last rank is the odd one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.multi_gpu.ranks import run_ranks

pytestmark = pytest.mark.multi_rank

DEADLINE_S = 200.0
"""Of every wait. A difference must be named in ``NAMED_S``, so a test that runs into this one fails."""

NAMED_S = 30.0


@dataclass
class Case:
    """One rank in one case.

    Attributes:
        rank, odd: of this process, and whether it is the one that does something else.
        groups: two process groups of all ranks, by name.
        cache: folder shared by the ranks.
    """

    rank: int
    odd: bool
    groups: list[str]
    cache: Path

    def compile(self, function: Callable[..., Any], **options: Any) -> Any:
        import dcompile

        torch.compiler.reset()
        return dcompile.compile(function, **{"cache_dir": self.cache, "deadline_s": DEADLINE_S, **options})


def reduced(x: Tensor, group: str, reduction: str = "sum") -> Tensor:
    """A library call and a collective: no C++ compiler has to run."""
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x @ x.t(), reduction, group))  # type: ignore[no-any-return]


def cold_and_warm_caches(case: Case) -> str:
    """Every rank but one finds the program in the cache; the odd one has an empty cache of its own."""
    import dcompile

    dcompile.reset_counters()
    x = torch.eye(3)
    first = case.compile(reduced)(x, case.groups[0])
    cold = dcompile.counters()
    again = case.compile(reduced, cache_dir=case.cache / f"rank{case.rank}" if case.odd else case.cache)(
        x, case.groups[0]
    )
    assert torch.equal(first, again)
    warm = dcompile.counters()
    return f"cold {cold.cache_misses} {cold.cache_hits} warm {warm.cache_misses} {warm.cache_hits}"


def one_rank_recompiles_for_another_shape(case: Case) -> str:
    run = case.compile(reduced, dynamic=False)
    run(torch.eye(3), case.groups[0])
    run(torch.eye(4 if case.odd else 3), case.groups[0])
    return "no error"


def one_rank_recompiles_into_the_same_launches(case: Case) -> str:
    run = case.compile(lambda x, n, group: reduced(x, group) @ torch.full((3, n), 2.0), dynamic=False)
    run(torch.eye(3), 2, case.groups[0])
    return f"shape {list(run(torch.eye(3), 5 if case.odd else 2, case.groups[0]).shape)}"


def shards_of_another_size(case: Case) -> str:
    run = case.compile(lambda x, group: reduced(x.t(), group), dynamic=False)
    rows = 5 if case.odd else 3
    return f"sum {run(torch.ones(rows, 2), case.groups[0])[0, 0].item():g}"


def a_graph_break_on_one_rank(case: Case) -> str:
    def program(x: Tensor, group: str) -> Tensor:
        x = reduced(x, group)
        if case.odd:
            torch._dynamo.graph_break()
        return reduced(x, group, "max")

    case.compile(program)(torch.eye(3), case.groups[0])
    return "no error"


def other_library_versions(case: Case) -> str:
    from dcompile.runtime import compiled

    kept = compiled.made_by
    if case.odd:
        compiled.made_by = lambda: kept().replace("with torch", "with torch 1.")  # type: ignore[assignment]
    try:
        case.compile(reduced)(torch.eye(3), case.groups[0])
    finally:
        compiled.made_by = kept
    return "no error"


def other_code(case: Case) -> str:
    reduction = "max" if case.odd else "sum"
    case.compile(lambda x, group: reduced(x, group, reduction))(torch.eye(3), case.groups[0])
    return "no error"


def another_branch(case: Case) -> str:
    """Both programs are known to all ranks; the odd one runs the second while the others run the first."""
    first, second = case.compile(reduced), case.groups[1]
    first(torch.eye(3), case.groups[0])
    first(torch.eye(3), second)
    first(torch.eye(3), second if case.odd else case.groups[0])
    return "no error"


CASES = (
    cold_and_warm_caches,
    one_rank_recompiles_for_another_shape,
    one_rank_recompiles_into_the_same_launches,
    shards_of_another_size,
    a_graph_break_on_one_rank,
    other_library_versions,
    other_code,
    another_branch,
)

Outcome = tuple[str, str, float]
"""Error type or "", message or result, seconds."""


def run_cases(rank: int, world: int, cache: str) -> dict[str, Outcome]:
    from dcompile.errors import DCompileError

    found: dict[str, Outcome] = {}
    for function in CASES:
        groups = [str(dist.new_group(range(world)).group_name) for _ in range(2)]
        case = Case(rank, rank == world - 1, groups, Path(cache))
        dist.barrier()
        began = time.monotonic()
        try:
            result = ("", function(case))
        except DCompileError as error:
            result = (type(error).__name__, str(error))
        found[function.__name__] = (*result, time.monotonic() - began)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def outcomes(request: pytest.FixtureRequest) -> dict[str, list[Outcome]]:
    with tempfile.TemporaryDirectory() as cache:
        ranks = run_ranks(run_cases, request.param, cache, world=request.param, deadline_s=280)
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def named(outcomes: list[Outcome], *parts: str) -> None:
    """Every rank raised ``Divergence`` in time, with these parts in its message."""
    for kind, message, seconds in outcomes:
        assert kind == "Divergence", message
        assert seconds < NAMED_S
        for part in parts:
            assert part in message


def odd(outcomes: list[Outcome]) -> str:
    return f"rank {len(outcomes) - 1}"


def test_a_program_is_compiled_by_one_rank(outcomes: dict[str, list[Outcome]]) -> None:
    texts = [text for _, text, _ in outcomes["cold_and_warm_caches"]]
    counts = [[int(word) for word in text.split() if word.isdigit()] for text in texts]
    assert sum(cold_misses for cold_misses, *_ in counts) == 1, texts
    assert all(misses + hits == 1 for misses, hits, *_ in counts)
    assert all(hits >= before for _, before, _, hits in counts)
    assert all(misses + hits == 2 for *_, misses, hits in counts)


def test_a_rank_that_recompiles_alone_is_named(outcomes: dict[str, list[Outcome]]) -> None:
    found = outcomes["one_rank_recompiles_for_another_shape"]
    named(found, odd(found), "has compiled", "f32[4, 4]", "waits for", "test_divergence.py")


def test_ranks_that_launch_the_same_go_on(outcomes: dict[str, list[Outcome]]) -> None:
    found = outcomes["one_rank_recompiles_into_the_same_launches"]
    assert [text for _, text, _ in found] == ["shape [3, 2]"] * (len(found) - 1) + ["shape [3, 5]"]
    found = outcomes["shards_of_another_size"]
    assert {text for _, text, _ in found} == {f"sum {3 * (len(found) - 1) + 5}"}


def test_a_graph_break_on_one_rank_is_named(outcomes: dict[str, list[Outcome]]) -> None:
    found = outcomes["a_graph_break_on_one_rank"]
    named(found, odd(found), "different programs", "(the program ends here)", "all_reduce.max")


def test_other_versions_and_other_code_are_named(outcomes: dict[str, list[Outcome]]) -> None:
    found = outcomes["other_library_versions"]
    named(found, odd(found), "compiled by dcompile", "with torch 1.", f"with torch {torch.__version__}")
    found = outcomes["other_code"]
    named(found, odd(found), "all_reduce.sum", "all_reduce.max")


def test_ranks_in_different_programs_they_all_know_are_named(outcomes: dict[str, list[Outcome]]) -> None:
    found = outcomes["another_branch"]
    named(found, odd(found), "wait for each other for ever", "number 2 of group")
