"""Collectives that only move bytes, as copies straight into the memory of the other ranks.

Results lie in a window: memory of one size on each rank of a group that all of them have mapped, with every result at
the same place on every rank. Each rank writes its share into the results of the others, with copy engines on a GPU, so
that multiprocessors stay free for compute. All ranks meet before the copies, when each one's results may be written,
and after them, when everything has arrived. Copies to a neighbour go round the group, so that no rank receives from
two at once.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch

from dcompile.errors import CompilerBug
from dcompile.runtime.cuda_driver import copy_on_device

Tensors = Sequence[torch.Tensor]


class Window(Protocol):
    """Memory that every rank of a group has mapped.

    Attributes:
        memory: this rank's, bytes.
    """

    memory: torch.Tensor

    def of(self, rank: int) -> torch.Tensor:
        """The memory of ``rank``, bytes."""
        ...

    def meet(self) -> None:
        """What every rank has put on its current stream before happens before what any puts there after."""
        ...


OpenWindow = Callable[[int, torch.device], Window]
"""Makes a window of so many bytes, together with the other ranks of a group."""


class Block:
    """A window in use.

    Attributes:
        bases: address of its first byte on each rank, as this rank sees it.
    """

    def __init__(self, window: Window, rank: int, ranks: int) -> None:
        self.window = window
        self.first = window.memory.data_ptr()
        self.bases = tuple(window.of(other).data_ptr() if other != rank else self.first for other in range(ranks))

    @property
    def memory(self) -> torch.Tensor:
        return self.window.memory

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` lies in this rank's part."""
        return self.first <= tensor.data_ptr() < self.first + self.memory.numel()


class Landed:
    """A work that is done when its event has happened; on a CPU at once."""

    def __init__(self, event: torch.cuda.Event | None) -> None:
        self._event = event

    def wait(self, timeout: object = None) -> None:
        """Let the current stream wait."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def get_future(self) -> Any:
        """There is none."""
        raise RuntimeError("copies between peers have no future")


class Peers:
    """The ranks of one group as one program reaches them.

    Args:
        rank, ranks: this one's number in the group and their count.
        open_window: see ``OpenWindow``.
    """

    def __init__(self, rank: int, ranks: int, open_window: OpenWindow) -> None:
        self.rank, self.ranks = rank, ranks
        self._open = open_window
        self._blocks: WeakValueDictionary[int, Block] = WeakValueDictionary()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def allocate(self, nbytes: int, device: torch.device) -> Block:
        """A window for results; every rank must call this, in the same order. It lasts as long as it is referred to."""
        block = Block(self._open(nbytes, device), self.rank, self.ranks)
        self._blocks[block.first] = block
        return block

    def launch(self, kind: str, sources: Tensors, results: Tensors) -> Landed:
        """An ``all_gather`` or an ``all_to_all`` with equal shares of contiguous tensors.

        Raises:
            CompilerBug: another kind, or results that do not all lie in one window.
        """
        pairs = [(source, result) for source, result in zip(sources, results, strict=True) if result.numel()]
        if kind not in ("all_gather", "all_to_all"):
            raise CompilerBug(f"{kind} is no copy between peers")
        if not pairs:
            return Landed(None)
        block = next((b for b in list(self._blocks.values()) if all(b.holds(result) for _, result in pairs)), None)
        if block is None:
            raise CompilerBug(f"{kind} between peers: results do not lie in one window")
        with self._beside(pairs[0][0].device) as stream:
            block.window.meet()
            self._copy(kind, pairs, block, stream)
            block.window.meet()
            return Landed(stream.record_event() if stream is not None else None)

    def _copy(self, kind: str, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], block: Block, stream: Any) -> None:
        """Write this rank's shares into every rank's results, its own last: the others wait for theirs."""
        copy = ctypes.memmove if stream is None else partial(copy_on_device, stream=stream.cuda_stream)
        pieces = []
        for source, result in pairs:
            share = result.numel() * result.element_size() // self.ranks
            offset = result.data_ptr() - block.first + self.rank * share
            pieces.append((offset, source.data_ptr(), share if kind == "all_to_all" else 0, share))
        for step in range(1, self.ranks + 1):
            other = (self.rank + step) % self.ranks
            base = block.bases[other]
            for offset, address, stride, share in pieces:
                copy(base + offset, address + other * stride, share)

    @contextlib.contextmanager
    def _beside(self, device: torch.device) -> Iterator[torch.cuda.Stream | None]:
        """The stream of copies, behind what the current one holds now; None on a CPU."""
        if device.type != "cuda":
            yield None
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield stream
