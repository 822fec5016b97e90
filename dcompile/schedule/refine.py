"""From a good set of buckets to a better one: local search, each try scheduled and simulated.

Buckets of one size are a coarse choice: what is due early is best alone, what ends last is best small. Merging two
buckets, splitting one and moving a member are tried until nothing is faster, or until enough has been tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from dcompile.schedule.merge import Bucket

WORK_NODES, MOST_TRIES = 6_000, 400
"""As many tries as schedule this many nodes altogether, but not more than so many. A try takes 40 us a node."""

Buckets = tuple[Bucket, ...]


def tries_for(nodes: int) -> int:
    """How many sets of buckets may be tried for a graph of ``nodes`` nodes."""
    return min(WORK_NODES // max(nodes, 1), MOST_TRIES)


def refine(
    starts: Sequence[tuple[float, Buckets]],
    makespan_us: Callable[[Buckets], float],
    tries: int,
    gain: float,
    held_bytes: int,
) -> tuple[float, Buckets]:
    """The best set of buckets found from any of ``starts`` on, with its makespan; deterministic.

    Args:
        starts: sets with their makespans; the fastest is searched around first.
        makespan_us: predicted time of the program with these buckets.
        gain: share by which a set must be faster to be taken.
        held_bytes: most bytes that a bucket of several may hold in flight.
    """
    best_us, best = min(starts, key=lambda start: start[0])
    if tries == 0:
        return best_us, best
    seen = {_same(buckets) for _, buckets in starts}
    for us, buckets in sorted(starts, key=lambda start: start[0]):
        way: tuple[float, Buckets] | None = us, buckets
        while way is not None:
            us, buckets = way
            if us < (1 - gain) * best_us:
                best_us, best = us, buckets
            way = None
            for candidate in _neighbours(buckets, held_bytes):
                if _same(candidate) in seen:
                    continue
                if tries == 0:
                    return best_us, best
                tries -= 1
                seen.add(_same(candidate))
                tried_us = makespan_us(candidate)
                if tried_us < (1 - gain) * us:
                    way = tried_us, candidate
                    break
    return best_us, best


def _same(buckets: Buckets) -> frozenset[tuple[int, ...]]:
    """What two sets that are equal have in common."""
    return frozenset(tuple(sorted(member.start for member in bucket)) for bucket in buckets)


def _neighbours(buckets: Buckets, held_bytes: int) -> Iterator[Buckets]:
    """Sets that differ by one step, the larger steps first."""
    ordered = tuple(sorted(buckets, key=_availability))
    pairs = [(a, b) for n, a in enumerate(ordered) for b in ordered[n + 1 :] if a[0].key == b[0].key]
    for left, right in pairs:
        if _may_join(left, right, held_bytes):
            yield _replaced(ordered, (left, right), (_joined(left, right),))
    for bucket in ordered:
        for cut in range(1, len(bucket)):
            yield _replaced(ordered, (bucket,), (bucket[:cut], bucket[cut:]))
    for bucket in ordered:
        for member in bucket if len(bucket) > 2 else ():
            rest = tuple(other for other in bucket if other != member)
            yield _replaced(ordered, (bucket,), (rest, (member,)))
    for left, right in (*pairs, *((b, a) for a, b in pairs)):
        for member in left if len(left) > 1 else ():
            if _may_join((member,), right, held_bytes):
                rest = tuple(other for other in left if other != member)
                yield _replaced(ordered, (left, right), (rest, _joined((member,), right)))


def _availability(bucket: Bucket) -> tuple[int, int]:
    return max(member.available for member in bucket), bucket[0].start


def _may_join(left: Bucket, right: Bucket, held_bytes: int) -> bool:
    """Whether both fit into one flight and no launch of one depends on a result of the other. What they depend on
    through others, ``merge`` sees."""
    if sum(member.held for member in (*left, *right)) > held_bytes:
        return False
    return not any(a.needs >> b.number & 1 or b.needs >> a.number & 1 for a in left for b in right)


def _joined(left: Bucket, right: Bucket) -> Bucket:
    return tuple(sorted((*left, *right), key=lambda member: (member.available, member.start)))


def _replaced(buckets: Sequence[Bucket], old: Sequence[Bucket], new: Sequence[Bucket]) -> Buckets:
    return (*(bucket for bucket in buckets if bucket not in old), *new)
