"""Collectives at run time: ``start`` launches, ``wait`` ends, with a deadline, on any ``torch.distributed`` backend.

Results land in the memory the plan gave them. Generated programs receive a ``Communicator``, so that tests can put
another one in its place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from dcompile.errors import CompilerBug, DCompileError, DeadlineExceeded, Unsupported
from dcompile.runtime import flat as fl


class Handle:
    """A collective in flight.

    Attributes:
        name: for messages: the pending's name, kind and source line.
        works: ``torch.distributed`` works to wait for.
        finish: what is left to do after the works are done (copies into planned memory, division for averages).
        keep: tensors that must stay alive until then.
        on_cuda: waiting orders the current stream instead of blocking the host.
    """

    __slots__ = ("finish", "group", "keep", "name", "on_cuda", "works")

    def __init__(self, name: str, group: str) -> None:
        self.name = name
        self.group = group
        self.works: list[Any] = []
        self.finish: list[Callable[[], object]] = []
        self.keep: tuple[Any, ...] = ()
        self.on_cuda = False

    def done(self) -> None:
        """Forget everything that was kept for the flight."""
        self.works, self.finish, self.keep = [], [], ()

    def when_done(self, report: Callable[[], None]) -> None:
        """Call ``report`` once, from any thread, when the communication (not the wait) is over."""
        if self.works:
            self.works[-1].get_future().then(lambda _: report())
        else:
            report()


class Communicator(Protocol):
    """What generated programs call."""

    def start(
        self,
        kind: str,
        sources: tuple[torch.Tensor, ...],
        results: tuple[torch.Tensor, ...],
        group: str,
        reduction: str | None,
        root: int | None,
        in_place: bool,
        name: str,
    ) -> Handle: ...

    def wait(self, handle: Handle) -> None: ...

    def drain(self, handles: Iterable[Handle | None], patient: bool) -> bool: ...


@dataclass(frozen=True)
class Team:
    """The processes behind a group label, as this rank sees them."""

    label: str
    process_group: dist.ProcessGroup
    rank: int
    size: int


_registered: dict[str, dist.ProcessGroup] = {}


def register_group(group: dist.ProcessGroup) -> None:
    """Make a process group known by its name to programs compiled for it."""
    _registered[group.group_name] = group


def find_group(name: Any) -> dist.ProcessGroup:
    """The process group called ``name``; a ``ProcessGroup`` is returned as it is.

    ``torch.distributed`` has no public lookup by name. Registered groups and the default group are found through
    public attributes; for the rest the resolver that functional collectives use themselves is asked.

    Raises:
        Unsupported: no such group on this rank, naming it.
    """
    if isinstance(name, dist.ProcessGroup):
        return name
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    for known in (_registered.get(str(name)), world):
        if known is not None and known.group_name == str(name):
            return known
    try:
        return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined]
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError):
        raise Unsupported(
            None,
            f"process group {name!r}, which does not exist on this rank,",
            "call torch.distributed.init_process_group (and new_group) before running the compiled program",
        ) from None


def group_size(name: Any) -> int:
    """Ranks of the process group called ``name``.

    Raises:
        Unsupported: no such group on this rank.
    """
    return dist.get_world_size(find_group(name))


class TorchComm:
    """Collectives on ``torch.distributed`` process groups.

    Args:
        groups: process group, or its name, of each group label of the program.
        deadline_s: longest wait for one collective, in seconds. On CUDA a wait only orders the stream and the process
            group's own timeout applies.
    """

    def __init__(self, groups: Mapping[str, Any], deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self.teams: dict[str, Team] = {}
        for label, name in groups.items():
            group = find_group(name)
            self.teams[label] = Team(label, group, dist.get_rank(group), dist.get_world_size(group))

    def start(
        self,
        kind: str,
        sources: tuple[torch.Tensor, ...],
        results: tuple[torch.Tensor, ...],
        group: str,
        reduction: str | None,
        root: int | None,
        in_place: bool,
        name: str,
    ) -> Handle:
        """Launch a collective.

        Args:
            kind: ``collectives.nodes.Kind`` value.
            sources, results: as many of one as of the other; in place the results are the sources.
            group: label of the group.
            reduction: ``collectives.nodes.REDUCTIONS`` name for reducing kinds.
            root: sending rank within the group, for ``broadcast``.
            name: how messages call it.

        Raises:
            DCompileError: the backend refuses the collective, or a peer is gone.
        """
        team = self.teams[group]
        handle = Handle(name, group)
        launch = _LAUNCHES.get(kind)
        if launch is None:
            raise CompilerBug(f"{name}: no collective is called {kind!r}")
        try:
            for part in _by_dtype(sources):
                mine = tuple(sources[n] for n in part)
                theirs = tuple(results[n] for n in part)
                if any(t.numel() for t in theirs) or any(t.numel() for t in mine):
                    launch(handle, team, mine, theirs, _Request(reduction, root, in_place))
        except DCompileError:
            raise
        except (RuntimeError, ValueError) as error:
            who = f"rank {dist.get_rank()}: {name} on group {_who(team)}"
            raise DCompileError(f"{who} cannot start: {error}") from error
        handle.keep += (sources, results)
        handle.on_cuda = any(t.is_cuda for t in sources)
        return handle

    def wait(self, handle: Handle) -> None:
        """End ``handle``'s collective: its results are in place afterwards.

        Raises:
            DeadlineExceeded: it did not end in ``deadline_s``.
            DCompileError: a peer is gone or the backend failed.
        """
        self._wait_until(handle, time.monotonic() + self.deadline_s)

    def drain(self, handles: Iterable[Handle | None], patient: bool = True) -> bool:
        """Wait for all of ``handles`` after an error, within one deadline together; True if nothing is in flight then.

        What cannot be ended keeps its memory for the life of the process, because the backend may still write to it.
        Not ``patient`` (the user interrupts): do not wait.
        """
        until = time.monotonic() + (self.deadline_s if patient else 0.0)
        ended = True
        for handle in handles:
            if handle is None or not handle.works:
                continue
            try:
                self._wait_until(handle, until)
            except DCompileError:
                _quarantine.append(handle)
                ended = False
        return ended

    def _wait_until(self, handle: Handle, until: float) -> None:
        team = self.teams[handle.group]
        try:
            for work in handle.works:
                if handle.on_cuda:
                    work.wait()
                else:
                    work.wait(timedelta(seconds=max(until - time.monotonic(), SHORTEST_WAIT_S)))
        except RuntimeError as error:
            who = f"rank {dist.get_rank()}: {handle.name} on group {_who(team)}"
            if "timed out" in str(error).lower() or "timeout" in str(error).lower():
                raise DeadlineExceeded(
                    f"{who} did not end within {self.deadline_s:g} s; "
                    "another rank is late, has stopped or runs another program"
                ) from error
            raise DCompileError(f"{who} failed, probably because another rank ended: {error}") from error
        for step in handle.finish:
            step()
        handle.done()


SHORTEST_WAIT_S = 0.001
"""A zero timeout means "for ever" to some backends; a millisecond is enough to see that a work is done."""

_quarantine: list[Handle] = []
"""Collectives that never ended: their memory must not be used for anything else."""


@dataclass(frozen=True)
class _Request:
    reduction: str | None
    root: int | None
    in_place: bool


def _who(team: Team) -> str:
    name = team.process_group.group_name
    return f"{team.label} ({team.size} ranks, process group {name!r})"


def _by_dtype(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Positions of tensors that can share a flat buffer, in order of first appearance."""
    found: dict[torch.dtype, list[int]] = {}
    for n, tensor in enumerate(tensors):
        found.setdefault(tensor.dtype, []).append(n)
    return list(found.values())


def _native_avg(team: Team, tensor: torch.Tensor) -> bool:
    """Only NCCL averages in every supported version of PyTorch; elsewhere the sum is divided at the wait."""
    config = str(dist.get_backend_config(team.process_group))
    return tensor.is_cuda and ("cuda:nccl" in config or config == "nccl")


def _reduce_op(name: str) -> Any:
    return getattr(dist.ReduceOp, name.upper())


def _divide(tensor: torch.Tensor, ranks: int) -> torch.Tensor:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return tensor.div_(ranks)
    return tensor.div_(ranks, rounding_mode="trunc")


def _wire(team: Team, buffer: torch.Tensor, reduction: str) -> tuple[torch.Tensor, Any, bool, bool]:
    """What to reduce, the backend's reduction, whether it is a copy of ``buffer``, whether to divide afterwards."""
    wire, op, copied = fl.reducible(buffer, reduction)
    if op != "avg" or _native_avg(team, wire):
        return wire, _reduce_op(op), copied, False
    return wire, dist.ReduceOp.SUM, copied, True


def _all_reduce(handle: Handle, team: Team, sources: Any, results: Any, request: _Request) -> None:
    assert request.reduction is not None
    direct = fl.dense(results)
    if direct:
        buffer = results[0]
        if not request.in_place:
            buffer.copy_(sources[0])
    else:
        buffer = fl.one_row(sources)
        if len(sources) == 1 and not request.in_place and buffer.data_ptr() == sources[0].data_ptr():
            buffer = buffer.clone()
    wire, op, copied, divide = _wire(team, buffer, request.reduction)
    handle.works.append(dist.all_reduce(wire, op=op, group=team.process_group, async_op=True))
    handle.keep += (buffer, wire)
    if divide:
        handle.finish.append(lambda: _divide(wire, team.size))
    if copied:
        handle.finish.append(lambda: buffer.view(-1).copy_(wire))
    if not direct:
        handle.finish.append(lambda: fl.from_rows(buffer, results, 1))


def _all_gather(handle: Handle, team: Team, sources: Any, results: Any, request: _Request) -> None:
    sent = fl.one_row(sources)
    direct = fl.dense(results)
    received = results[0] if direct else sent.new_empty(sent.numel() * team.size)
    handle.works.append(_gather_single(fl.movable(received), fl.movable(sent), team.process_group))
    handle.keep += (sent, received)
    if not direct:
        handle.finish.append(lambda: fl.from_rows(received, results, team.size))


def _reduce_scatter(handle: Handle, team: Team, sources: Any, results: Any, request: _Request) -> None:
    assert request.reduction is not None
    sent = fl.to_rows(sources, team.size)
    wire, op, _, divide = _wire(team, sent, request.reduction)
    direct = fl.dense(results) and wire.dtype is results[0].dtype
    received = results[0].view(-1) if direct else wire.new_empty(wire.numel() // team.size)
    work, summed = _scatter_single(received, wire, op, team)
    handle.works.append(work)
    handle.keep += (sent, wire, received, summed)
    if summed is not None:
        share = received.numel()
        handle.finish.append(lambda: received.copy_(summed[team.rank * share : (team.rank + 1) * share]))
    if divide:
        handle.finish.append(lambda: _divide(received, team.size))
    if not direct:
        handle.finish.append(lambda: fl.from_rows(_typed(received, results[0].dtype), results, 1))


def _typed(wire: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A received wire buffer as ``dtype``: bits for bool and complex, values for widened integers."""
    if wire.dtype is dtype:
        return wire
    return wire.view(dtype) if dtype is torch.bool or dtype.is_complex else wire.to(dtype)


def _broadcast(handle: Handle, team: Team, sources: Any, results: Any, request: _Request) -> None:
    assert request.root is not None
    direct = fl.dense(results)
    if direct:
        buffer = results[0]
        if not request.in_place and team.rank == request.root:
            buffer.copy_(sources[0])
    else:
        buffer = fl.one_row(sources)
        if len(sources) == 1 and not request.in_place and buffer.data_ptr() == sources[0].data_ptr():
            buffer = buffer.clone()
    root = dist.get_global_rank(team.process_group, request.root)
    handle.works.append(dist.broadcast(fl.movable(buffer), src=root, group=team.process_group, async_op=True))
    handle.keep += (buffer,)
    if not direct:
        handle.finish.append(lambda: fl.from_rows(buffer, results, 1))


def _all_to_all(handle: Handle, team: Team, sources: Any, results: Any, request: _Request) -> None:
    sent = fl.to_rows(sources, team.size)
    direct = fl.dense(results)
    received = results[0] if direct else torch.empty_like(sent)
    handle.works.append(
        dist.all_to_all_single(fl.movable(received), fl.movable(sent), group=team.process_group, async_op=True)
    )
    handle.keep += (sent, received)
    if not direct:
        handle.finish.append(lambda: fl.from_rows(received, results, team.size))


_LAUNCHES: dict[str, Callable[[Handle, Team, Any, Any, _Request], None]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "broadcast": _broadcast,
    "all_to_all": _all_to_all,
}


def _gather_single(output: torch.Tensor, source: torch.Tensor, group: dist.ProcessGroup) -> Any:
    """``all_gather_single`` where PyTorch has it (2.13 on), else under its former name."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(output, source, group=group, async_op=True)


def _scatter_single(output: torch.Tensor, source: torch.Tensor, op: Any, team: Team) -> tuple[Any, torch.Tensor | None]:
    """A reduce-scatter; where the backend has none, an all-reduce of a copy whose own share is cut out at the wait."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    try:
        return scatter(output, source, op=op, group=team.process_group, async_op=True), None
    except RuntimeError as error:  # raised before anything is sent, on every rank alike
        if "support" not in str(error):
            raise
    summed = source.clone()
    return dist.all_reduce(summed, op=op, group=team.process_group, async_op=True), summed
