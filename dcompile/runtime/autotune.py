"""Choosing between the cuts of a kernel by measuring them once, on the device the program will run on.

Results stay on disk, by hardware, versions and what the kernel computes: a kernel that looks the same in another
program is not measured again. The rank that compiles a program measures; the others load what it chose.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dcompile.counters import TALLY
from dcompile.errors import DCompileError
from dcompile.runtime.cache import Cache, cache_key
from dcompile.runtime.cuda_driver import DeviceMemory, enter_context, load_function, primary_context
from dcompile.runtime.cuda_launch import launch_function
from dcompile.runtime.triton_kernels import Compiled, HasLaunch, HasSignature, plan_of

CHOICE = "choice.json"

MARGIN = 0.98
"""The default stays unless a variant takes less than this share of its time: two measurements of one kernel differ by
about 1 % on an H100."""

ROUNDS, ROUND_US, MOST_CALLS = 5, 300.0, 50
"""Rounds over all variants of a kernel, and how long each runs in one."""


class Timer(Protocol):
    """Measures kernels: ``DeviceTimer``, or what stands in for it in a test."""

    def __call__(self, kernels: Sequence[Compiled], folder: Path, signature: HasSignature) -> list[float]:
        """Microseconds of each kernel on buffers as large as ``signature`` says.

        Raises:
            DCompileError: they cannot be measured here.
        """


class Tuner:
    """Chooses between the variants of kernels, once for each structure (``triton_kernels.Tunes``).

    Args:
        cache: keeps results.
        hardware: everything besides the kernel that decides which variant is best.
        timer: measures.
        report: told what is being measured.
    """

    def __init__(self, cache: Cache, hardware: str, timer: Timer, report: Callable[[str], None] | None = None) -> None:
        self._cache, self._hardware, self._timer = cache, hardware, timer
        self._report = report or show_line

    def known(self, signature: HasSignature) -> HasLaunch | None:
        """The launch that was best before; None if that is not known."""
        if len(signature.variants) == 1:
            return None
        entry = self._cache.find(self._key(signature))
        with suppress(OSError, ValueError, KeyError):
            if entry is not None:
                wanted = json.loads((entry / CHOICE).read_text())["launch"]
                return next((v.launch for v in signature.variants if _described(v.launch) == wanted), None)
        return None

    def best(self, signature: HasSignature, variants: Sequence[Compiled], folder: Path) -> Compiled:
        """The fastest of ``variants`` that spills no more registers than the one that spills least.

        One process measures at a time; whoever comes later finds the result. If nothing can be measured the first
        variant stays.
        """
        chosen: list[Compiled] = []

        def measure(entry: Path) -> None:
            least = min(kernel.frame_bytes for kernel in variants)
            fit = [kernel for kernel in variants if kernel.frame_bytes == least]
            with _measuring, TALLY.timed("autotune"):
                self._report(fit[0].where)
                try:
                    times = self._timer(fit, folder, signature) if len(fit) > 1 else [0.0]
                finally:
                    self._report("")
            chosen.append(fastest(fit, times))
            launches = {variant.name: _described(variant.launch) for variant in signature.variants}
            found = [{"launch": launches[k.name], "us": us} for k, us in zip(fit, times, strict=True)]
            text = json.dumps({"launch": launches[chosen[0].name], "measured": found, "where": fit[0].where})
            (entry / CHOICE).write_text(text)

        try:
            self._cache.fetch(self._key(signature), measure)
        except DCompileError:
            return chosen[0] if chosen else variants[0]
        if chosen:
            return chosen[0]
        known = self.known(signature)
        names = [variant.name for variant in signature.variants if variant.launch == known]
        return next((kernel for kernel in variants if kernel.name in names), variants[0])

    def _key(self, signature: HasSignature) -> str:
        return cache_key("autotune", self._hardware, signature.structure)


def fastest(kernels: Sequence[Compiled], times: Sequence[float]) -> Compiled:
    """The kernel of the shortest time; the first one if no other is faster by more than noise."""
    at = min(range(len(kernels)), key=lambda n: (times[n], n))
    return kernels[at] if times[at] < MARGIN * times[0] else kernels[0]


def _described(launch: HasLaunch) -> dict[str, Any]:
    if not is_dataclass(launch) or isinstance(launch, type):
        raise TypeError("a launch is a dataclass")
    return asdict(launch)


_measuring = threading.Lock()
"""Programs are built by several threads; their measurements would disturb each other."""


def show_line(where: str) -> None:
    """One line on a terminal, overwritten by the next, "" at the end; nothing where standard error is a file."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[Kdcompile: measuring {where[:80]}" if where else "\r\033[K")
        sys.stderr.flush()


@dataclass(frozen=True)
class DeviceTimer:
    """Runs kernels on memory of their own on one GPU.

    Attributes:
        device: its number.
    """

    device: int

    def __call__(self, kernels: Sequence[Compiled], folder: Path, signature: HasSignature) -> list[float]:
        """Medians over rounds in which every kernel runs in turn.

        Raises:
            DCompileError: the device has no room for the buffers, or a kernel fails.
        """
        with torch.cuda.device(self.device):
            enter_context(primary_context(self.device))
            free, _ = torch.cuda.mem_get_info(self.device)
            if sum(signature.spans) > free // 2:
                raise DCompileError("no room to measure kernels")
            fills = [_fill_of(kind) for kind in signature.buffers]
            with DeviceMemory([*signature.spans, 4], [*fills, 0]) as addresses:
                stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
                calls = [self._call(kernel, folder, addresses, signature.hints, stream) for kernel in kernels]
                return timed(calls, stream)

    @staticmethod
    def _call(
        kernel: Compiled, folder: Path, addresses: Sequence[int], sizes: Sequence[int], stream: torch.cuda.Stream
    ) -> Callable[[], int]:
        function = load_function((folder / f"{kernel.name}.cubin").read_bytes(), kernel.name, kernel.shared_bytes)
        launch = launch_function(plan_of(kernel, function, kernel.shared_bytes, addresses[-1]), 1, None)
        handle = ctypes.c_void_p(stream.cuda_stream)
        return lambda: launch(*addresses[:-1], *sizes, handle)


def timed(calls: Sequence[Callable[[], object]], stream: torch.cuda.Stream) -> list[float]:
    """Microseconds of each of ``calls``, which launch on ``stream``: medians over rounds in which each runs in turn."""

    def run(call: Callable[[], object], count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record(stream)
        for _ in range(count):
            call()
        end.record(stream)
        end.synchronize()
        return float(start.elapsed_time(end)) * 1000 / count

    counts = []
    for call in calls:
        run(call, 1)
        counts.append(max(2, min(MOST_CALLS, int(ROUND_US / max(run(call, 1), 1.0)))))
    rounds = [[run(call, count) for call, count in zip(calls, counts, strict=True)] for _ in range(ROUNDS)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def _fill_of(kind: str) -> int:
    """The word that fills a buffer: positions and truth values are 0, floats about 1."""
    return {"*bf16": 0x3F8C3F8C, "*fp16": 0x3C663C66, "*fp32": 0x3F8C3F8C, "*fp64": 0x3FF199A0}.get(kind, 0)


__all__ = ["DeviceTimer", "Timer", "Tuner", "fastest", "timed"]
