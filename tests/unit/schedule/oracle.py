"""The best way to bucket and order a small program, by exhaustive search: an oracle for the scheduler.

At every point of a program either a node that is ready runs, or any set of collectives of one group whose sources are
ready is launched as one. All such sequences together are all orders of launches and nodes times all partitions into
buckets. Waits are as late as they can be. Of two ways to reach the same point, one that is there no later and whose
transfers end no later is at least as good, whatever follows (times only ever add), so the other is dropped; so is
everything that cannot end before the time to beat.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

from dcompile.analyse.cost import CostModel
from dcompile.collectives.cost import LinkModel
from dcompile.collectives.nodes import Start, Wait
from dcompile.ir.graph import Graph
from dcompile.ir.nodes import Node

MOST_STATES = 300_000
"""A search that looks at more states is given up with an error: make the program smaller."""


@dataclass(frozen=True)
class Reduce:
    """An all-reduce of what node ``source`` makes. ``group``: its number."""

    source: int
    group: int
    nbytes: int


@dataclass(frozen=True)
class Step:
    """A node: its time, the earlier nodes it reads, and the all-reduces whose results it reads."""

    us: float
    nodes: tuple[int, ...]
    results: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """Nodes in program order; each all-reduce is launched and waited for right behind its source. All of them end."""

    steps: tuple[Step, ...]
    reduces: tuple[Reduce, ...]
    alpha_us: float
    us_per_byte: float
    contention: float

    def transfer_us(self, nbytes: int) -> float:
        return self.alpha_us + nbytes * self.us_per_byte


def random_program(seed: int, most_reduces: int = 10) -> Program:
    """A backward pass with random dependences: 5 to 9 nodes, 2 to ``most_reduces`` all-reduces of 256 KiB to 4 MiB over
    one or two groups; some nodes read results. Compute is slowed by transfers in some programs of one group."""
    draw = random.Random(seed)
    count, wanted = draw.randint(5, 9), draw.randint(2, most_reduces)
    sources = sorted(draw.choice(range(count)) for _ in range(wanted))
    groups = draw.choice((1, 1, 2))
    sizes = draw.choice(((2**18,), (2**20,), (2**18, 2**20, 2**22)))
    reduces = tuple(Reduce(source, draw.randrange(groups), draw.choice(sizes)) for source in sources)
    steps = []
    for n in range(count):
        nodes = tuple(sorted({n - 1, *draw.sample(range(n), draw.randint(0, min(n, 1)))})) if n else ()
        if draw.random() < 0.25:
            nodes = nodes[1:]
        known = [k for k, reduce in enumerate(reduces) if reduce.source < n]
        results = tuple(draw.sample(known, 1)) if known and draw.random() < 0.3 else ()
        steps.append(Step(draw.choice((20.0, 60.0, 200.0)), nodes, results))
    alpha_us, mebibyte_us = draw.choice((5.0, 40.0, 150.0)), draw.choice((10.0, 60.0, 200.0))
    contention = draw.choice((0.0, 0.3)) if groups == 1 else 0.0
    return Program(tuple(steps), reduces, alpha_us, mebibyte_us / 2**20, contention)


@dataclass(frozen=True)
class Prices(CostModel):
    """Nodes by name; launches, views and packs cost nothing."""

    us: dict[str, float] = field(default_factory=dict)

    def node_us(self, node: Node, graph: Graph) -> float:
        return 0.0 if isinstance(node, Start | Wait) else self.us.get(node.defs[0].name, 0.0)


def text_and_prices(program: Program) -> tuple[str, Prices]:
    """The program in the IR's text, and the same prices for the scheduler. Node ``n`` makes one tensor ``a<n>`` for the
    nodes and one ``s<k>`` for each of its all-reduces."""
    lines = []
    for n, step in enumerate(program.steps):
        read = [f"%a{k}" for k in step.nodes] + [f"%r{k}" for k in step.results] or ["%x"]
        own = [k for k, reduce in enumerate(program.reduces) if reduce.source == n]
        made = [f"a{n}: f32[4]", *(f"s{k}: f32[{program.reduces[k].nbytes // 4}]" for k in own)]
        lines.append(f"{', '.join(made)} = extern my.op.default({', '.join(read)})")
        for k in own:
            size, group = program.reduces[k].nbytes // 4, program.reduces[k].group
            lines.append(f"p{k}: pending (r{k}: f32[{size}]) = start all_reduce.sum (s{k}) @g{group}[2]")
            lines.append(f"r{k}: f32[{size}] = wait p{k}")
    returned = [f"%a{n}" for n in range(len(program.steps))] + [f"%r{k}" for k in range(len(program.reduces))]
    text = "graph f(x: f32[4]) {\n" + "\n".join(lines) + f"\nreturn {', '.join(returned)}\n}}"
    link = LinkModel(program.alpha_us, 1.0 / program.us_per_byte, program.contention)
    return text, Prices({}, {"*": link}, {f"a{n}": step.us for n, step in enumerate(program.steps)})


State = tuple[float, tuple[tuple[float, float], ...]]
"""Time on the compute lane, and begin and end of each all-reduce's transfer (0, 0 before its launch)."""


def beaten(program: Program, to_beat_us: float) -> float | None:
    """The makespan of some way that ends before ``to_beat_us``; None if there is none.

    Raises:
        AssertionError: the search is too large.
    """
    return _Search(program, to_beat_us).run()


class _Search:
    def __init__(self, program: Program, to_beat_us: float) -> None:
        self.program, self.to_beat_us = program, to_beat_us
        self.steps, self.reduces = program.steps, program.reduces
        self.all_done, self.all_launched = (1 << len(self.steps)) - 1, (1 << len(self.reduces)) - 1
        self.seen: dict[tuple[int, int], list[State]] = {}
        self.count = 0
        self.path = self._paths()

    def _paths(self) -> list[float]:
        """The longest way from the begin of each node to the end, transfers on their own included."""
        path = [0.0] * len(self.steps)
        for n in reversed(range(len(self.steps))):
            rest = max((path[m] for m in range(n + 1, len(self.steps)) if n in self.steps[m].nodes), default=0.0)
            for k, reduce in enumerate(self.reduces):
                if reduce.source == n:
                    readers = (path[m] for m in range(n + 1, len(self.steps)) if k in self.steps[m].results)
                    rest = max(rest, self.program.transfer_us(reduce.nbytes) + max(readers, default=0.0))
            path[n] = self.steps[n].us + rest
        return path

    def run(self) -> float | None:
        start: State = (0.0, ((0.0, 0.0),) * len(self.reduces))
        stack = [(0, 0, start)]
        while stack:
            done, launched, state = stack.pop()
            if done == self.all_done and launched == self.all_launched:
                return max(state[0], *(end for _, end in state[1]))
            self.count += 1
            assert self.count < MOST_STATES, "too many states"
            stack += self._next(done, launched, state)
        return None

    def _next(self, done: int, launched: int, state: State) -> list[tuple[int, int, State]]:
        now, transfers = state
        found = []
        for n, step in enumerate(self.steps):
            needed = all(done >> m & 1 for m in step.nodes) and all(launched >> k & 1 for k in step.results)
            if needed and not done >> n & 1:
                ready = max(now, *(transfers[k][1] for k in step.results)) if step.results else now
                found.append((done | 1 << n, launched, (self._run(ready, step.us, transfers), transfers)))
        for group in {reduce.group for reduce in self.reduces}:
            free = [
                k
                for k, reduce in enumerate(self.reduces)
                if reduce.group == group and not launched >> k & 1 and done >> reduce.source & 1
            ]
            begin = max((transfers[k][1] for k, r in enumerate(self.reduces) if r.group == group), default=0.0)
            last = max((k for k, r in enumerate(self.reduces) if r.group == group and launched >> k & 1), default=-1)
            for bucket in self._choices(free):
                if max(bucket) < last:
                    continue
                end = max(begin, now) + self.program.transfer_us(sum(self.reduces[k].nbytes for k in bucket))
                flown = list(transfers)
                for k in bucket:
                    flown[k] = (max(begin, now), end)
                found.append((done, launched | sum(1 << k for k in bucket), (now, tuple(flown))))
        return [item for item in found if self._is_worth_it(*item)]

    def _choices(self, free: list[int]) -> Iterator[tuple[int, ...]]:
        """Every set of ``free`` that is not like another one: of those that nothing tells apart the first ones."""
        alike: dict[tuple[object, ...], list[int]] = {}
        for k in free:
            readers = tuple(n for n, step in enumerate(self.steps) if k in step.results)
            alike.setdefault((self.reduces[k].nbytes, readers), []).append(k)
        for counts in product(*(range(len(kind) + 1) for kind in alike.values())):
            chosen = [k for kind, count in zip(alike.values(), counts, strict=True) for k in kind[:count]]
            if chosen:
                yield tuple(chosen)

    def _run(self, now: float, work: float, transfers: tuple[tuple[float, float], ...]) -> float:
        """When ``work`` is done if it begins ``now``, slowed by what travels."""
        if not self.program.contention:
            return now + work
        flights = sorted({(r.group, *flight) for r, flight in zip(self.reduces, transfers, strict=True)})
        while work > 1e-12:
            running = [end for _, begin, end in flights if begin <= now < end]
            edges = [edge for _, begin, end in flights for edge in (begin, end) if edge > now]
            speed = 1.0 - self.program.contention * len(running)
            step = min([work / speed, *(edge - now for edge in edges)])
            now += step
            work -= step * speed
        return now

    def _is_worth_it(self, done: int, launched: int, state: State) -> bool:
        """Whether it may end in time and no other way to this point is as good."""
        now, transfers = state
        left = sum(step.us for n, step in enumerate(self.steps) if not done >> n & 1)
        bound = max(now + left, *(end for _, end in transfers))
        for n in range(len(self.steps)):
            if not done >> n & 1:
                bound = max(bound, now + self.path[n])
        for group in {reduce.group for reduce in self.reduces}:
            mine = [k for k, reduce in enumerate(self.reduces) if reduce.group == group]
            rest = sum(self.reduces[k].nbytes for k in mine if not launched >> k & 1)
            if rest:
                free = max(now, *(transfers[k][1] for k in mine))
                bound = max(bound, free + self.program.transfer_us(rest))
        if bound >= self.to_beat_us:
            return False
        known = self.seen.setdefault((done, launched), [])
        if any(_as_good(other, state) for other in known):
            return False
        known[:] = [other for other in known if not _as_good(state, other)]
        known.append(state)
        return True


def _as_good(mine: State, other: State) -> bool:
    """Whether ``mine`` is there no later and all its transfers end no later, or before ``other`` is there at all."""
    return mine[0] <= other[0] and all(
        own[1] <= max(their[1], other[0]) for own, their in zip(mine[1], other[1], strict=True)
    )
