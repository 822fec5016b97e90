from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import torch.distributed as dist

from dcompile.errors import DeadlineExceeded, Divergence
from dcompile.runtime.agree import agree, next_key

LINES = ["y = mm x w", "p = start all_reduce y", "g = wait p"]


def agree_all(
    programs: Sequence[Sequence[str] | None], deadline_s: float = 20.0, key: str = "f/0"
) -> list[Exception | None]:
    """What ``agree`` raised on each rank; a rank without a program does not come."""
    store = dist.HashStore()
    raised: list[Exception | None] = [None] * len(programs)

    def main(rank: int, lines: Sequence[str]) -> None:
        try:
            agree(str(hash(tuple(lines))), lines, store, rank, len(programs), deadline_s, key)
        except Exception as error:
            raised[rank] = error

    threads = [threading.Thread(target=main, args=(n, lines)) for n, lines in enumerate(programs) if lines is not None]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * deadline_s)
    assert not any(thread.is_alive() for thread in threads)
    return raised


def test_equal_programs_agree() -> None:
    assert agree_all([LINES] * 4) == [None] * 4


def test_every_rank_learns_who_differs_and_where() -> None:
    other = [LINES[0], "p = start all_gather y", LINES[2]]
    raised = agree_all([LINES, other, LINES, other, LINES], key="backward/3")
    for rank, error in enumerate(raised):
        assert isinstance(error, Divergence)
        text = str(error)
        assert "different programs for backward" in text
        assert "line 2:" in text
        mine, theirs = (" (this rank)", "") if rank in (0, 2, 4) else ("", " (this rank)")
        assert f"ranks 0, 2, 4{mine}: p = start all_reduce y" in text
        assert f"ranks 1, 3{theirs}: p = start all_gather y" in text


def test_a_shorter_program_differs_at_its_end() -> None:
    raised = agree_all([LINES, LINES[:2]])
    assert all("rank 1" in str(error) and "(the program ends here)" in str(error) for error in raised)
    assert all("line 3:" in str(error) for error in raised)


def test_missing_ranks_are_named_in_time() -> None:
    started = time.monotonic()
    raised = agree_all([LINES, None, LINES, None], deadline_s=0.5)
    assert time.monotonic() - started < 5
    for rank in (0, 2):
        assert isinstance(raised[rank], DeadlineExceeded)
        assert "ranks 1, 3 did not come" in str(raised[rank])
        assert "0.5 s" in str(raised[rank])


def test_keys_count_for_each_group_and_graph() -> None:
    group = f"test {time.monotonic_ns()}"
    assert [next_key(group), next_key(group)] == ["0", "1"]
    assert next_key(group + "b") == "0"
