"""The flight recorder: every collective this process launched lately, numbered, and a dump that PyTorch's tools read.

Collectives of a group are numbered from 1 in launch order. Ranks that run the same program give the same collective
the same number, so "rank 0 waits for number 57, rank 1 has launched 56" says who is missing.
"""

from __future__ import annotations

import math
import pickle
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

KEPT_FLIGHTS = 2000
"""Collectives that are remembered: some steps of a large model, about a megabyte."""

DUMP_VERSION = "2.10"
"""Version of PyTorch's flight-recorder format that ``FlightRecorder.dump`` writes."""

DUMP_PREFIX = "dcompile_rank_"
"""File names are the prefix and the rank, which is how ``torch.distributed.flight_recorder`` finds the rank."""

FORMAT_NAMES = {
    "all_gather": "_all_gather_base",
    "reduce_scatter": "_reduce_scatter_base",
    "all_to_all": "all_to_all",
}
"""What PyTorch's analysis calls a kind; kinds not named have the same name there."""

_PLACE = re.compile(r" at (.+):(\d+)$")


class Flight:
    """One collective.

    Attributes:
        record: number among all of this process, from 0.
        group: name of its process group.
        number: among those of its group, from 1.
        kind: ``collectives.nodes.Kind`` value.
        name: what messages call it: IR name, kind, reduction, source line.
        backend, ranks: of its group; the ranks are global.
        sizes: shapes of the sources and of the results.
        dtypes: of the sources, one name each.
        launched_ns, ended_ns: ``time.time_ns()``; 0 while it flies.
        failed: it ended with an error, or its deadline passed.
        works: ``torch.distributed`` works, kept while it flies so that a watchdog can ask them; else empty.
    """

    __slots__ = (
        "backend", "dtypes", "ended_ns", "failed", "group", "kind", "launched_ns", "name", "number", "ranks", "record",
        "sizes", "works",
    )  # fmt: skip

    def __init__(self, record: int, number: int, kind: str, name: str, place: Place, tensors: Tensors) -> None:
        sources, results = tensors
        self.record, self.number, self.kind, self.name = record, number, kind, name
        self.group, self.backend, self.ranks = place.group, place.backend, place.ranks
        self.sizes = ([tuple(t.shape) for t in sources], [tuple(t.shape) for t in results])
        self.dtypes = [t.dtype for t in sources]
        self.launched_ns, self.ended_ns, self.failed = time.time_ns(), 0, False
        self.works: Sequence[Any] = ()

    @property
    def line(self) -> str:
        """What every rank must have launched under this number: kind, reduction, shapes and types, without places."""
        what = _PLACE.sub("", self.name).rpartition(" = ")[2]
        shapes = ", ".join(
            f"{str(dtype).removeprefix('torch.')}{list(shape)}"
            for dtype, shape in zip(self.dtypes, self.sizes[0], strict=True)
        )
        return f"{what or self.kind} ({shapes})"


Tensors = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]
"""Sources and results of a collective."""


class Place:
    """Where collectives of one group fly. Attributes as in ``Flight``."""

    __slots__ = ("backend", "group", "ranks")

    def __init__(self, group: str, backend: str, ranks: Sequence[int]) -> None:
        self.group, self.backend, self.ranks = group, backend, tuple(ranks)


class FlightRecorder:
    """The last ``kept`` collectives of a process; safe to use from several threads."""

    def __init__(self, kept: int = KEPT_FLIGHTS) -> None:
        self._flights: deque[Flight] = deque(maxlen=kept)
        self._records = 0
        self._numbers: Counter[str] = Counter()
        self._lock = threading.Lock()

    def launch(self, kind: str, name: str, place: Place, tensors: Tensors) -> Flight:
        """Note a launch, before the backend is asked: a launch that blocks is on record too."""
        with self._lock:
            self._numbers[place.group] += 1
            flight = Flight(self._records, self._numbers[place.group], kind, name, place, tensors)
            self._records += 1
            self._flights.append(flight)
        return flight

    def end(self, flight: Flight, failed: bool = False) -> None:
        """Its wait has ended."""
        flight.works = ()
        flight.failed = failed
        if not failed:
            flight.ended_ns = time.time_ns()

    def launched(self) -> dict[str, int]:
        """Number of the last collective launched in each group."""
        with self._lock:
            return dict(self._numbers)

    def recent(self, group: str, count: int) -> list[Flight]:
        """The last ``count`` collectives of a group, oldest first."""
        with self._lock:
            return [flight for flight in self._flights if flight.group == group][-count:]

    def flying(self) -> list[Flight]:
        """Those whose works are known and have not been waited for, oldest first."""
        with self._lock:
            return [flight for flight in self._flights if flight.works and not flight.failed]

    def forget(self) -> None:
        """Start again from number 1, as after a new rendezvous."""
        with self._lock:
            self._flights.clear()
            self._numbers.clear()
            self._records = 0

    def dump(self, folder: Path, rank: int) -> Path:
        """Write all that is remembered as ``folder/dcompile_rank_<rank>``, a pickle that
        ``python -m torch.distributed.flight_recorder.fr_trace folder`` analyses once all ranks have written theirs.

        Raises:
            OSError: the file cannot be written.
        """
        with self._lock:
            flights = list(self._flights)
        folder.mkdir(parents=True, exist_ok=True)
        groups = {flight.group: {"desc": "undefined", "ranks": str(list(flight.ranks))} for flight in flights}
        entries = [_entry(flight) for flight in flights]
        path = folder / f"{DUMP_PREFIX}{rank}"
        fresh = folder / f".writing-{rank}"
        fresh.write_bytes(
            pickle.dumps({"version": DUMP_VERSION, "pg_config": groups, "entries": entries, "rank": rank})
        )
        fresh.replace(path)
        return path


def _entry(flight: Flight) -> dict[str, object]:
    sources, results = (_one_size(shapes) for shapes in flight.sizes)
    dtypes = sorted({str(dtype).removeprefix("torch.") for dtype in flight.dtypes})
    found = _PLACE.search(flight.name)
    frame = {
        "name": flight.name,
        "filename": found[1] if found else "<unknown>",
        "line": int(found[2]) if found else 0,
    }
    return {
        "record_id": flight.record,
        "pg_id": 0,
        "process_group": (flight.group, "undefined"),
        "collective_seq_id": flight.number,
        "p2p_seq_id": 0,
        "op_id": flight.number,
        "profiling_name": f"{flight.backend}:{FORMAT_NAMES.get(flight.kind, flight.kind)}",
        "time_created_ns": flight.launched_ns,
        "input_sizes": [sources],
        "input_dtypes": dtypes,
        "output_sizes": [results],
        "output_dtypes": dtypes,
        "state": "completed" if flight.ended_ns else "started",
        "time_discovered_started_ns": flight.launched_ns,
        "time_discovered_completed_ns": flight.ended_ns or None,
        "retired": bool(flight.ended_ns),
        "timeout_ms": 0,
        "is_p2p": False,
        "frames": [frame],
    }


def _one_size(shapes: Iterable[tuple[int, ...]]) -> list[int]:
    """The shape of one tensor; of several their elements, because they travel as one."""
    found = list(shapes)
    return list(found[0]) if len(found) == 1 else [sum(map(math.prod, found))]


FLIGHTS = FlightRecorder()
"""The process's recorder."""
