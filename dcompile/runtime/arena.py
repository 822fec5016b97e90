"""Working memory of a program: blocks that are used again from call to call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from dcompile.plan import ALIGNMENT


class Shared(Protocol):
    """Memory that other ranks have mapped too, as long as this is referred to."""

    @property
    def memory(self) -> torch.Tensor: ...


Share = Callable[[int, torch.device], Shared]
"""Makes shared memory of so many bytes."""


class Block:
    """One set of arena memory, one piece for each name: a device type, or memory that is shared with other ranks.

    A piece starts at a multiple of ``ALIGNMENT``, so that offsets keep the alignment the planner gave them.

    Attributes:
        base: address of the first byte, by name.
        tensors: tensors over the block that the program hands to libraries; made once, see ``Arena``.
        key: where the block goes when it is given back.
    """

    __slots__ = ("base", "key", "memory", "shared", "tensors")

    def __init__(
        self,
        nbytes: Mapping[str, int],
        devices: Mapping[str, torch.device],
        key: tuple[object, ...],
        share: Mapping[str, Share] | None = None,
    ) -> None:
        self.key = key
        self.base: dict[str, int] = {}
        self.memory: dict[str, torch.Tensor] = {}
        self.tensors: tuple[torch.Tensor, ...] = ()
        self.shared: list[Shared] = []
        for name, size in nbytes.items():
            if share is not None and name in share:
                self.shared.append(share[name](size, devices.get("cuda", torch.device("cpu"))))
                self.memory[name] = self.shared[-1].memory
                self.base[name] = self.memory[name].data_ptr()
                continue
            raw = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=devices.get(name, name))
            skip = -raw.data_ptr() % ALIGNMENT
            self.memory[name] = raw[skip : skip + size]
            self.base[name] = raw.data_ptr() + skip

    def tensor(
        self, name: str, offset: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]
    ) -> torch.Tensor:
        """A tensor of ``shape`` and ``stride`` (elements) whose first element is at byte ``offset`` of a piece."""
        memory = self.memory[name]
        first = memory.storage_offset() + offset
        fresh = torch.empty(0, dtype=dtype, device=memory.device)
        return fresh.set_(memory.untyped_storage(), first // dtype.itemsize, shape, stride)


class Arena:
    """Free list of blocks. Safe for re-entrant and concurrent calls: each call holds a block of its own.

    Args:
        nbytes: bytes of one block, by name.
        views: makes ``Block.tensors`` when a block is new.
        share: for each piece that is shared with other ranks what makes it, together with them.
    """

    def __init__(
        self,
        nbytes: Mapping[str, int],
        views: Callable[[Block], tuple[torch.Tensor, ...]] | None = None,
        share: Mapping[str, Share] | None = None,
    ) -> None:
        self.nbytes = dict(nbytes)
        self._share = share
        self._views = views
        self._free: dict[tuple[object, ...], list[Block]] = {}

    def take(self, *devices: torch.device) -> Block:
        """A block nobody else uses, on these devices (none named: the CPU, or the current device of its type).

        Blocks that a CUDA stream worked with go back to calls on that stream only.
        """
        key = _key(devices)
        try:
            return self._free[key].pop()  # list.pop is atomic: two threads never get the same block
        except (KeyError, IndexError):
            block = Block(self.nbytes, {d.type: d for d in devices}, key, self._share)
            if self._views is not None:
                block.tensors = self._views(block)
            return block

    def give(self, block: Block) -> None:
        """Take ``block`` back for the next call."""
        self._free.setdefault(block.key, []).append(block)

    def release(self, *devices: torch.device) -> None:
        """Let go of the blocks that nobody uses on these devices' current streams."""
        self._free.pop(_key(devices), None)


def _key(devices: tuple[torch.device, ...]) -> tuple[object, ...]:
    return tuple(
        (d, torch.cuda.current_stream(d).cuda_stream) if d.type == "cuda" else d for d in devices if d.type != "cpu"
    )


def alias(
    base: torch.Tensor, offset: int, shape: tuple[Any, ...], stride: tuple[Any, ...], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A tensor over ``base``'s storage, ``offset`` elements of its own dtype after ``base``'s first element.

    It is a plain tensor, not an autograd view: writing to it under grad mode is no error for whoever receives it.
    """
    dtype = dtype or base.dtype
    first = base.storage_offset() * base.dtype.itemsize // dtype.itemsize + offset
    return torch.empty(0, dtype=dtype, device=base.device).set_(base.untyped_storage(), first, shape, stride)
