"""Embedding bags in bfloat16, whose library call returns other sizes than PyTorch's tracer believes."""

from __future__ import annotations

from typing import Any

import sympy

from dcompile.ir.expr import const, index, load, op, to
from dcompile.ir.nodes import Extern, Ref
from dcompile.ir.types import DType, Value
from dcompile.lower.builder import Lowering, loop_index
from dcompile.lower.fallback import convert
from dcompile.lower.table import NoRule, rule


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(b: Lowering, weight: Value, indices: Value, offsets: Value, *rest: Any, **kwargs: Any) -> Any:
    """The library call, and the bag of every index where somebody asks for it.

    For bfloat16 the fake implementation promises that vector (the second result), while the library, which needs none
    to add up rows, returns an empty one (torch 2.11 to 2.13). In other dtypes both agree.
    """
    bags = b.out_at(1)
    if weight.dtype is not DType.BF16 or weight.device != "cpu" or bags.shape == (0,):
        raise NoRule
    outs = (b.out_at(0), None, b.out_at(2), b.out_at(3))
    arguments = convert(b, (weight, indices, offsets, *rest))
    named = tuple((name, convert(b, value)) for name, value in kwargs.items())
    call = Extern(
        outs=outs, op=str(b.node.target), args=arguments, kwargs=named, fallback=True, seq=True, origin=b.origin
    )
    b.emit(call)
    return outs[0], _bag_of_each(b, bags, offsets), outs[2], outs[3]


def _bag_of_each(b: Lowering, bags: Value, offsets: Value) -> Value:
    """For every index the number of the last bag that begins at or before it."""
    places, after = (b.temp(name, DType.I64, bags.shape, bags.device) for name in ("places", "after"))
    here: sympy.Expr = loop_index(bags.shape)[0]
    b.pointwise(places, index(here))
    b.library(after, "aten.bucketize.Tensor", (Ref(places.name), Ref(offsets.name)), (("right", True),))
    return b.pointwise(bags, op("sub", to(load(after.name, (here,), DType.I64), bags.dtype), const(1, bags.dtype)))
