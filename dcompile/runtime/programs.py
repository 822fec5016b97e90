"""Running the programs that a program calls: conditionals and loops.

A program here is a function of a list of inputs, which it empties, to a sequence of results. ``further`` is what a
program takes besides its operands (``lower.higher_order``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Program: TypeAlias = Callable[[list[Any]], Sequence[Any]]


def cond(
    predicate: Any,
    when_true: Program,
    when_false: Program,
    operands: Sequence[Any],
    true_further: Sequence[Any] = (),
    false_further: Sequence[Any] = (),
) -> Sequence[Any]:
    """Runs one of two programs. A predicate on another device is waited for."""
    if predicate:
        return when_true([*operands, *true_further])
    return when_false([*operands, *false_further])


def while_loop(
    condition: Program,
    body: Program,
    carried: Sequence[Any],
    operands: Sequence[Any],
    condition_further: Sequence[Any] = (),
    body_further: Sequence[Any] = (),
) -> Sequence[Any]:
    """Runs ``body`` on what it returned last as long as ``condition`` says so; results are never operands."""
    values = list(carried)
    ran = False
    while condition([*values, *operands, *condition_further])[0]:
        values = list(body([*values, *operands, *body_further]))
        ran = True
    return values if ran else [v.clone() if isinstance(v, Tensor) else v for v in values]


def invoke_subgraph(program: Program, identifier: Any, *operands: Any) -> Sequence[Any]:
    """Runs a program; the last argument is what it takes besides."""
    *own, further = operands
    return program([*own, *further])


def map_impl(body: Program, apart: Sequence[Tensor], operands: Sequence[Any], further: Sequence[Any] = ()) -> list[Any]:
    """Runs ``body`` for each position along the first dimension of ``apart`` and stacks the results."""
    slices = zip(*(tensor.unbind(0) for tensor in apart), strict=True)
    rows = [body([*slice_, *operands, *further]) for slice_ in slices]
    return [torch.stack(list(column)) for column in zip(*rows, strict=True)]


def scan(
    combine: Program,
    first: Sequence[Any],
    apart: Sequence[Tensor],
    operands: Sequence[Any],
    further: Sequence[Any] = (),
) -> list[Any]:
    """Runs ``combine`` along dimension 0 of ``apart``: (carried, slice) to (carried, result); results are stacked."""
    carried = list(first)
    rows = []
    for slice_ in zip(*(tensor.unbind(0) for tensor in apart), strict=True):
        found = combine([*carried, *slice_, *operands, *further])
        carried = list(found[: len(first)])
        rows.append(found[len(first) :])
    return [*carried, *(torch.stack(list(column)) for column in zip(*rows, strict=True))]


PROGRAM_OPS: dict[str, Callable[..., Any]] = {
    "dcompile.cond": cond,
    "dcompile.while_loop": while_loop,
    "dcompile.invoke_subgraph": invoke_subgraph,
    "dcompile.map_impl": map_impl,
    "dcompile.scan": scan,
}
