"""The schedule as a machine with two kinds of lanes sees it: one compute lane and one communication lane per group.

The compute lane runs nodes in order. A Start occupies it for the launch; its transfer then queues behind earlier
transfers of the same group. A Wait stops it until the transfer has ended. While transfers run beside compute, compute
advances more slowly: a transfer of T microseconds that is wholly covered adds ``contention * T`` to the compute lane.
Groups are taken to have wires of their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from dcompile.analyse.context import NodePrices
from dcompile.analyse.cost import CostModel
from dcompile.collectives.nodes import Start
from dcompile.ir.graph import Graph
from dcompile.schedule.links import Links, links

MAX_CONTENTION = 0.95
"""Compute never stands still for a transfer beside it, even where the cost model says that nothing is hidden (gloo on
a full machine): part of every transfer is waiting for the other side. The 5 % left are a deliberate choice: between two
schedules that are equal but for this, the one that overlaps is right wherever the machine has a core to spare."""


@dataclass(frozen=True)
class Problem:
    """What scheduling needs to know of a graph; all lists are indexed by position, all times are microseconds.

    Attributes:
        links: who needs whom.
        cost: time on the compute lane.
        transfer: time on the communication lane, by position of the Start.
        contention: share of a transfer added to compute beside it, by position of the Start.
    """

    graph: Graph
    links: Links
    cost: tuple[float, ...]
    transfer: dict[int, float]
    contention: dict[int, float]

    @property
    def before(self) -> tuple[tuple[int, ...], ...]:
        return self.links.before

    @property
    def after(self) -> tuple[tuple[int, ...], ...]:
        return self.links.after

    @property
    def carried(self) -> dict[int, int]:
        return self.links.carried

    @property
    def lane(self) -> dict[int, str]:
        return self.links.lane

    @property
    def wait_of(self) -> dict[int, int]:
        return self.links.wait_of

    @property
    def start_of(self) -> dict[int, int]:
        return self.links.start_of


def prepare(graph: Graph, costs: CostModel, prices: NodePrices | None = None) -> Problem:
    """Dependences and prices of ``graph``; ``prices`` is read and filled when given."""
    known: NodePrices = {} if prices is None else prices
    cost = []
    for node in graph.nodes:
        found = known.get(id(node))
        if found is None:
            found = known[id(node)] = (node, costs.node_us(node, graph))
        cost.append(found[1])
    tied = links(graph)
    transfer: dict[int, float] = {}
    contention: dict[int, float] = {}
    for position in tied.wait_of:
        node = graph.nodes[position]
        assert isinstance(node, Start), "what a wait ends is a launch"
        transfer[position] = costs.transfer_us(node, graph)
        contention[position] = min(costs.contention(node), MAX_CONTENTION)
    return Problem(graph, tied, tuple(cost), transfer, contention)


@dataclass
class Clock:
    """Runs nodes one after another and says when what happens."""

    problem: Problem
    now: float = 0.0
    transfers: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Begin and end of each launched transfer, by position of the Start."""
    free: dict[str, float] = field(default_factory=dict)
    """When the last transfer of each lane ends."""
    queues: dict[str, deque[tuple[float, float, float]]] = field(default_factory=dict)
    """Begin, end and contention of the transfers of each lane that have not ended, first to last; no empty ones."""

    def __post_init__(self) -> None:
        self._start_of, self._cost, self._transfer = self.problem.start_of, self.problem.cost, self.problem.transfer

    def step(self, position: int) -> float:
        """Run one node; returns the time the compute lane stood still for a transfer before it."""
        exposed = 0.0
        start = self._start_of.get(position)
        if start is not None:
            ready = self.transfers[start][1]
            if ready > self.now:
                exposed = ready - self.now
                self.now = ready
        work = self._cost[position]
        if work > 0:
            if self.queues:
                self._compute(work)
            else:
                self.now += work
        if position in self._transfer:
            self._launch(position)
        return exposed

    def _launch(self, position: int) -> None:
        lane = self.problem.lane[position]
        begin = max(self.now, self.free.get(lane, 0.0))
        end = begin + self.problem.transfer[position]
        self.transfers[position] = (begin, end)
        self.free[lane] = end
        if self.problem.contention[position] > 0:
            self.queues.setdefault(lane, deque()).append((begin, end, self.problem.contention[position]))

    def _compute(self, work: float) -> None:
        """Advance by ``work`` microseconds of undisturbed compute."""
        while work > 0:
            slow, change = 0.0, None
            for lane in list(self.queues):
                queue = self.queues[lane]
                while queue and queue[0][1] <= self.now:
                    queue.popleft()
                if not queue:
                    del self.queues[lane]
                    continue
                begin, end, contention = queue[0]
                running = begin <= self.now
                slow += contention if running else 0.0
                edge = end if running else begin
                change = edge if change is None else min(change, edge)
            speed = 1.0 - min(slow, MAX_CONTENTION)
            if change is None or work <= (change - self.now) * speed:
                self.now += work / speed
                return
            work -= (change - self.now) * speed
            self.now = change


@dataclass(frozen=True)
class Run:
    """One order on the simulator, in microseconds.

    Attributes:
        makespan: end of the last node.
        begin, end: of each node on the compute lane, by position; a Wait begins when the lane starts to stand still.
        transfers: begin and end of each transfer, by position of the Start.
        exposed: time the compute lane stood still, by position of the Start.
    """

    makespan: float
    begin: dict[int, float]
    end: dict[int, float]
    transfers: dict[int, tuple[float, float]]
    exposed: dict[int, float]


def simulate(problem: Problem, order: Sequence[int]) -> Run:
    """Run the nodes in ``order``, which must be legal."""
    clock = Clock(problem)
    begin: dict[int, float] = {}
    end: dict[int, float] = {}
    exposed: dict[int, float] = {}
    start_of = problem.start_of
    for position in order:
        begin[position] = clock.now
        stood = clock.step(position)
        end[position] = clock.now
        if position in start_of:
            exposed[start_of[position]] = stood
    return Run(clock.now, begin, end, clock.transfers, exposed)


@dataclass(frozen=True)
class Tails:
    """How much must still follow, in microseconds, by position: no schedule ends sooner after the node begins.

    Attributes:
        path: longest path from the begin of the node to the end, transfers and their queues included.
        urgency: largest ``path`` of a Start that needs this node (or is it); 0 if none does.
    """

    path: list[float]
    urgency: list[float]


def tails(problem: Problem) -> Tails:
    """Longest paths, backwards. Launches of one group keep their order, so each transfer is followed by the next."""
    count = len(problem.cost)
    path, urgency = [0.0] * count, [0.0] * count
    queue: dict[str, float] = {}
    successors, cost, transfer = problem.after, problem.cost, problem.transfer
    for position in reversed(range(count)):
        rest = need = 0.0
        for other in successors[position]:
            if path[other] > rest:
                rest = path[other]
            if urgency[other] > need:
                need = urgency[other]
        if position in transfer:
            lane = problem.lane[position]
            last = max(path[problem.wait_of[position]], queue.get(lane, 0.0))
            queue[lane] = transfer[position] + last
            rest = max(rest, queue[lane])
            need = max(need, cost[position] + rest)
        path[position] = cost[position] + rest
        urgency[position] = need
    return Tails(path, urgency)


def lower_bound(problem: Problem) -> float:
    """A time no order can beat under the same costs, in microseconds; the largest of

    - all compute plus the contention of the busiest lane (a transfer hides at most ``1 - contention`` of itself);
    - the longest path;
    - for each lane, its transfers in launch order: the k-th cannot begin before the compute lane has run everything
      the first k launches need, and after each transfer follows the longest path from its wait.
    """
    work = sum(problem.cost)
    path = tails(problem).path
    best = max(path, default=0.0)
    lanes: dict[str, list[int]] = {}
    for start in sorted(problem.transfer):
        lanes.setdefault(problem.lane[start], []).append(start)
    for starts in lanes.values():
        best = max(best, work + sum(problem.transfer[s] * problem.contention[s] for s in starts))
        needed: set[int] = set()
        head = end = 0.0
        for start in starts:
            head += _add_ancestors(problem, start, needed)
            end = max(end, head) + problem.transfer[start]
            best = max(best, end + path[problem.wait_of[start]])
    return max(best, work)


def _add_ancestors(problem: Problem, position: int, known: set[int]) -> float:
    """Add ``position`` and all it needs to ``known``; returns the compute time of what was new."""
    added, stack = 0.0, [position]
    while stack:
        found = stack.pop()
        if found not in known:
            known.add(found)
            added += problem.cost[found]
            stack.extend(problem.before[found])
    return added
