"""Memory that the GPUs of one host have mapped from each other: the only place that knows PyTorch's symmetric memory,
which has no public interface. Loads and stores of single peers only; multicast is switched off.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


class SymmetricWindow:
    """See ``peers.Window``. Making one is a collective of the group.

    Raises:
        RuntimeError: this machine cannot map the memory of its peers.
    """

    def __init__(self, nbytes: int, device: torch.device, group: dist.ProcessGroup) -> None:
        os.environ.setdefault(NO_MULTICAST, "1")  # read when the first memory is mapped
        from torch.distributed import _symmetric_memory as symmetric

        self.memory: torch.Tensor = symmetric.empty(nbytes, dtype=torch.uint8, device=device)
        self._handle: Any = symmetric.rendezvous(self.memory, group)
        if self.of(dist.get_rank(group)).data_ptr() != self.memory.data_ptr():
            raise RuntimeError("symmetric memory begins elsewhere than its tensor")

    def of(self, rank: int) -> torch.Tensor:
        """The memory of ``rank`` of the group, bytes."""
        found: torch.Tensor = self._handle.get_buffer(rank, (self.memory.numel(),), torch.uint8)
        return found

    def meet(self) -> None:
        """A barrier of the group on the current stream."""
        self._handle.barrier()


def refusal(group: dist.ProcessGroup, device: torch.device) -> str:
    """Why this rank cannot map its peers' memory, as far as it knows without them; "" if nothing speaks against it."""
    if device.type != "cuda":
        return "no GPU"
    if os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0"):
        return "NCCL_P2P_DISABLE is set"
    others = range(torch.cuda.device_count())
    if any(not torch.cuda.can_device_access_peer(device, other) for other in others if other != device.index):
        return "a GPU that no peer can reach"
    return ""
