"""Collectives at run time: ``start`` launches, ``wait`` ends, with a deadline, on any ``torch.distributed`` backend.

Results land in the memory the plan gave them. Generated programs receive a ``Communicator``, so that tests can put
another one in its place.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from dcompile.errors import CompilerBug, DCompileError, DeadlineExceeded, Unsupported
from dcompile.runtime import flat as fl
from dcompile.runtime.kinds import LAUNCHES, Launched, Request


class Handle(Launched):
    """A collective in flight.

    Attributes:
        name: for messages: the pending's name, kind and source line.
        group: label of its group.
        on_cuda: waiting orders the current stream instead of blocking the host.
        until_s: ``time.monotonic()`` at the end of its first wait's deadline; None before the first wait.
        abandoned: it failed, so nobody knows when its buffers are free; they are kept for the life of the process.
    """

    __slots__ = ("abandoned", "group", "name", "on_cuda", "until_s")

    def __init__(self, name: str, group: str) -> None:
        super().__init__()
        self.name = name
        self.group = group
        self.on_cuda = False
        self.until_s: float | None = None
        self.abandoned = False

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


def find_group(name: Any) -> dist.ProcessGroup:
    """The process group called ``name``; a ``ProcessGroup`` is returned as it is.

    ``torch.distributed`` has no public lookup by name. The default group is found through public attributes; for the
    rest the resolver that functional collectives use themselves is asked.

    Raises:
        Unsupported: no such group on this rank, naming it.
    """
    if isinstance(name, dist.ProcessGroup):
        return name
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if world is not None and world.group_name == str(name):
        return world
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
        self._torn: set[int] = set()  # threads whose last start failed half way

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
            DCompileError: the backend refuses the collective, or a peer is gone. If a part of a coalesced collective
                was launched already, its memory is kept and this thread's next ``drain`` is not clean.
        """
        team = self.teams[group]
        launch = LAUNCHES.get(kind)
        if launch is None:
            raise CompilerBug(f"{name}: no collective is called {kind!r}")
        handle = Handle(name, group)
        handle.keep = (sources, results)
        handle.on_cuda = any(t.is_cuda for t in sources)
        request = Request(team.process_group, team.rank, team.size, reduction, root, in_place)
        try:
            parts = _by_dtype(sources)
            if reduction is not None:
                for part in parts:
                    fl.check_reducible(sources[part[0]].dtype, reduction)
            for part in parts:
                mine = tuple(sources[n] for n in part)
                theirs = tuple(results[n] for n in part)
                if any(t.numel() for t in theirs) or any(t.numel() for t in mine):
                    launch(handle, mine, theirs, request)
        except BaseException as error:
            if handle.works or not isinstance(error, Exception):  # an interrupt may have come after a launch
                self._torn.add(threading.get_ident())
                _abandon(handle)
            if not isinstance(error, Exception):
                raise
            who = f"rank {dist.get_rank()}: {name} on group {_who(team)}"
            raise DCompileError(f"{who} cannot start: {error}") from error
        return handle

    def wait(self, handle: Handle) -> None:
        """End ``handle``'s collective: its results are in place afterwards.

        Raises:
            DeadlineExceeded: it did not end in ``deadline_s``.
            DCompileError: a peer is gone or the backend failed.
        """
        handle.until_s = time.monotonic() + self.deadline_s
        self._wait_until(handle, handle.until_s)

    def drain(self, handles: Iterable[Handle | None], patient: bool = True) -> bool:
        """Wait for all of ``handles`` after an error; True if nothing of this thread's call is in flight then.

        One deadline holds for all of them together; if the error is a failed wait, that wait's deadline. What cannot
        be ended keeps its memory for the life of the process, because the backend may still write to it. Not
        ``patient`` (the user interrupts): do not wait.
        """
        flying = [handle for handle in handles if handle is not None and handle.works]
        now = time.monotonic()
        until = min((h.until_s for h in flying if h.until_s is not None), default=now + self.deadline_s)
        ended = threading.get_ident() not in self._torn
        self._torn.discard(threading.get_ident())
        for handle in flying:
            try:
                if not handle.abandoned:
                    self._wait_until(handle, until if patient else now)
            except DCompileError:
                pass  # the error that is under way says more
            ended = ended and not handle.abandoned
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
            _abandon(handle)
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


def _abandon(handle: Handle) -> None:
    """Keep the memory of ``handle`` for good."""
    handle.abandoned = True
    _quarantine.append(handle)


def _who(team: Team) -> str:
    name = team.process_group.group_name
    return f"{team.label} ({team.size} ranks, process group {name!r})"


def _by_dtype(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Positions of tensors that can share a flat buffer, in order of first appearance."""
    found: dict[torch.dtype, list[int]] = {}
    for n, tensor in enumerate(tensors):
        found.setdefault(tensor.dtype, []).append(n)
    return list(found.values())
