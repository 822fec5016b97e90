"""List scheduling with lazy waits.

Waits and views are *lazy*: they take no time themselves and run directly before the first node that needs them, or when
the in-flight cap asks for a wait that costs nothing. All other nodes become ready when those they need, looking
through lazy ones, have run; a node behind a wait is ready when the transfer has ended. Heaps make the whole linear in
nodes and edges up to a logarithm.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from dcompile.schedule.live import Footing, LiveBytes
from dcompile.schedule.simulate import Clock, Problem

Priority = Sequence[tuple[float, int]]
"""By position: smaller runs first. The second part, a position, breaks ties."""

LOOK = 32
"""Ready nodes looked at, best first, for one that fits the memory budget: bounds the work of one step when hundreds of
nodes are ready and none fits, so that the whole stays linear."""

HOLD = 2.0
"""A launch that needs memory of its own and would queue for longer than this many times the next node is held
back: launching it now would not start its transfer sooner. Two rather than one because prices are estimates."""


def list_schedule(
    problem: Problem, priority: Priority, ground: Footing, cap_bytes: int, budget_bytes: int, patient: bool = False
) -> tuple[int, ...]:
    """A legal order: positions in program order, in order of execution. Deterministic.

    Args:
        patient: when a transfer is about to end that a more urgent node waits for, run only what ends before it,
            and stand still if nothing does. Better where collectives follow on each other, worse elsewhere.
        cap_bytes: most bytes of collectives in flight; a single collective may exceed it.
        budget_bytes: bytes alive, those in flight not counted, above which nodes that fit are preferred.
    """
    return _Scheduler(problem, priority, ground, cap_bytes, budget_bytes, patient).run()


class _Scheduler:
    def __init__(
        self,
        problem: Problem,
        priority: Priority,
        ground: Footing,
        cap_bytes: int,
        budget_bytes: int,
        patient: bool,
    ) -> None:
        self.problem, self.priority, self.patient = problem, priority, patient
        self.transfer = problem.transfer
        self.cap_bytes, self.budget_bytes = cap_bytes, budget_bytes
        self.clock, self.live = Clock(problem), LiveBytes(ground)
        self.order: list[int] = []
        self.done = [False] * len(problem.cost)
        self.flying: dict[int, int] = {}
        """Bytes of each launched collective that is not waited for, by position of its Wait, in launch order."""
        self.flying_bytes = 0
        links = problem.links
        self.before, self.lazy, self.users, self.waits = links.before, links.lazy, links.users, links.waits
        self.missing = list(links.missing)
        self.future: list[tuple[float, tuple[float, int]]] = []
        self.ready: list[tuple[float, int]] = []
        self.launches: list[tuple[float, int]] = []
        """Starts whose operands are ready, by priority; few, because launches of a group keep their order."""
        self.behind: dict[int, list[int]] = {}
        """Nodes that have arrived and wait for a transfer, by the position of its Wait."""

    def run(self) -> tuple[int, ...]:
        for position, missing in enumerate(self.missing):
            if missing == 0 and not self.lazy[position]:
                self._arrive(position)
        while self._mature():
            if not (self._launch() or self._compute()):
                self._stand_still()
        for position in range(len(self.done)):
            if not self.done[position]:
                self._run_one(position)
        return tuple(self.order)

    def _arrive(self, position: int) -> None:
        """A node whose eager needs have run; it is ready when the transfers it waits for have ended."""
        ends = 0.0
        for wait in self.waits[position]:
            if not self.done[wait]:
                ends = max(ends, self._end_of(wait))
                self.behind.setdefault(wait, []).append(position)
        heapq.heappush(self.future, (ends, self.priority[position]))

    def _end_of(self, wait: int) -> float:
        return self.clock.transfers[self.problem.start_of[wait]][1]

    def _mature(self) -> bool:
        """Sort what has become ready; whether anything is left to run. Nodes that ``_land`` has run are dropped."""
        done = self.done
        while self.future and (self.future[0][0] <= self.clock.now or done[self.future[0][1][1]]):
            key = heapq.heappop(self.future)[1]
            if not done[key[1]]:
                heapq.heappush(self.launches if key[1] in self.transfer else self.ready, key)
        while self.ready and done[self.ready[0][1]]:
            heapq.heappop(self.ready)
        return bool(self.future or self.ready or self.launches)

    def _launch(self) -> bool:
        """Launch the most urgent Start that may go now."""
        if not self.launches:
            return False
        for key in sorted(self.launches):
            if not self._held(key[1]) and self._make_room(key[1]):
                self.launches.remove(key)
                heapq.heapify(self.launches)
                self._run(key[1])
                return True
        return False

    def _held(self, start: int) -> bool:
        if not self.ready or self.live.need(start) == 0:
            return False
        queued = self.clock.free.get(self.problem.lane[start], 0.0) - self.clock.now
        return queued > HOLD * self.problem.cost[self.ready[0][1]]

    def _make_room(self, start: int) -> bool:
        """Whether the cap admits ``start``, after waiting for collectives that have ended already."""
        for wait in list(self.flying):
            if self._fits(start):
                return True
            if self.missing[wait] == 0 and self._end_of(wait) <= self.clock.now:
                self._run(wait)
                self._land(wait)
        return self._fits(start)

    def _land(self, wait: int) -> None:
        """Run what turns the arrived results into something that is no larger, so that they do not pile up."""
        for position in self.behind.pop(wait, ()):
            if self.done[position] or position in self.transfer or self.live.change(position) > 0:
                continue
            if all(self.done[other] or self._end_of(other) <= self.clock.now for other in self.waits[position]):
                self._run(position)

    def _fits(self, start: int) -> bool:
        return not self.flying or self.flying_bytes + self.problem.carried[start] <= self.cap_bytes

    def _compute(self) -> bool:
        """Run the best ready node that fits the memory budget (and, if patient, ends before something more urgent)."""
        if not self.ready:
            return False
        looked = [heapq.heappop(self.ready)]
        while not self._suits(looked[-1]) and self.ready and len(looked) < LOOK:
            key = heapq.heappop(self.ready)
            if not self.done[key[1]]:
                looked.append(key)
        chosen = looked[-1] if self._suits(looked[-1]) else self._least_bad(looked)
        for key in looked:
            if key is not chosen:
                heapq.heappush(self.ready, key)
        if chosen is not None:
            self._run(chosen[1])
        return chosen is not None

    def _suits(self, key: tuple[float, int]) -> bool:
        room = self.budget_bytes - (self.live.now - self.flying_bytes)
        return self.live.need(key[1]) <= room and not (self.patient and self._delays_urgent(key))

    def _delays_urgent(self, key: tuple[float, int]) -> bool:
        """Whether the node would still run when a transfer ends that a more urgent node waits for."""
        if not (self.patient and self.future):
            return False
        ready_us, urgent = self.future[0]
        return urgent[0] < key[0] and self.clock.now + self.problem.cost[key[1]] > ready_us

    def _least_bad(self, looked: Sequence[tuple[float, int]]) -> tuple[float, int] | None:
        """The node that frees most memory; None if all of them should wait for something more urgent."""
        allowed = [key for key in looked if not self._delays_urgent(key)]
        return min(allowed, key=lambda key: self.live.change(key[1]), default=None)

    def _stand_still(self) -> None:
        """Nothing can run now: let the compute lane wait for the transfer that lets something run first."""
        ends = [(self._end_of(wait), wait) for wait in self.flying if self.missing[wait] == 0]
        if self.launches and (not self.future or (ends and min(ends)[0] <= self.future[0][0])):
            if ends:
                self._run(min(ends)[1])
            else:
                self._run(heapq.heappop(self.launches)[1])
        else:
            for wait in sorted(self.waits[self.future[0][1][1]]):
                if not self.done[wait]:
                    self._run(wait)

    def _run(self, position: int) -> None:
        """Run a node, and before it the lazy nodes it needs, in program order."""
        before, done = self.before, self.done
        stack = [other for other in before[position] if not done[other]]
        if stack:
            found: set[int] = set()
            while stack:
                node = stack.pop()
                if node not in found:
                    found.add(node)
                    stack.extend(other for other in before[node] if not done[other])
            for node in sorted(found):
                self._run_one(node)
        self._run_one(position)

    def _run_one(self, position: int) -> None:
        self.clock.step(position)
        self.live.step(position)
        self.done[position] = True
        self.order.append(position)
        if position in self.transfer:
            self.flying[self.problem.wait_of[position]] = self.problem.carried[position]
            self.flying_bytes += self.problem.carried[position]
        elif position in self.flying:
            self.flying_bytes -= self.flying.pop(position)
        for user in self.users[position]:
            self.missing[user] -= 1
            if self.missing[user] == 0 and not self.lazy[user]:
                self._arrive(user)
