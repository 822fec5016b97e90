"""Several tensors of one collective: one launch on the tensors themselves where the backend groups launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from dcompile.runtime import coalesced, kinds
from dcompile.runtime.kinds import LAUNCHES, Launched, Request

RANKS = 2


class Done:
    """A work that has ended."""

    def wait(self) -> None:
        """Nothing is left to wait for."""


class Group:
    """A process group of equal ranks: what every rank sends is what this one sends."""

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.addresses: set[int] = set()

    def allreduce_coalesced(self, tensors: list[torch.Tensor], options: Any) -> Done:
        self._launch("all_reduce", options, tensors)
        for tensor in tensors:
            tensor.mul_(RANKS if options.reduceOp == dist.ReduceOp.SUM else 1)
        return Done()

    def allgather_into_tensor_coalesced(
        self, results: list[torch.Tensor], sources: list[torch.Tensor], options: Any
    ) -> Done:
        self._launch("all_gather", options, results, sources)
        for result, source in zip(results, sources, strict=True):
            torch.add(source, 0, out=result.view(RANKS, -1)[0]), torch.add(source, 0, out=result.view(RANKS, -1)[1])
        return Done()

    def reduce_scatter_tensor_coalesced(
        self, results: list[torch.Tensor], sources: list[torch.Tensor], options: Any
    ) -> Done:
        self._launch("reduce_scatter", options, results, sources)
        for result, source in zip(results, sources, strict=True):
            torch.mul(source.view(RANKS, -1)[0], RANKS if options.reduceOp == dist.ReduceOp.SUM else 1, out=result)
        return Done()

    def _launch(self, kind: str, options: Any, *lists: list[torch.Tensor]) -> None:
        assert options.asyncOp
        self.launches.append(kind)
        self.addresses |= {tensor.data_ptr() for tensors in lists for tensor in tensors}


class Copies(TorchDispatchMode):
    """Counts what copies tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("copy_", "cat", "clone", "_to_copy")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    monkeypatch.setattr(coalesced, "groups_launches", lambda *_: True)
    return Group()


def launch(
    kind: str, group: Group, sources: list[torch.Tensor], results: list[torch.Tensor], reduction: str | None = None
) -> tuple[Launched, int]:
    """The launch and how many copies it and its end made."""
    launched = Launched()
    request = Request(group, 0, RANKS, reduction, None, results is sources)  # type: ignore[arg-type]
    with Copies() as copies:
        LAUNCHES[kind](launched, sources, results, request)
        for step in launched.finish:
            step()
    return launched, copies.count


SHAPES = ((4, 3), (2,), (6, 2, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_gather_lands_where_the_plan_wants_it(group: Group, dtype: torch.dtype) -> None:
    sources = [torch.randn(s).mul(9).to(dtype) for s in SHAPES]
    results = [torch.empty(s[0] * RANKS, *s[1:], dtype=dtype) for s in SHAPES]
    launched, copies = launch("all_gather", group, sources, results)
    assert (group.launches, len(launched.works), copies) == (["all_gather"], 1, 0)
    assert group.addresses == {t.data_ptr() for t in (*sources, *results)}
    for source, result in zip(sources, results, strict=True):
        assert torch.equal(result, torch.cat([source, source]))


@pytest.mark.parametrize(("reduction", "factor"), [("sum", RANKS), ("avg", 1)])
@pytest.mark.parametrize("kind", ["reduce_scatter", "all_reduce"])
def test_reductions_average_in_the_backend_and_copy_nothing(
    group: Group, kind: str, reduction: str, factor: int
) -> None:
    sources = [torch.randn(s) for s in SHAPES]
    before = [s.clone() for s in sources]
    results = sources if kind == "all_reduce" else [torch.empty(s[0] // RANKS, *s[1:]) for s in SHAPES]
    launched, copies = launch(kind, group, sources, results, reduction)
    assert (group.launches, len(launched.works), copies) == ([kind], 1, 0)
    for source, result in zip(before, results, strict=True):
        torch.testing.assert_close(result, source[: result.shape[0]] * factor)


def test_what_is_not_contiguous_goes_through_one_flat_buffer(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.Tensor] = []

    def gather(output: torch.Tensor, source: torch.Tensor, group: object) -> Done:
        sent.append(source.clone())
        output.copy_(torch.cat([source, source]))
        return Done()

    monkeypatch.setattr(kinds, "_gather_single", gather)
    sources = [torch.randn(3, 4).t(), torch.randn(2)]
    results = [torch.empty(8, 3), torch.empty(4)]
    launch("all_gather", group, sources, results)
    assert group.launches == []
    assert len(sent) == 1
    for source, result in zip(sources, results, strict=True):
        assert torch.equal(result, torch.cat([source, source]))


def test_an_empty_tensor_is_not_sent(group: Group) -> None:
    sources = [torch.randn(2, 3), torch.empty(0, 3), torch.randn(4)]
    results = [torch.empty(4, 3), torch.empty(0, 3), torch.empty(8)]
    launch("all_gather", group, sources, results)
    assert group.launches == ["all_gather"]
    assert group.addresses == {t.data_ptr() for t in (*sources, *results) if t.numel()}
