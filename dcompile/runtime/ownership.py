"""Whether a tensor that a program was given is held by anybody else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache

import torch

Users = Callable[[torch.Tensor], tuple[int, int]]
"""How many hold a tensor's storage, and the tensor, in C++ (``capture.tensor_users``)."""

Holders = tuple[int, int, int, int]
"""Of a tensor's storage and of the tensor in C++, and of their Python objects."""


def holders(tensor: torch.Tensor, users: Users) -> Holders:
    """Who holds ``tensor``, this call included."""
    return (*users(tensor), sys.getrefcount(tensor.untyped_storage()), sys.getrefcount(tensor))


@lru_cache(maxsize=4)
def only_here(users: Users) -> Holders:
    """What ``holders`` says of a tensor that one local variable of a program holds, as seen from a method of ``rt``."""
    namespace: dict[str, object] = {"rt": _Probe(users), "torch": torch}
    exec("def call():\n    x = torch.empty(1)\n    return rt.take(x, (1,), (1,), torch.float32)\n", namespace)
    found = namespace["call"]()  # type: ignore[operator]
    assert isinstance(found, tuple)
    return found


class _Probe:
    """Stands in for ``Runtime``."""

    def __init__(self, users: Users) -> None:
        self._users = users

    def take(self, tensor: torch.Tensor, shape: object, stride: object, dtype: torch.dtype) -> Holders:
        """The same number of frames away from the program."""
        return holders(tensor, self._users)


__all__ = ["Holders", "Users", "holders", "only_here"]
