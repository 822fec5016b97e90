from __future__ import annotations

import random
from itertools import combinations

import pytest

from dcompile.plan import ALIGNMENT
from dcompile.schedule.offsets import Assignment, Request, assign_offsets, max_live_bytes


def assert_disjoint(requests: list[Request], found: Assignment) -> None:
    """Aligned, inside the block, and no two buffers that live at once share a byte."""
    for r in requests:
        assert found.offsets[r.name] % ALIGNMENT == 0
        assert 0 <= found.offsets[r.name] <= found.nbytes - r.nbytes
    for a, b in combinations([r for r in requests if r.nbytes], 2):
        if a.first <= b.last and b.first <= a.last:
            start_a, start_b = found.offsets[a.name], found.offsets[b.name]
            assert start_a + a.nbytes <= start_b or start_b + b.nbytes <= start_a


def random_requests(seed: int, count: int = 80) -> list[Request]:
    draw = random.Random(seed)
    births = [draw.randrange(60) for _ in range(count)]
    return [
        Request(f"b{n}", draw.choice((0, 4, 64, 100, 256, 1000, 4096)), birth, birth + draw.choice((0, 1, 2, 5, 40)))
        for n, birth in enumerate(births)
    ]


def test_buffers_that_never_meet_share_bytes() -> None:
    requests = [Request("a", 100, 0, 3), Request("b", 128, 4, 5), Request("c", 64, 6, 9)]
    found = assign_offsets(requests)
    assert found.offsets == {"a": 0, "b": 0, "c": 0}
    assert found.nbytes == found.live_bytes == 128


def test_the_last_step_of_one_and_the_first_step_of_the_next_overlap() -> None:
    found = assign_offsets([Request("a", 64, 0, 4), Request("b", 64, 4, 5)])
    assert found.nbytes == 128
    assert found.offsets["a"] != found.offsets["b"]


def test_an_empty_buffer_takes_no_bytes() -> None:
    found = assign_offsets([Request("a", 0, 0, 4), Request("b", 10, 0, 4)])
    assert found.offsets == {"a": 0, "b": 0}
    assert found.nbytes == ALIGNMENT


def test_nothing_to_place() -> None:
    assert assign_offsets([]) == Assignment({}, 0, 0)


def test_live_bytes_are_the_most_alive_at_one_step() -> None:
    requests = [Request("a", 64, 0, 1), Request("b", 65, 1, 2), Request("c", 1, 2, 2)]
    assert max_live_bytes(requests) == 64 + 128


@pytest.mark.parametrize("seed", range(12))
def test_random_buffers_are_disjoint_and_close_to_the_lower_bound(seed: int) -> None:
    requests = random_requests(seed)
    found = assign_offsets(requests)
    assert_disjoint(requests, found)
    assert found.live_bytes <= found.nbytes <= 1.06 * found.live_bytes
