"""The flight recorder: numbers, limits, and dumps that PyTorch's own analysis reads."""

from __future__ import annotations

import copy
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from dcompile.runtime.flights import FlightRecorder, Place


def fly(recorder: FlightRecorder, kind: str, rows: int = 4, group: str = "0", results: int = 0) -> Any:
    tensors = ((torch.ones(rows, 3),), (torch.ones(results or rows, 3),))
    name = f"p1 = {kind} at /some/train.py:41"
    return recorder.launch(kind, name, Place(group, "gloo", (0, 1)), tensors)


def test_each_group_counts_for_itself() -> None:
    recorder = FlightRecorder(kept=3)
    flights = [fly(recorder, "all_reduce", group=group) for group in "aabab"]
    assert [flight.number for flight in flights] == [1, 2, 1, 3, 2]
    assert recorder.launched() == {"a": 3, "b": 2}
    assert [flight.number for flight in recorder.recent("a", 5)] == [3], "only three are kept"
    assert recorder.recent("b", 1) == [flights[-1]]
    recorder.forget()
    assert fly(recorder, "all_reduce", group="a").number == 1


def test_lines_leave_out_names_and_places() -> None:
    recorder = FlightRecorder()
    one, other = fly(recorder, "all_reduce"), fly(recorder, "all_reduce", rows=5)
    assert one.line == "all_reduce (float32[4, 3])"
    assert other.line == "all_reduce (float32[5, 3])"


def analyse(folder: Path) -> Any:
    """PyTorch's database of all dumps in a folder."""
    builder = pytest.importorskip("torch.distributed.flight_recorder.components.builder")
    loader = pytest.importorskip("torch.distributed.flight_recorder.components.loader")
    arguments = Namespace(trace_dir=str(folder), prefix=None, verbose=False, just_print_entries=False)
    arguments.allow_incomplete_ranks, arguments.mismatch_cap = False, 10
    details, version = loader.read_dir(arguments)
    return builder.build_db(copy.deepcopy(details), arguments, version)


def test_pytorchs_analysis_reads_a_healthy_dump(tmp_path: Path) -> None:
    for rank in (0, 1):
        recorder = FlightRecorder()
        for kind, rows, results in (("all_reduce", 4, 4), ("all_gather", 2, 4), ("reduce_scatter", 4, 2)):
            recorder.end(fly(recorder, kind, rows, results=results))
        recorder.end(fly(recorder, "broadcast"))
        assert recorder.dump(tmp_path, rank).name == f"dcompile_rank_{rank}"
    found = analyse(tmp_path)
    assert [c.collective_name for c in found.collectives] == [
        "gloo:all_reduce",
        "gloo:_all_gather_base",
        "gloo:_reduce_scatter_base",
        "gloo:broadcast",
    ]
    assert all(c.pass_check for c in found.collectives)
    assert {m.global_rank for m in found.memberships} == {0, 1}


def test_pytorchs_analysis_finds_the_rank_that_launched_something_else(tmp_path: Path) -> None:
    for rank in (0, 1):
        recorder = FlightRecorder()
        recorder.end(fly(recorder, "all_reduce"))
        fly(recorder, "all_reduce", rows=4 + rank)
        recorder.dump(tmp_path, rank)
    first, second = analyse(tmp_path).collectives[:2]
    assert first.pass_check
    assert not second.pass_check
    assert second.collective_frames[0]["line"] == 41
