"""Ops without a lowering rule: the library op is called as it is, as an Extern node.

``LIBRARY_OPS`` are ops for which the call is the intended lowering (a library does them better than a generated loop
would); everything else is a fallback, counted and named by ``dcompile.explain``.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch

from dcompile.errors import Unsupported
from dcompile.ir.nodes import Arg, Extern, Literal, Ref
from dcompile.ir.symbolic import find
from dcompile.ir.types import DType, Number, Value
from dcompile.lower.builder import Lowering

_ATTENTION = frozenset(
    {
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_backward",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_efficient_attention_backward",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_cudnn_attention_backward",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_fused_attention_overrideable_backward",
        "_flash_attention_forward",
        "_flash_attention_backward",
        "_efficient_attention_forward",
        "_efficient_attention_backward",
    }
)
_CONVOLUTION = frozenset({"convolution", "convolution_backward", "cudnn_convolution", "mkldnn_convolution"})
_MATMUL = frozenset(
    {
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "addbmm",
        "mv",
        "addmv",
        "dot",
        "vdot",
        "addr",
        "_int_mm",
        "_scaled_mm",
        "_addmm_activation",
    }
)
_ORDER = frozenset({"sort", "topk", "kthvalue", "median", "nanmedian", "mode", "searchsorted", "bucketize", "argsort"})
_SCAN = frozenset({"cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"})
_FFT = frozenset({"_fft_r2c", "_fft_c2r", "_fft_c2c"})
_LINALG = frozenset(
    {
        "linalg_cholesky_ex",
        "_linalg_check_errors",
        "lu_unpack",
        "linalg_eig",
        "_linalg_eigh",
        "linalg_qr",
        "_linalg_svd",
        "_linalg_det",
        "_linalg_slogdet",
        "_linalg_solve_ex",
        "linalg_solve_triangular",
        "linalg_inv_ex",
        "linalg_lu",
        "linalg_lu_factor_ex",
        "linalg_lu_solve",
        "linalg_householder_product",
        "linalg_ldl_factor_ex",
        "linalg_lstsq",
        "linalg_matrix_exp",
        "cholesky_inverse",
        "cholesky_solve",
        "ormqr",
        "geqrf",
        "triangular_solve",
    }
)
_MEMORY = frozenset({"empty", "empty_strided", "_to_copy", "cat"})
"""Allocation, transfers between devices, and concatenation of many parts: nothing is computed."""
_RECURRENT = frozenset({"mkldnn_rnn_layer", "mkldnn_rnn_layer_backward"})
LIBRARIES = frozenset({"mkldnn", "mkl", "onednn"})
"""Namespaces of ops that are library kernels, with their epilogues."""
_ASSERTION = frozenset({"_assert_async"})
_DATA_SIZED = frozenset(
    {"nonzero", "masked_select", "repeat_interleave", "_unique", "_unique2", "unique_dim", "unique_consecutive"}
)
LIBRARY_OPS = (
    _RECURRENT
    | _DATA_SIZED
    | _ASSERTION
    | _ATTENTION
    | _CONVOLUTION
    | _MATMUL
    | _ORDER
    | _SCAN
    | _FFT
    | _LINALG
    | _MEMORY
)
"""ATen op names (without overload) whose library call is no fallback; nor is a call that decides a size."""

COMMUNICATING = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd", "symm_mem", "_dtensor"})
"""Namespaces whose ops talk to other ranks. One without a rule is a barrier: nothing moves across it."""


def convert(lowering: Lowering, arg: Any) -> Arg:
    """An argument of a traced call, as an argument of an Extern.

    Raises:
        Unsupported: a kind of object that generated programs cannot carry.
    """
    if isinstance(arg, Value):
        return Ref(arg.name)
    if isinstance(arg, Ref):
        return arg
    if arg is None or isinstance(arg, bool | int | float | str | sympy.Expr):
        return arg
    if isinstance(arg, complex):
        return Literal("complex", repr(arg))
    if isinstance(arg, list | tuple):
        return tuple(convert(lowering, item) for item in arg)
    if isinstance(arg, torch.dtype):
        known = DType.of(arg)
        return Literal("dtype", known.value if known else str(arg).removeprefix("torch."))
    if isinstance(arg, torch.device):
        return Literal("device", arg.type)
    if isinstance(arg, torch.memory_format | torch.layout):
        kind = "layout" if isinstance(arg, torch.layout) else "memory_format"
        return Literal(kind, str(arg).removeprefix("torch."))
    if isinstance(arg, torch.SymInt):
        return lowering.sizes.size(arg)
    raise Unsupported(
        lowering.origin,
        what=f"an argument of type {type(arg).__name__} in a call of {lowering.node.target}",
        instead="keep this call outside the compiled function",
    )


def call_library(lowering: Lowering, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], chosen: bool) -> Any:
    """Emit ``op`` as an Extern and give what it returns.

    Outputs that share storage with an argument and arguments it writes are taken from the op's schema.

    Args:
        chosen: the user keeps the op eager, so the call is no fallback.
    """
    schema = op._schema
    namespace, _, rest = schema.name.partition("::")
    written, sharing = _aliasing(schema, args, kwargs)
    for value in written:
        lowering.flights.settle(lowering.root(value))
    outs: list[Value | None] = list(lowering.outs)
    returned: list[Value | None] = list(outs)
    versions = tuple(Value(lowering.fresh(f"{w.name}_new"), w.dtype, w.shape, w.stride, w.device) for w in written)
    aliases: list[str | None] = [None] * len(outs)
    for position, info in enumerate(schema.returns[: len(outs)]):
        source = sharing.get(_alias_set(info))
        if source is None or len(schema.returns) != len(outs):
            continue
        if source in written:  # the op returns the very argument it wrote
            outs[position] = None
            returned[position] = versions[written.index(source)]
        else:
            aliases[position] = source.name
    told = _told_numbers(lowering)
    numbers = (*told, *lowering.learn(lowering.outs))
    args, kwargs = _plain_numbers(schema, args, kwargs)
    call = Extern(
        outs=tuple(outs),
        op=str(op),
        args=convert(lowering, args),
        kwargs=tuple((name, convert(lowering, arg)) for name, arg in kwargs.items()),
        binds=numbers,
        writes=tuple(w.name for w in written),
        versions=versions,
        aliases=tuple(aliases) if any(aliases) else (),
        effect=_has_effect(op, rest, kwargs, args),
        fallback=not (chosen or namespace in LIBRARIES)
        and not (namespace == "aten" and (rest.split(".")[0] in LIBRARY_OPS or numbers)),
        barrier=namespace in COMMUNICATING,
        seq=_returns_sequence(schema),
        nested=_is_nested(schema),
        promises=tuple((at, n) for at, n in lowering.numbers.items() if at not in {number.at for number in told}),
        origin=lowering.origin,
    )
    for number in call.binds:
        if find(number, call) is None:
            raise Unsupported(
                lowering.origin,
                what=f"a result of {op} whose size {number.name} cannot be solved for",
                instead="keep this call outside the compiled function",
            )
    lowering.emit(call)
    for old, new in zip(written, versions, strict=True):
        lowering.supersede(old, new)
    return tuple(returned) if _returns_sequence(schema) else (returned[0] if returned else None)


def _plain_numbers(
    schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Where the op takes a number and the program has it in a tensor, the number is read from it."""

    def plain(position: int | None, name: str, value: Any) -> Any:
        if not isinstance(value, Value):
            return value
        argument = next(
            (a for n, a in enumerate(schema.arguments) if (n == position if position is not None else a.name == name)),
            None,
        )
        wants = "" if argument is None else str(argument.type)
        return value if "Tensor" in wants or argument is None else Ref(value.name, item=True)

    return (
        tuple(plain(position, "", value) for position, value in enumerate(args)),
        {name: plain(None, name, value) for name, value in kwargs.items()},
    )


def _told_numbers(lowering: Lowering) -> tuple[Number, ...]:
    """Those of the numbers among the results that the program learns only from this call."""
    sizes = lowering.sizes
    found = [(at, n) for at, n in lowering.numbers.items() if isinstance(n, sympy.Symbol) and n in sizes.unlearned]
    sizes.told(n for _, n in found)
    return tuple(Number(n.name, sizes.hints[n], at) for at, n in found)


def gives_only_numbers(op: Any) -> bool:
    """Whether a custom op returns numbers, or nothing, and no tensor."""
    schema = op._schema
    return op.namespace not in _BUILT_IN and not any("Tensor" in str(info.type) for info in schema.returns)


_BUILT_IN = frozenset({"aten", "prims", "prim", *COMMUNICATING})


def _is_nested(schema: Any) -> bool:
    return len(schema.returns) > 1 and any(
        "[]" in str(info.type) or "List" in str(info.type) for info in schema.returns
    )


def _returns_sequence(schema: Any) -> bool:
    returns = schema.returns
    return len(returns) > 1 or (len(returns) == 1 and returns[0].type.kind() == "ListType")


def _alias_set(item: Any) -> str:
    info = item.alias_info
    return ",".join(sorted(info.before_set)) if info is not None else ""


def _aliasing(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Value], dict[str, Value]]:
    """Values the call writes, and by alias set of the schema the argument that carries it."""
    written: list[Value] = []
    sharing: dict[str, Value] = {}
    for position, argument in enumerate(schema.arguments):
        info = argument.alias_info
        if info is None:
            continue
        actual = args[position] if position < len(args) else kwargs.get(argument.name)
        for value in actual if isinstance(actual, tuple) else (actual,):
            if not isinstance(value, Value):
                continue
            if info.is_write and value not in written:
                written.append(value)
            sharing.setdefault(_alias_set(argument), value)
    return written, sharing


def _has_effect(op: Any, name: str, kwargs: dict[str, Any], args: tuple[Any, ...]) -> bool:
    """Whether the call must stay although unused: it draws random numbers, or returns nothing at all."""
    if name.split(".")[0] in _ATTENTION:  # tagged random for their dropout, which is mostly off
        schema = op._schema
        at = next((n for n, a in enumerate(schema.arguments) if a.name == "dropout_p"), None)
        drop = kwargs.get("dropout_p", args[at] if at is not None and at < len(args) else 0.0)
        return drop != 0.0 and "backward" not in name
    tags = getattr(op, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or not op._schema.returns or gives_only_numbers(op)
