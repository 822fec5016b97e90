"""Which entries of PyTorch's operator database are tested, and their sample inputs."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

from tests.opinfo.known import OUTSIDE

CONSIDERED = 48
"""Samples generated of an operator; those tested are spread over them."""

OPERATORS: dict[str, Any] = {op.full_name: op for op in op_db}


def eligible(dtype: torch.dtype) -> list[str]:
    """Names of the entries that take ``dtype`` on the CPU and are not outside what a dense compiler is about."""
    return [name for name, op in OPERATORS.items() if dtype in op.dtypes and name not in OUTSIDE]


@dataclass(frozen=True)
class Sample:
    """One call: a function of a flat list of tensors.

    Attributes:
        function: takes the tensors, gives a tuple of tensors.
        tensors: inputs; never passed on as they are, see ``fresh``.
    """

    name: str
    function: Callable[..., tuple[Tensor, ...]]
    tensors: tuple[Tensor, ...]

    def fresh(self, grad: bool, dtype: torch.dtype | None = None) -> list[Tensor]:
        """New tensors with the values and strides of ``tensors``.

        Args:
            grad: those of floating point (or complex) that want gradients do.
            dtype: convert floating point tensors.
        """
        made = []
        for tensor in self.tensors:
            copy = _same_layout(tensor)
            if dtype is not None and copy.dtype.is_floating_point:
                copy = copy.to(dtype)
            made.append(copy.requires_grad_(grad and tensor.requires_grad))
        return made


def _same_layout(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
            return tensor.detach().clone()
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        return made.copy_(tensor.detach()) if _distinct(tensor) else tensor.detach().clone()


def _distinct(tensor: Tensor) -> bool:
    """Whether no two elements share memory."""
    sides = sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1)
    return all(s >= 1 for s, _ in sides) and all(a[0] * a[1] <= b[0] for a, b in pairwise(sides))


def samples(
    name: str, dtype: torch.dtype, count: int, grad: bool, in_place: bool = False, beyond: int = 0
) -> list[Sample]:
    """At most ``count`` of the operator's sample calls, always the same ones; less those of a count of ``beyond``."""
    op = OPERATORS[name]
    function = op.get_inplace() if in_place else op.get_op()
    torch.manual_seed(zlib.crc32(name.encode()))
    found = enumerate(islice(op.sample_inputs("cpu", dtype, requires_grad=grad), CONSIDERED))
    usable = ((n, s) for n, s in found if not (in_place and s.broadcasts_input))
    if count == 1:
        chosen = list(islice(usable, 1))
    else:
        every = list(usable)
        known = {n for n, _ in _spread(every, beyond)}
        chosen = [(n, s) for n, s in _spread(every, count) if n not in known]
    return [sample_of(f"{name}[{n}]", function, s) for n, s in chosen]


def _spread(items: Sequence[Any], count: int) -> Sequence[Any]:
    if len(items) <= count:
        return items
    return [items[k * len(items) // count] for k in range(count)]


def sample_of(name: str, function: Callable[..., Any], given: Any) -> Sample:
    """A sample input of the database, for a function of its operator."""
    leaves, spec = pytree.tree_flatten((given.input, given.args, given.kwargs))
    positions = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def operator_under_test(*tensors: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for position, tensor in zip(positions, tensors, strict=True):
            filled[position] = tensor
        first, args, kwargs = pytree.tree_unflatten(filled, spec)
        result = given.output_process_fn_grad(function(first, *args, **kwargs))
        return tuple(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))

    return Sample(name, operator_under_test, tuple(leaves[n] for n in positions))
