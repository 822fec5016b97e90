"""Matrix products: library calls into memory of our own choosing."""

from __future__ import annotations

from typing import Any

from dcompile.ir.expr import op as apply
from dcompile.ir.nodes import Ref
from dcompile.ir.types import Value, contiguous_stride
from dcompile.lower.builder import Lowering
from dcompile.lower.fallback import convert
from dcompile.lower.pointwise import elementwise
from dcompile.lower.table import NoRule, rule

OUTER = ("aten.mm.default", "aten.bmm.default")
"""Products of which each element is one multiplication if the shared dimension has size 1."""


def _outer(b: Lowering, x: Value, y: Value) -> Value:
    return elementwise(b, lambda v, w: apply("mul", v, w), x, y)


@rule("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv", "matmul", any_dtype=True)
def product(b: Lowering, *operands: Any, **kwargs: Any) -> Value:
    """The same call, with its ``.out`` overload so that the memory planner places the result; an outer product is no
    library call but a loop, which fuses with its neighbours."""
    out, op = b.out, str(b.node.target)
    if op in OUTER and operands[0].shape[-1] == 1 and out.dtype.is_float:
        return _outer(b, *operands)
    if out.stride != contiguous_stride(out.shape):
        raise NoRule
    args = tuple(Ref(o.name) if isinstance(o, Value) else convert(b, o) for o in operands)
    extra = tuple((name, convert(b, value)) for name, value in kwargs.items())
    return b.library(out, op, args, extra, out_op=op.removesuffix(".default") + ".out")
