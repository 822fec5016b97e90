from __future__ import annotations

import json
from pathlib import Path

import pytest

from dcompile.runtime.timeline import Recorder, Span, Timeline


def test_hidden_and_exposed_time() -> None:
    line = Timeline("f", 0.0)
    line.spans += [Span("k", "compute", 0, 10), Span("wait p", "wait", 10, 14), Span("k", "compute", 14, 30)]
    line.spans += [Span("p", "g0", 2, 14), Span("q", "g1", 8, 16), Span("r", "g0", 20, 25)]
    assert line.exposed_us == 4
    assert line.communication_us == 14 + 5
    assert line.hidden_us == 15
    assert line.hidden_share == pytest.approx(15 / 19)
    assert line.total_us == 30


def test_no_communication_has_no_share() -> None:
    assert Timeline("f", 0.0, [Span("k", "compute", 0, 10)]).hidden_share is None


def test_a_clock_records_steps_end_to_end_and_flights_until_they_report() -> None:
    recorder = Recorder(kept=2)
    for _ in range(3):
        clock = recorder.begin("f", [("start", "compute"), ("k", "compute"), ("w", "wait")])
        reports = []
        clock.watch("g0", "p", reports.append)
        clock.tick(0)
        clock.tick(1)
        reports[0]()
        clock.tick(2)
    assert len(recorder.timelines) == 2
    spans = {span.name: span for span in recorder.timelines[-1].spans}
    assert spans["start"].start_us == spans["p"].start_us == 0
    assert spans["start"].end_us == spans["k"].start_us <= spans["k"].end_us == spans["w"].start_us
    assert spans["k"].end_us <= spans["p"].end_us <= spans["w"].end_us


def test_the_chrome_trace_has_a_row_a_lane(tmp_path: Path) -> None:
    line = Timeline("f", 0.0, [Span("k", "compute", 0, 10), Span("p", "g0", 2, 14)])
    line.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    drawn = [(lanes[e["tid"]], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert drawn == [("compute", "k", 0, 10), ("g0", "p", 2, 12)]
