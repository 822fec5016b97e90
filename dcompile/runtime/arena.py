"""Working memory of a program: blocks that are used again from call to call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dcompile.plan import ALIGNMENT


class Block:
    """One set of arena memory, one piece a device type.

    A piece starts at a multiple of ``ALIGNMENT``, so that offsets keep the alignment the planner gave them.

    Attributes:
        base: address of the first byte, by device type.
        tensors: tensors over the block that the program hands to libraries; made once, see ``Arena``.
        key: where the block goes when it is given back.
    """

    __slots__ = ("base", "key", "memory", "tensors")

    def __init__(self, nbytes: Mapping[str, int], devices: Mapping[str, torch.device], key: tuple[object, ...]) -> None:
        self.key = key
        self.base: dict[str, int] = {}
        self.memory: dict[str, torch.Tensor] = {}
        self.tensors: tuple[torch.Tensor, ...] = ()
        for device, size in nbytes.items():
            raw = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=devices.get(device, device))
            skip = -raw.data_ptr() % ALIGNMENT
            self.memory[device] = raw[skip : skip + size]
            self.base[device] = raw.data_ptr() + skip

    def tensor(
        self, device: str, offset: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]
    ) -> torch.Tensor:
        """A tensor of ``shape`` and ``stride`` (elements) whose first element is at byte ``offset`` of the block."""
        memory = self.memory[device]
        first = memory.storage_offset() + offset
        fresh = torch.empty(0, dtype=dtype, device=memory.device)
        return fresh.set_(memory.untyped_storage(), first // dtype.itemsize, shape, stride)


class Arena:
    """Free list of blocks. Safe for re-entrant and concurrent calls: each call holds a block of its own.

    Args:
        nbytes: bytes of one block, by device type.
        views: makes ``Block.tensors`` when a block is new.
    """

    def __init__(
        self, nbytes: Mapping[str, int], views: Callable[[Block], tuple[torch.Tensor, ...]] | None = None
    ) -> None:
        self.nbytes = dict(nbytes)
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
            block = Block(self.nbytes, {d.type: d for d in devices}, key)
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
