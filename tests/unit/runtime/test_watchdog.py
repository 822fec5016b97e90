"""The watchdog's rules, with events that tell what they are told to."""

from __future__ import annotations

import time

import pytest
import torch

from dcompile.runtime import watchdog
from dcompile.runtime.board import Board
from dcompile.runtime.flights import FlightRecorder, Place
from dcompile.runtime.waits import Notice


class Event:
    def __init__(self, over: bool) -> None:
        self.over = over

    def query(self) -> bool:
        return self.over


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> FlightRecorder:
    mine = FlightRecorder()
    monkeypatch.setattr(watchdog, "FLIGHTS", mine)
    return mine


def launch(recorder: FlightRecorder, over: bool, age_s: float) -> object:
    tensors = ((torch.ones(2),), (torch.ones(2),))
    flight = recorder.launch("all_reduce", "p7 = all_reduce.sum at train.py:41", Place("0", "nccl", (0, 1, 2)), tensors)
    flight.works = (Event(over),)
    flight.launched_ns = time.time_ns() - int(age_s * 1e9)
    return flight


def test_what_the_device_has_done_is_recorded_and_what_it_has_not_is_late(recorder: FlightRecorder) -> None:
    done, young = launch(recorder, True, 500), launch(recorder, False, 1)
    assert watchdog.first_late(60) is None
    assert recorder.flying() == [young]
    assert done.ended_ns > 0  # type: ignore[attr-defined]
    old = launch(recorder, False, 100)
    assert watchdog.first_late(60) is old
    old.works[0].over = True  # type: ignore[attr-defined]
    assert watchdog.first_late(60) is None


class Read(Board):
    """A board on which rank 1 waits for the same collective and rank 2 is silent."""

    def __init__(self) -> None:
        self.rank = 0

    def read(self) -> dict[int, Notice]:
        return {1: Notice("waits", "p7", "0", 1, (0, 1, 2), {"0": 1})}


def test_the_report_names_the_collective_its_line_and_the_ranks(recorder: FlightRecorder) -> None:
    flight = launch(recorder, False, 100)
    lines = watchdog.describe(flight, 60, Read()).splitlines()  # type: ignore[arg-type]
    assert "p7 = all_reduce.sum at train.py:41 on group '0', number 1 there, did not end within 60 s" in lines[0]
    assert lines[1] == "  rank 1 waits for p7, number 1 of group '0'"
    assert lines[2].startswith("  rank 2 says nothing")
