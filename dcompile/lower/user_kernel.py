"""Triton kernels of the user's own as nodes: a launch that writes the operands its kernel stores to, and no others."""

from __future__ import annotations

from typing import Any

from torch import fx

from dcompile.errors import Unsupported
from dcompile.ir.nodes import Extern, Literal
from dcompile.ir.symbolic import LAUNCH
from dcompile.ir.types import Value
from dcompile.lower.builder import Lowering
from dcompile.lower.higher_order import SubPrograms, argument
from dcompile.lower.kernel_writes import written_parameters

KERNEL = "dcompile_kernel"
"""Key of ``node.meta``: the kernel and its constant arguments, left there by ``capture.user_kernels``."""
LAUNCHING = ("triton_kernel_wrapper_functional", "triton_kernel_wrapper_mutation")
_NEW = ("aten.empty", "aten.new_empty", "aten.empty_like")


def launch(lowering: Lowering, subs: SubPrograms, op: str, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Emit the launch; the functional form gives, by parameter name, what its kernel has written.

    Raises:
        Unsupported: tensors on the CPU (but for an interpreted kernel), or tensor descriptors.
    """
    node = lowering.node
    kernel, constants = node.meta[KERNEL]
    called = str(getattr(kernel, "__name__", None) or getattr(getattr(kernel, "fn", None), "__name__", "kernel"))
    if kwargs.get("tma_descriptor_metadata"):
        raise Unsupported(lowering.origin, f"the Triton kernel {called} with tensor descriptors", "pass pointers")
    given: dict[str, Any] = dict(kwargs["kwargs"])
    tensors = {name: value for name, value in given.items() if isinstance(value, Value)}
    if any(value.device == "cpu" for value in tensors.values()) and "Interpreted" not in type(kernel).__name__:
        raise Unsupported(
            lowering.origin,
            what=f"the Triton kernel {called} on CPU tensors",
            instead="move its tensors to a GPU, or write it with tensor operations",
        )
    stored = written_parameters(kernel)
    functional = op == LAUNCHING[0]
    wanted = kwargs["tensors_to_clone"] if functional else tensors
    written = [name for name in tensors if name in wanted and name in stored]
    if functional:
        for name in written:
            sources: Any = node.kwargs["kwargs"]
            given[name] = _own(lowering, tensors[name], sources[name], node)
    versions = tuple(_next(lowering, given[name]) for name in written)
    holder = _holder(subs, kernel, constants, called)
    lowering.emit(
        Extern(
            outs=(),
            op=LAUNCH,
            args=(Literal("module", holder), argument(lowering, tuple(kwargs["grid"])), argument(lowering, given)),
            writes=tuple(given[name].name for name in written),
            versions=versions,
            effect=not written,
            origin=lowering.origin,
        )
    )
    for name, version in zip(written, versions, strict=True):
        lowering.supersede(given[name], version)
    if not functional:
        return None
    return {name: dict(zip(written, versions, strict=True)).get(name, tensors[name]) for name in wanted}


def _own(lowering: Lowering, value: Value, source: fx.Node, user: fx.Node) -> Value:
    """Memory the kernel may write: the operand's if nobody else sees it and it holds nothing yet, else a copy."""
    if str(source.target).startswith(_NEW) and list(source.users) == [user]:
        return value
    copy = Value(lowering.fresh(f"{value.name}_own"), value.dtype, value.shape, value.stride, value.device)
    return lowering.pointwise(copy, lowering.element(value, value.shape))


def _next(lowering: Lowering, value: Value) -> Value:
    return Value(lowering.fresh(f"{value.name}_new"), value.dtype, value.shape, value.stride, value.device)


def _holder(subs: SubPrograms, kernel: Any, constants: dict[str, Any], called: str) -> str:
    """The name under which the program finds the kernel: one for each kernel and set of constants."""
    for name, held in subs.modules.items():
        if isinstance(held, tuple) and held[0] is kernel and held[1] == constants:
            return name
    name = f"{called}_{len(subs.modules)}"
    subs.modules[name] = (kernel, constants)
    return name
