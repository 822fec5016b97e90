"""The table of collectives: result shapes and dtypes, in-place rules and bytes, one row a kind."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import sympy

from dcompile.collectives.nodes import MOVES, REDUCTIONS, Kind, Start, Via
from dcompile.errors import CompilerBug, Unsupported
from dcompile.ir.graph import Graph, hint
from dcompile.ir.index import FloorDiv, as_expr, as_size, simplify
from dcompile.ir.types import DType, Size, Value, contiguous_stride


class Rows(Enum):
    """How dimension 0 of a result follows from that of its source, for ``n`` ranks."""

    SAME = "same"
    TIMES_GROUP = "times n"
    OVER_GROUP = "divided by n"


@dataclass(frozen=True)
class Rule:
    """One kind of collective.

    Attributes:
        rows: dimension 0 of a result; the other dimensions are the source's.
        in_place: result may be the source's own storage.
        reduces: takes one of ``REDUCTIONS``.
        rooted: takes the sending rank.
        divides: dimension 0 of a source must be a multiple of the group size.
    """

    rows: Rows
    in_place: bool = False
    reduces: bool = False
    rooted: bool = False
    divides: bool = False


RULES: dict[Kind, Rule] = {
    Kind.ALL_REDUCE: Rule(Rows.SAME, in_place=True, reduces=True),
    Kind.ALL_GATHER: Rule(Rows.TIMES_GROUP),
    Kind.REDUCE_SCATTER: Rule(Rows.OVER_GROUP, reduces=True, divides=True),
    Kind.BROADCAST: Rule(Rows.SAME, in_place=True, rooted=True),
    Kind.ALL_TO_ALL: Rule(Rows.SAME, divides=True),
}

BITWISE = frozenset({"band", "bor", "bxor"})
"""Reductions of integers and bool only."""


def result_shape(
    kind: Kind, shape: tuple[Size, ...], group_size: int, out_splits: tuple[Size, ...] = ()
) -> tuple[Size, ...]:
    """Shape of the result of one source. A scalar gathers and scatters as one row.

    Args:
        out_splits: see ``Start``.

    Raises:
        ValueError: dimension 0 is not a multiple of the group size where it must be, or there is none to split.
    """
    rule = RULES[kind]
    if out_splits:
        if not shape:
            raise ValueError(f"{kind.value} of a tensor without dimensions in shares")
        return (total_rows(out_splits), *shape[1:])
    if rule.divides and (not shape or not _divides(group_size, shape[0])):
        rows = shape[0] if shape else "no"
        raise ValueError(f"{kind.value} over {group_size} ranks of {rows} rows")
    if rule.rows is Rows.TIMES_GROUP:
        return (as_size(as_expr(shape[0]) * group_size), *shape[1:]) if shape else (group_size,)
    if rule.rows is Rows.OVER_GROUP:
        return (as_size(simplify(FloorDiv(as_expr(shape[0]), sympy.Integer(group_size)), {})), *shape[1:])
    return shape


def total_rows(splits: tuple[Size, ...]) -> Size:
    """Rows of all shares together."""
    return as_size(sympy.expand(sum((as_expr(rows) for rows in splits), sympy.Integer(0))))


def result_value(kind: Kind, name: str, source: Value, group_size: int, out_splits: tuple[Size, ...] = ()) -> Value:
    """The contiguous result of one source, under ``name``; the dtype and device are the source's.

    Raises:
        ValueError: see ``result_shape``.
    """
    shape = result_shape(kind, source.shape, group_size, out_splits)
    return Value(name, source.dtype, shape, contiguous_stride(shape), source.device)


def payload_bytes(start: Start, graph: Graph) -> int:
    """The one convention for bytes of a collective: the larger of sources and results on one rank, at the size hints.

    That is the buffer of an all-reduce or broadcast, the gathered result of an all-gather, the full input of a
    reduce-scatter, the input of an all-to-all; coalesced collectives count all their buffers.
    """
    sources = sum(_dense_bytes(graph.value(name), graph) for name in start.sources)
    return max(sources, sum(_dense_bytes(result, graph) for result in start.pending.results))


def check(start: Start, graph: Graph) -> None:
    """Hold a launch against the table.

    Raises:
        Unsupported: the user asks for what no backend does (rows not divisible by the group, bitwise of floats).
        CompilerBug: the node itself is malformed.
    """
    rule, kind = RULES[start.kind], start.kind.value
    _check_form(start, rule)
    for n, (name, result) in enumerate(zip(start.sources, start.pending.results, strict=True)):
        source = graph.value(name)
        if not is_contiguous(source):
            raise CompilerBug(f"{kind}: source {name} is not contiguous (shape {source.shape}, stride {source.stride})")
        expected = check_source(start, result.name, source)
        same = expected.dtype is result.dtype and expected.device == result.device
        if not same or not _same_shape(expected.shape, result.shape):
            raise CompilerBug(f"{kind}: result {n} is {result}, the rule gives {expected}")


def check_source(start: Start, result: str, source: Value) -> Value:
    """The result of one source by the table, under the name ``result``.

    Raises:
        Unsupported: see ``check``.
    """
    if start.reduction in BITWISE and not (source.dtype.is_int or source.dtype is DType.BOOL):
        raise Unsupported(
            start.origin,
            f"{start.kind.value} with reduction {start.reduction} of {source.dtype.value} values",
            "reduce an integer or bool tensor, or use another reduction",
        )
    if start.in_splits and source.shape:
        _check_rows(start, source)
    try:
        return result_value(start.kind, result, source, start.group.size, start.out_splits)
    except ValueError as error:
        raise Unsupported(start.origin, str(error), f"pad dimension 0 to a multiple of {start.group.size}") from None


def _check_form(start: Start, rule: Rule) -> None:
    kind = start.kind.value
    if not start.sources or len(start.sources) != len(start.pending.results):
        raise CompilerBug(f"{kind}: {len(start.sources)} sources but {len(start.pending.results)} results")
    if start.pending.in_place and not rule.in_place:
        raise CompilerBug(f"{kind} cannot work in place")
    if start.pending.in_place and len(set(start.sources)) != len(start.sources):
        raise CompilerBug(f"{kind} in place over the same source twice")
    if (start.reduction is not None) is not rule.reduces or (rule.reduces and start.reduction not in REDUCTIONS):
        raise CompilerBug(f"{kind} with reduction {start.reduction}")
    if (start.root is not None) is not rule.rooted:
        raise CompilerBug(f"{kind} with root {start.root}")
    if start.root is not None and not 0 <= start.root < start.group.size:
        raise CompilerBug(f"{kind} from rank {start.root} of a group of {start.group.size}")
    if (start.in_splits or start.out_splits) and (start.kind is not Kind.ALL_TO_ALL or len(start.sources) != 1):
        raise CompilerBug(f"{kind} of {len(start.sources)} sources with splits")
    if len(start.in_splits) != len(start.out_splits):
        raise CompilerBug(f"{kind} with splits of {len(start.in_splits)} and {len(start.out_splits)} ranks")
    if start.via is Via.PEERS and (start.kind not in MOVES or start.in_splits or start.pending.in_place):
        raise CompilerBug(f"{kind} via {start.via.value}")
    if start.group.size < 1:
        raise CompilerBug(f"{kind} over a group of {start.group.size}")


def _check_rows(start: Start, source: Value) -> None:
    """The shares sent are of as many ranks as the group has and make up the source, as far as sizes are known."""
    for word, splits in (("input", start.in_splits), ("output", start.out_splits)):
        if len(splits) != start.group.size:
            raise Unsupported(
                start.origin,
                f"all_to_all over {start.group.size} ranks with {len(splits)} {word} splits",
                "give one split for each rank of the group",
            )
        if any(isinstance(rows, int) and rows < 0 for rows in splits):
            raise Unsupported(start.origin, f"all_to_all with {word} splits {list(splits)}", "give sizes of at least 0")
    sent = total_rows(start.in_splits)
    if isinstance(sent, int) and isinstance(source.shape[0], int) and sent != source.shape[0]:
        raise Unsupported(
            start.origin,
            f"all_to_all with input splits {list(start.in_splits)} of a tensor of {source.shape[0]} rows",
            f"make the splits add up to {source.shape[0]}",
        )


def is_contiguous(value: Value) -> bool:
    """Whether the elements lie side by side in row-major order: sizes 1 have any stride, an empty tensor always is."""
    if value.stride == contiguous_stride(value.shape):
        return True
    if any(size == 0 for size in value.shape):
        return True
    step: Size = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride), strict=True):
        if size == 1:
            continue
        if sympy.expand(as_expr(stride) - as_expr(step)) != 0:
            return False
        step = step * size
    return True


def _divides(group_size: int, rows: Size) -> bool:
    """Whether ``rows`` may be a multiple of ``group_size``: certain for static rows; for symbolic ones not refuted."""
    terms = sympy.Add.make_args(sympy.expand(as_expr(rows)))
    rest = sum((t for t in terms if not _is_multiple(t, group_size)), sympy.Integer(0))
    return bool(rest == 0 or not rest.is_Integer)


def _is_multiple(term: sympy.Expr, divisor: int) -> bool:
    coefficient = term.as_coeff_Mul()[0]
    return bool(coefficient.is_Integer and int(coefficient) % divisor == 0)


def _same_shape(left: tuple[Size, ...], right: tuple[Size, ...]) -> bool:
    return len(left) == len(right) and all(
        sympy.expand(as_expr(a) - as_expr(b)) == 0 for a, b in zip(left, right, strict=True)
    )


def _dense_bytes(value: Value, graph: Graph) -> int:
    return hint(value.numel, graph.size_hints) * value.dtype.itemsize
