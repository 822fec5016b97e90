"""How tensors travel: as flat contiguous buffers of a dtype that every backend can move and reduce.

Several tensors of one collective become one flat buffer of ``ranks`` rows, so that they cost one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dcompile.errors import DCompileError

BOOL_REDUCTIONS = {
    "sum": "max",
    "bor": "max",
    "max": "max",
    "product": "min",
    "band": "min",
    "min": "min",
    "bxor": "bxor",
}
"""Reductions of 0/1 bytes that give 0/1 bytes: ``sum`` of bools is their logical or, ``product`` their and."""

BITWISE_REDUCTIONS = ("band", "bor", "bxor")


def movable(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes of a contiguous tensor, 1-D, in a dtype every backend moves.

    Gloo has no int16 and not every version has bool and complex, so those travel as bytes.
    """
    flat = tensor.view(-1)
    if flat.dtype in (torch.bool, torch.int16) or flat.dtype.is_complex:
        return flat.view(torch.uint8)
    return flat


def check_reducible(dtype: torch.dtype, reduction: str) -> None:
    """Raise unless ``reducible`` knows how to do ``reduction`` on tensors of ``dtype``.

    Raises:
        DCompileError: no reduction of that kind exists for the dtype.
    """
    if dtype is torch.bool:
        defined = reduction in BOOL_REDUCTIONS
    elif dtype.is_complex:
        defined = reduction in ("sum", "avg")
    else:
        defined = not (dtype.is_floating_point and reduction in BITWISE_REDUCTIONS)
    if not defined:
        raise DCompileError(f"{reduction} over ranks is not defined for {dtype}: convert before the collective")


def reducible(tensor: torch.Tensor, reduction: str) -> tuple[torch.Tensor, str, bool]:
    """A 1-D contiguous tensor and the reduction that does ``reduction`` on it, and whether it is a copy.

    Raises:
        DCompileError: see ``check_reducible``.
    """
    check_reducible(tensor.dtype, reduction)
    flat = tensor.view(-1)
    if flat.dtype is torch.bool:
        return flat.view(torch.uint8), BOOL_REDUCTIONS[reduction], False
    if flat.dtype.is_complex:
        return torch.view_as_real(flat).view(-1), reduction, False
    if flat.dtype is torch.int16:
        return flat.to(torch.int32), reduction, True
    return flat, reduction, False


def one_row(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The elements of all tensors one after another, each row-major; the only tensor itself if it is contiguous."""
    if len(tensors) == 1:
        return tensors[0].contiguous().view(-1)
    return torch.cat([t.reshape(-1) for t in tensors])


def to_rows(tensors: Sequence[torch.Tensor], ranks: int) -> torch.Tensor:
    """Flat buffer of ``ranks`` rows; row r holds the r-th of equal shares of every tensor along dimension 0."""
    if len(tensors) == 1:
        return tensors[0].contiguous().view(-1)
    return torch.cat([t.reshape(ranks, -1) for t in tensors], dim=1).view(-1)


def from_rows(flat: torch.Tensor, results: Sequence[torch.Tensor], ranks: int) -> None:
    """Undo ``to_rows``: copy the columns of every result out of ``flat``."""
    rows = flat.view(ranks, -1)
    column = 0
    for result in results:
        width = result.numel() // ranks
        result.copy_(rows[:, column : column + width].reshape(result.shape))
        column += width


def dense(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the tensors are one contiguous tensor, which can be the flat buffer itself."""
    return len(tensors) == 1 and tensors[0].is_contiguous()
