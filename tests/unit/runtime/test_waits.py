"""The graph of who waits for whom: what is certain, and what is not."""

from __future__ import annotations

from typing import Any

import pytest

from dcompile.runtime.waits import Notice, cycle, explain, first_difference, report

RANKS = (0, 1, 2)


def waits(number: int, launched: int, agreed: int = 0, group: str = "g", **more: Any) -> Notice:
    return Notice("waits", f"p{number}", group, number, RANKS, {group: launched}, {"g": agreed, "h": agreed}, **more)


def agrees(number: int, launched: int, group: str = "g") -> Notice:
    return Notice("agrees", "forward1", group, number, RANKS, {"g": launched}, {group: number})


def test_a_rank_that_recompiles_alone_and_one_that_waits_for_it() -> None:
    notices = {0: waits(5, launched=5, agreed=2), 1: agrees(3, launched=4)}
    for rank in notices:
        assert cycle(rank, notices) in ([0, 1], [1, 0])
        text = explain(rank, notices)
        assert text is not None
        assert "rank 1" in text
        assert "has compiled forward1" in text
        assert "waits for p5, number 5" in text


@pytest.mark.parametrize(
    "other",
    [
        agrees(3, launched=5),  # it has launched number 5: that will end
        agrees(2, launched=4),  # this rank has come to agreement 2: the other goes on
        waits(4, launched=4, agreed=2),  # number 4 has been launched here: the other goes on
        Notice("compiles", "forward1", launched={"g": 4}),
        Notice("left", "its program ended", launched={"g": 5}),
    ],
    ids=["launched", "agreed", "earlier", "compiles", "left after"],
)
def test_no_deadlock_without_certainty(other: Notice) -> None:
    assert explain(0, {0: waits(5, launched=5, agreed=2), 1: other}) is None


def test_a_circle_of_three_over_two_groups() -> None:
    def one(number: int, group: str, done: dict[str, int]) -> Notice:
        return Notice("waits", f"{group}{number}", group, number, RANKS, done)

    notices = {
        0: one(1, "a", {"a": 1, "b": 1, "c": 0}),  # rank 1 has not launched a1
        1: one(1, "b", {"a": 0, "b": 1, "c": 1}),  # rank 2 has not launched b1
        2: one(1, "c", {"a": 1, "b": 0, "c": 1}),  # rank 0 has not launched c1
    }
    assert cycle(0, notices) == [0, 1, 2]
    assert cycle(1, notices) == [1, 2, 0]
    without = {rank: notice for rank, notice in notices.items() if rank != 2}
    assert cycle(0, without) == []


def test_ranks_outside_the_group_are_not_waited_for() -> None:
    mine = Notice("waits", "p", "g", 1, (0, 1), {"g": 1})
    assert cycle(0, {0: mine, 2: Notice("left", "bye")}) == []
    assert cycle(0, {0: mine, 1: Notice("left", "bye")}) == [0, 1]


def test_a_rank_that_left_is_named_with_its_last_words() -> None:
    text = explain(0, {0: waits(5, launched=5), 1: Notice("left", "KeyError: 'weights'", launched={"g": 3})})
    assert text is not None
    assert text.splitlines()[0] == "rank 1 has left and is still needed:"
    assert "KeyError: 'weights'" in text


def test_different_collectives_under_one_number_are_a_difference() -> None:
    mine = waits(5, launched=5, lines=((3, "a"), (4, "b"), (5, "c")))
    theirs = waits(5, launched=5, lines=((4, "b"), (5, "d")))
    assert first_difference(mine, theirs) == (5, "c", "d")
    text = explain(0, {0: mine, 2: theirs})
    assert text is not None
    assert "number 5" in text
    assert "rank 2: d" in text
    assert explain(0, {0: mine, 2: waits(4, launched=4, lines=((3, "a"), (4, "b")))}) is None


def test_notices_travel_as_text() -> None:
    notice = waits(5, launched=5, lines=((4, "b"),))
    assert Notice.from_json(notice.to_json()) == notice


def test_the_report_has_a_line_for_each_rank() -> None:
    lines = report((1, 2), {1: Notice("compiles", "forward0")}).splitlines()
    assert lines[0] == "  rank 1 is compiling forward0"
    assert lines[1].startswith("  rank 2 says nothing")
