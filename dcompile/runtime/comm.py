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
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from dcompile.collectives.nodes import Via
from dcompile.errors import CompilerBug, DCompileError, DeadlineExceeded, Unsupported
from dcompile.runtime import flat as fl
from dcompile.runtime.arena import Shared
from dcompile.runtime.board import Board, Lookout, board
from dcompile.runtime.duty import Duty, duty_named
from dcompile.runtime.few_ctas import few_ctas
from dcompile.runtime.flights import FLIGHTS, Flight, Place
from dcompile.runtime.kinds import LAUNCHES, Launched, Request, Splits
from dcompile.runtime.last_words import end_with
from dcompile.runtime.peers import Peers
from dcompile.runtime.symmetric import SymmetricWindow
from dcompile.runtime.waits import Notice
from dcompile.runtime.watchdog import watch_cuda


class Handle(Launched):
    """A collective in flight.

    Attributes:
        name: for messages: the pending's name, kind and source line.
        group: label of its group.
        on_cuda: waiting orders the current stream instead of blocking the host.
        until_s: ``time.monotonic()`` at the end of its first wait's deadline; None before the first wait.
        abandoned: it failed, so nobody knows when its buffers are free; they are kept for the life of the process.
        flight: its record, with its number in the group.
    """

    __slots__ = ("abandoned", "flight", "group", "name", "on_cuda", "until_s")

    def __init__(self, name: str, group: str) -> None:
        super().__init__()
        self.name = name
        self.group = group
        self.on_cuda = False
        self.until_s: float | None = None
        self.abandoned = False
        self.flight: Flight | None = None

    def done(self) -> None:
        """Forget everything that was kept for the flight."""
        self.works, self.finish, self.keep = [], [], ()

    def when_done(self, report: Callable[[], None]) -> None:
        """Call ``report`` once, from any thread, when the communication (not the wait) is over.

        Where the backend cannot tell (gloo's reduce-scatter has no future), it counts as over when it is waited for.
        """
        if not self.works:
            report()
            return
        try:
            future = self.works[-1].get_future()
        except RuntimeError:
            self.finish.append(report)
        else:
            future.then(lambda _: report())


LIBRARY, FEW_CTAS, PEERS = (via.value for via in Via)


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
        splits: Splits | None = None,
        via: str = LIBRARY,
    ) -> Handle: ...

    def wait(self, handle: Handle) -> None: ...

    def drain(self, handles: Iterable[Handle | None], patient: bool) -> bool: ...

    def share(self, group: str, nbytes: int, device: torch.device) -> Shared: ...


@dataclass(frozen=True)
class Team:
    """The processes behind a group label, as this rank sees them; ``duty``: whether they communicate at all."""

    label: str
    process_group: dist.ProcessGroup
    rank: int
    size: int
    duty: Duty | None = None

    @cached_property
    def place(self) -> Place:
        """What the flight recorder notes of the group."""
        name, backend = str(self.process_group.group_name), str(dist.get_backend(self.process_group))
        return Place(name, backend, dist.get_process_group_ranks(self.process_group))


def find_group(name: Any) -> dist.ProcessGroup:
    """The process group called ``name``; a ``ProcessGroup`` is returned as it is.

    ``torch.distributed`` has no public lookup by name. The default group is found through public attributes; for the
    rest the resolver that functional collectives use themselves is asked.

    Raises:
        Unsupported: no such group on this rank, naming it.
    """
    if isinstance(name, dist.ProcessGroup):
        return name
    if (duty := duty_named(name)) is not None:
        return duty.group
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if world is not None and world.group_name == str(name):
        return world
    try:
        return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined]
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError):
        where = f"rank {world.rank()}" if world is not None else "this rank"
        raise Unsupported(
            None,
            f"process group {name!r}, which does not exist on {where},",
            "call torch.distributed.init_process_group (and new_group, with this rank in it) before running the "
            "compiled program",
        ) from None


def group_size(name: Any) -> int:
    """Ranks of the process group called ``name``.

    Raises:
        Unsupported: no such group on this rank.
    """
    return dist.get_world_size(find_group(name))


def known_group_size(name: str) -> int | None:
    """Ranks of the process group called ``name``; None if this process has no group of that name."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    try:
        return group_size(name)
    except Unsupported:
        return None


def group_ranks(name: Any) -> list[int]:
    """Global ranks of the process group called ``name``, in its order.

    Raises:
        Unsupported: no such group on this rank.
    """
    return dist.get_process_group_ranks(find_group(name))


class TorchComm:
    """Collectives on ``torch.distributed`` process groups.

    Args:
        groups: process group, or its name, of each group label of the program.
        deadline_s: longest wait for one collective, in seconds. On CUDA a wait only orders the stream and the process
            group's own timeout applies, and the watchdog's.
        flight_dir: folder that receives the flight recorder's dump when a collective does not end; None for none.
    """

    def __init__(self, groups: Mapping[str, Any], deadline_s: float, flight_dir: Path | None = None) -> None:
        self.deadline_s = deadline_s
        self.flight_dir = flight_dir
        self.teams: dict[str, Team] = {}
        for label, name in groups.items():
            group = find_group(name)
            self.teams[label] = Team(label, group, dist.get_rank(group), dist.get_world_size(group), duty_named(name))
        self._peers: dict[str, Peers] = {}
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
        splits: Splits | None = None,
        via: str = LIBRARY,
    ) -> Handle:
        """Launch a collective.

        Args:
            kind: ``collectives.nodes.Kind`` value.
            sources, results: as many of one as of the other; in place the results are the sources.
            group: label of the group.
            reduction: ``collectives.nodes.REDUCTIONS`` name for reducing kinds.
            root: sending rank within the group, for ``broadcast``.
            name: how messages call it.
            splits: rows of the only source to each rank and of the only result from each, for ``all_to_all`` in
                unequal shares.
            via: ``collectives.nodes.Via`` value. Results of ``"peers"`` lie in memory from ``share``.

        Raises:
            DCompileError: the backend refuses the collective, or a peer is gone. If a part of a coalesced collective
                was launched already, its memory is kept and this thread's next ``drain`` is not clean.
        """
        team = self.teams[group]
        launch = LAUNCHES.get(kind)
        if launch is None:
            raise CompilerBug(f"{name}: no collective is called {kind!r}")
        handle = Handle(name, group)
        if team.duty is not None:
            team.duty.launched = not team.duty.alone
            if team.duty.alone:
                _keep_own(kind, sources, results, team.size)
                return handle
        handle.keep = (sources, results)
        handle.on_cuda = any(t.is_cuda for t in sources)
        process_group = few_ctas(team.process_group) if via == FEW_CTAS else team.process_group
        request = Request(process_group, team.rank, team.size, reduction, root, in_place, splits)
        if (here := board()) is not None:
            here.moves_on()
        handle.flight = FLIGHTS.launch(kind, name, team.place, (sources, results))
        try:
            if via == PEERS:
                handle.works.append(self.peers(group).launch(kind, sources, results))
                return handle
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

    def peers(self, group: str) -> Peers:
        """The ranks of a group as this program reaches them without the backend."""
        if group not in self._peers:
            team = self.teams[group]
            self._peers[group] = Peers(team.rank, team.size, partial(SymmetricWindow, group=team.process_group))
        return self._peers[group]

    def share(self, group: str, nbytes: int, device: torch.device) -> Shared:
        """Memory that every rank of ``group`` maps; each of them must ask for it, in the same order.

        Raises:
            DCompileError: this machine cannot.
        """
        try:
            return self.peers(group).allocate(nbytes, device)
        except RuntimeError as error:
            who = f"rank {dist.get_rank()}: group {_who(self.teams[group])}"
            raise DCompileError(f"{who} cannot share {nbytes} bytes of memory: {error}") from error

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
        lookout = Lookout(board(), partial(self._notice, handle))
        try:
            for work in handle.works:
                if handle.on_cuda:
                    work.wait()
                else:
                    _wait_on_host(work, until, lookout)
        except DCompileError as error:
            raise self._lost(handle, error) from None
        except RuntimeError as error:
            raise self._lost(handle, self._failure(handle, lookout, error)) from error
        finally:
            lookout.done()
        for step in handle.finish:
            step()
        if handle.flight is not None:
            if handle.on_cuda:
                watch_cuda(handle.flight, self.deadline_s, self.flight_dir)
            else:
                FLIGHTS.end(handle.flight)
        handle.done()

    def _notice(self, handle: Handle, here: Board) -> Notice:
        assert handle.flight is not None, "it has been launched"
        return here.blocked("waits", handle.name, handle.flight.group, handle.flight.number, handle.flight.ranks)

    def _failure(self, handle: Handle, lookout: Lookout, error: RuntimeError) -> DCompileError:
        """What a failed wait means, with what is known of the other ranks."""
        team = self.teams[handle.group]
        number = f", number {handle.flight.number} there," if handle.flight is not None else ""
        who = f"rank {dist.get_rank()}: {handle.name} on group {_who(team)}{number}"
        known = lookout.report(team.place.ranks)
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            late = "another rank is late, has stopped or runs another program"
            return DeadlineExceeded(f"{who} did not end within {self.deadline_s:g} s; {late}\n{known}".rstrip())
        return DCompileError(f"{who} failed, probably because another rank ended: {error}\n{known}".rstrip())

    def _lost(self, handle: Handle, error: DCompileError) -> DCompileError:
        """The memory of ``handle`` is kept, the recorder is dumped, and the process will not outlive ``error``."""
        _abandon(handle)
        if handle.flight is not None:
            FLIGHTS.end(handle.flight, failed=True)
        return end_with(error, self.flight_dir)


def _keep_own(kind: str, sources: Sequence[torch.Tensor], results: Sequence[torch.Tensor], ranks: int) -> None:
    """As if every rank had sent what this one sends: of shares scaled by ``1 / ranks`` this rank's own, unscaled.

    Raises:
        CompilerBug: no all-reduce and none of what one can become.
    """
    for source, result in zip(sources, results, strict=True):
        if kind == "all_reduce":
            torch.mul(source, ranks, out=result)
        elif kind == "all_gather":
            result.view(ranks, *source.shape).copy_(source.expand(ranks, *source.shape))
        else:
            raise CompilerBug(f"{kind} of gradients that are not averaged")


def _wait_on_host(work: Any, until: float, lookout: Lookout) -> None:
    """Wait for ``work``, with a look at the other ranks now and then."""
    while True:
        now = time.monotonic()
        try:
            work.wait(timedelta(seconds=max(min(until - now, lookout.seconds()), SHORTEST_WAIT_S)))
            return
        except RuntimeError as error:  # a backend that gives up by itself has another text
            if not str(error).startswith("Operation timed out") or time.monotonic() >= until:
                raise
        lookout.look()


SHORTEST_WAIT_S = 0.001
"""A zero timeout means "for ever" to some backends; a millisecond is enough to see that a work is done."""

_quarantine: list[Handle] = []
"""Collectives that never ended: their memory must not be used for anything else."""


def never_ended() -> tuple[str, ...]:
    """Names of the collectives of this process that never ended: a process group with one of them cannot be destroyed,
    its process can only leave."""
    return tuple(handle.name for handle in _quarantine)


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
