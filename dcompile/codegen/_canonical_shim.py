from dataclasses import dataclass
from typing import Any
@dataclass(frozen=True)
class Canonical:
    key: str
    buffers: tuple
    symbols: tuple
    kernel: Any
def canonical(kernel, values):
    from dcompile.ir.kernel import expressions, extents, statements
    from dcompile.ir import expr as ex
    from dcompile.ir.index import as_expr
    loops = extents(kernel.body)
    syms = set()
    for e in list(loops.values()): syms |= as_expr(e).free_symbols
    for e in expressions(kernel.body):
        for n in ex.walk(e):
            if isinstance(n, ex.Load): syms |= set().union(*(i.free_symbols for i in n.index))
            if isinstance(n, ex.Index): syms |= n.expr.free_symbols
    for s in statements(kernel.body):
        if hasattr(s, "address"): syms |= s.address.free_symbols
    syms = {s for s in syms if s not in loops and not str(s).startswith("q")}
    return Canonical(repr(kernel.body), (*kernel.operands, *(o.name for o in kernel.outs)), tuple(sorted(syms, key=str)), kernel)
