"""How many hold a tensor's memory."""

from __future__ import annotations

import torch


def storage_users(tensor: torch.Tensor) -> int:
    """Tensors, storages and autograd nodes that hold the storage of ``tensor``, in C++ or Python, itself included."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))  # type: ignore[attr-defined]


def tensor_users(tensor: torch.Tensor) -> tuple[int, int]:
    """``storage_users``, and how many hold the tensor itself in C++, its Python object included."""
    return storage_users(tensor), int(tensor._use_count())  # type: ignore[attr-defined]
