"""Type promotion as eager PyTorch does it, for ops whose result dtype does not tell the type they compute in."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy
import torch

from dcompile.ir.types import DType, Value


@lru_cache(maxsize=1024)
def join(a: DType, b: DType) -> DType:
    """The smallest type that holds both."""
    joined = DType.of(torch.promote_types(a.torch, b.torch))
    assert joined is not None
    return joined


def _category(dtype: DType) -> int:
    if dtype is DType.BOOL:
        return 0
    return 1 if dtype.is_int else 2 if dtype.is_float else 3


def _number(value: Any) -> DType:
    if isinstance(value, bool):
        return DType.BOOL
    if isinstance(value, int | sympy.Expr):
        return DType.I64
    return DType.F32 if isinstance(value, float) else DType.C64


def common_dtype(*operands: Any) -> DType:
    """The dtype eager converts ``operands`` to: tensors with dimensions decide, then 0-d tensors, then numbers; a
    lower rank only counts when it is of a higher kind (bool < integer < float < complex)."""
    ranks: list[DType | None] = [None, None, None]
    for operand in operands:
        if operand is None:
            continue
        if isinstance(operand, Value):
            rank, dtype = (0 if operand.shape else 1), operand.dtype
        else:
            rank, dtype = 2, _number(operand)
        held = ranks[rank]
        ranks[rank] = dtype if held is None else join(held, dtype)
    result: DType | None = None
    for dtype_of_rank in ranks:
        if dtype_of_rank is None:
            continue
        if result is None:
            result = dtype_of_rank
        elif _category(dtype_of_rank) > _category(result):
            result = join(result, dtype_of_rank)
    assert result is not None, "promotion of nothing"
    return result
