"""Matrix products: library calls into memory of our own choosing."""

from __future__ import annotations

from typing import Any

from dcompile.ir.nodes import Ref
from dcompile.ir.types import Value, contiguous_stride
from dcompile.lower.builder import Lowering
from dcompile.lower.fallback import convert
from dcompile.lower.table import NoRule, rule


@rule("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv", "matmul", any_dtype=True)
def product(b: Lowering, *operands: Any, **kwargs: Any) -> Value:
    """The same call, with its ``.out`` overload so that the memory planner places the result."""
    out, op = b.out, str(b.node.target)
    if out.stride != contiguous_stride(out.shape):
        raise NoRule
    args = tuple(Ref(o.name) if isinstance(o, Value) else convert(b, o) for o in operands)
    extra = tuple((name, convert(b, value)) for name, value in kwargs.items())
    return b.library(out, op, args, extra, out_op=op.removesuffix(".default") + ".out")
