"""Storages that give up their bytes and get them back in the middle of a program, as sharded parameters do."""

from __future__ import annotations

from typing import Any

from dcompile.errors import Unsupported
from dcompile.ir.nodes import Extern, Ref
from dcompile.ir.types import Value
from dcompile.lower.builder import Lowering
from dcompile.lower.table import rule

RESIZE = "dcompile.resize_storage"


@rule("inductor.resize_storage_bytes_.default", any_dtype=True)
def resize_storage(b: Lowering, x: Value, nbytes: Any) -> None:
    """``x.untyped_storage().resize_(nbytes)``: a write of the caller's tensor; the bytes may be symbolic.

    Memory of the program's own is given back after its last use anyway, so that there is nothing to do.

    Raises:
        Unsupported: the program keeps the tensor apart from the input it stands for.
    """
    root = b.root(x)
    if not b.is_input(root):
        node: Any = b.node.args[0]
        if any(str(user.target) == "aten.copy_.default" and user.args[1] is node for user in node.users):
            raise Unsupported(
                b.origin,
                what="a storage resized while another version of its tensor is still in use",
                instead="resize it after the last use of everything computed from the tensor before it was overwritten",
            )
        return
    new = Value(b.fresh(f"{x.name}_resized"), x.dtype, x.shape, x.stride, x.device)
    call = Extern(
        outs=(), op=RESIZE, args=(Ref(x.name), nbytes), writes=(x.name,), versions=(new,), effect=True, origin=b.origin
    )
    b.flights.settle(root)
    b.emit(call)
    b.supersede(x, new)
