"""Programs replayed as CUDA graphs: the host hands the GPU one graph in place of every launch.

A graph reads and writes the addresses it was captured with. So a program is watched first: inputs that stay where they
are from call to call (parameters, what another graph saved for this one) are *bound*, those that move are copied into
memory of the graph before each replay. A graph also writes its results to the same memory every time. So it is replayed
only when nobody holds the results of its last replay; a second graph serves callers that keep the first one's
(gradients that accumulate). A call that fits no graph runs the plain program: a graph is never needed for a result.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dcompile.runtime.arena import alias

WATCHED_CALLS = 2
"""Calls in a row that move the same inputs before a graph is captured. The first calls also load library kernels and
create library handles, which no capture may do."""

COPIED_BYTES = 256 * 2**20
"""Most bytes of inputs that are copied before a replay: 0.2 ms at the 2.5 TB/s of an H100's memory."""

CLONED_BYTES = 64 * 2**10
"""Results for the user up to this size, losses above all, are handed out as copies, for they are often kept."""

MOST_GRAPHS, MOST_CAPTURES = 4, 16
"""Graphs of one program at a time, and captures in its life: whose inputs never settle stays a plain program."""

Program = Callable[[list[Any]], list[Any]]


class GraphDevice(Protocol):
    """What capturing needs of a device."""

    def lane(self) -> object:
        """The stream that this call works on; equal for equal streams."""

    def capture(self, run: Callable[[], list[Any]]) -> tuple[Callable[[], None], list[Any]]:
        """Record what ``run`` launches: what replays it, and ``run``'s results, which replays will write.

        Raises:
            RuntimeError: ``run`` does what cannot be captured.
        """


class CudaGraphDevice:
    """Capture through PyTorch, whose allocator keeps a graph's memory apart."""

    def __init__(self) -> None:
        self._pools: dict[object, Any] = {}

    def lane(self) -> object:
        return torch.cuda.current_stream().cuda_stream

    def capture(self, run: Callable[[], list[Any]]) -> tuple[Callable[[], None], list[Any]]:
        """All graphs of a lane share one pool: replays follow each other on it, and what outlives a replay, its
        results, is held by the graph's owner, so that no other graph gets that memory."""
        lane = self.lane()
        if lane not in self._pools:
            self._pools[lane] = torch.cuda.graph_pool_handle()
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            graph.capture_begin(pool=self._pools[lane], capture_error_mode="thread_local")
            try:
                results = run()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(side)
        return graph.replay, results


_Result = Callable[[Sequence[Any]], Any]
"""Makes one result of a replay from the call's inputs."""


@dataclass
class _Captured:
    """One graph.

    Attributes:
        lane: the stream it is replayed on.
        bound: (input, address, strides) that a call must have for this graph.
        copied: (input, memory of the graph) to fill before a replay.
        results: makers of the results, in order.
        held: (a tensor on each storage of results handed out, its users while nobody else holds it).
        used: number of the call that replayed it last.
    """

    lane: object
    bound: tuple[tuple[int, int, tuple[int, ...]], ...]
    copied: tuple[tuple[int, Tensor], ...]
    replay: Callable[[], None]
    results: tuple[_Result, ...]
    held: tuple[tuple[Tensor, int], ...]
    used: int = 0

    def fits(self, inputs: Sequence[Any]) -> bool:
        for index, address, stride in self.bound:
            tensor = inputs[index]
            if tensor.data_ptr() != address or tensor.stride() != stride or tensor.is_neg():
                return False
        return True

    def idle(self, users: Callable[[Tensor], int]) -> bool:
        """Whether nobody holds results of the last replay."""
        return all(users(tensor) == alone for tensor, alone in self.held)

    def run(self, inputs: list[Any]) -> list[Any]:
        for index, buffer in self.copied:
            buffer.copy_(inputs[index], non_blocking=True)
        self.replay()
        results = [make(inputs) for make in self.results]
        inputs.clear()
        return results


class GraphedProgram:
    """A program that becomes CUDA graphs as its callers settle down.

    Args:
        program: the plain program; takes its inputs in one list, clears it, and works on the current stream.
        name: for messages.
        written: positions of inputs that the program writes or returns memory of: never copied.
        returned: how many of the results, from the first, go to the user.
        users: how many tensors and storages hold a tensor's storage.
        poll: called before every replay; raises what earlier kernels have reported.
        captured: called after a capture, to give back what only the plain program needs.
    """

    def __init__(
        self,
        program: Program,
        name: str,
        written: frozenset[int],
        returned: int,
        users: Callable[[Tensor], int],
        device: GraphDevice,
        poll: Callable[[], None] = lambda: None,
        captured: Callable[[], None] = lambda: None,
    ) -> None:
        self._program, self._name = program, name
        self._written, self._returned = written, returned
        self._users, self._device, self._poll, self._on_capture = users, device, poll, captured
        self._graphs: list[_Captured] = []
        self._addresses: tuple[int, ...] = ()
        self._moved: frozenset[int] | None = None
        self._steady = 0
        self._calls = 0
        self._lock = threading.Lock()
        self.captures = 0
        self.replays = 0
        self.refusal = ""

    def __call__(self, inputs: list[Any]) -> list[Any]:
        """Run on ``inputs``, which is emptied."""
        if not self._lock.acquire(blocking=False):  # another thread is in here: its graph's memory is in use
            return self._program(inputs)
        try:
            self._calls += 1
            lane = self._device.lane()
            for graph in self._graphs:
                if graph.lane == lane and graph.fits(inputs) and graph.idle(self._users):
                    self._poll()
                    graph.used = self._calls
                    self.replays += 1
                    return graph.run(inputs)
            if self._settled(inputs) and self._room():
                made = self._capture(inputs, lane)
                if made is not None:
                    return made.run(inputs)
        finally:
            self._lock.release()
        return self._program(inputs)

    def _settled(self, inputs: Sequence[Any]) -> bool:
        """Note where the inputs are; whether the same ones have moved for ``WATCHED_CALLS`` calls."""
        if self.refusal:
            return False
        addresses = tuple(tensor.data_ptr() for tensor in inputs)
        moved = None
        if len(self._addresses) == len(addresses) and all(tensor.device.type != "cpu" for tensor in inputs):
            pairs = zip(addresses, self._addresses, strict=True)
            moved = frozenset(n for n, (now, before) in enumerate(pairs) if now != before)
        self._steady = self._steady + 1 if moved is not None and moved == self._moved else 0
        self._addresses, self._moved = addresses, moved
        if moved is None or self._steady < WATCHED_CALLS - 1 or moved & self._written:
            return False
        return bool(sum(inputs[n].nbytes for n in moved) <= COPIED_BYTES)

    def _room(self) -> bool:
        """Whether one more graph may be captured; the one unused for longest makes room if nobody holds its results."""
        if self.captures >= MOST_CAPTURES:
            return False
        if len(self._graphs) < MOST_GRAPHS:
            return True
        oldest = min(self._graphs, key=lambda graph: graph.used)
        if not oldest.idle(self._users):
            return False
        self._graphs.remove(oldest)
        return True

    def _capture(self, inputs: Sequence[Any], lane: object) -> _Captured | None:
        """A new graph for inputs like these, or None, with the reason in ``refusal``."""
        moved = self._moved or frozenset()
        copies = {n: torch.empty_like(inputs[n]).copy_(inputs[n]) for n in sorted(moved)}
        given = [copies.get(n, tensor) for n, tensor in enumerate(inputs)]
        try:
            replay, results = self._device.capture(lambda: self._program(list(given)))
        except RuntimeError as error:
            self.refusal = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            warnings.warn(
                f"dcompile: {self._name} runs without a CUDA graph, it cannot be captured: {self.refusal}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        bound = tuple((n, t.data_ptr(), t.stride()) for n, t in enumerate(inputs) if n not in moved)
        makers, fresh = self._makers(results, given)
        del results
        held = tuple((tensor, self._users(tensor)) for tensor in fresh)
        graph = _Captured(lane, bound, tuple(copies.items()), replay, makers, held, self._calls)
        self._graphs.append(graph)
        self.captures += 1
        self._steady = 0
        self._on_capture()
        return graph

    def _makers(self, results: Sequence[Any], given: Sequence[Tensor]) -> tuple[tuple[_Result, ...], list[Tensor]]:
        """How each result is made, and one tensor for each storage that is handed out."""
        makers: list[_Result] = []
        fresh: dict[int, Tensor] = {}
        owners = {t.untyped_storage().data_ptr(): n for n, t in enumerate(given) if t.untyped_storage().nbytes()}
        for number, result in enumerate(results):
            if not isinstance(result, Tensor):
                makers.append(lambda inputs, same=result: same)  # type: ignore[misc]
                continue
            same = next((n for n, tensor in enumerate(given) if tensor is result), None)
            owner = owners.get(result.untyped_storage().data_ptr())
            if same is not None:
                makers.append(lambda inputs, n=same: inputs[n])  # type: ignore[misc]
            elif owner is not None and result.untyped_storage().nbytes():
                makers.append(_view_of(result, given[owner], owner))
            elif number < self._returned and result.nbytes <= CLONED_BYTES:
                makers.append(lambda inputs, tensor=result: tensor.clone())  # type: ignore[misc]
            else:
                makers.append(lambda inputs, tensor=result: tensor.detach())  # type: ignore[misc]
                fresh.setdefault(result.untyped_storage().data_ptr(), result)
        return tuple(makers), list(fresh.values())


def _view_of(result: Tensor, base: Tensor, owner: int) -> _Result:
    """Memory of the input ``owner``, laid out like ``result`` on ``base``."""
    offset = (result.data_ptr() - base.data_ptr()) // result.dtype.itemsize
    shape, stride, dtype = tuple(result.shape), result.stride(), result.dtype
    return lambda inputs: alias(inputs[owner], offset, shape, stride, dtype)


__all__ = ["CudaGraphDevice", "GraphDevice", "GraphedProgram"]
