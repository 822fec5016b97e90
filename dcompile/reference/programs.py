"""What conditionals and loops over programs mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dcompile.errors import CompilerBug

Program = Callable[[list[Any]], Sequence[Any]]


def call_programs(op: str, args: Sequence[Any]) -> list[Any]:
    """The results of ``op`` (``lower.higher_order.CLOSED``) over programs.

    Raises:
        CompilerBug: no such op.
    """
    if op == "dcompile.cond":
        predicate, when_true, when_false, operands, *further = args
        chosen, beside = (when_true, further[0]) if bool(predicate) else (when_false, further[1])
        return list(chosen([*operands, *beside]))
    if op == "dcompile.while_loop":
        condition, body, carried, operands, condition_beside, body_beside = args
        values = [v.clone() if isinstance(v, torch.Tensor) else v for v in carried]
        while bool(condition([*values, *operands, *condition_beside])[0]):
            values = list(body([*values, *operands, *body_beside]))
        return values
    if op == "dcompile.invoke_subgraph":
        return list(args[0]([*args[2:-1], *args[-1]]))
    if op == "dcompile.map_impl":
        body, apart, operands, beside = args
        rows = [body([*(t[n] for t in apart), *operands, *beside]) for n in range(len(apart[0]))]
        return [torch.stack([row[k] for row in rows]) for k in range(len(rows[0]))]
    if op == "dcompile.scan":
        combine, first, apart, operands, beside = args
        carried, rows = list(first), []
        for n in range(len(apart[0])):
            found = list(combine([*carried, *(t[n] for t in apart), *operands, *beside]))
            carried, row = found[: len(first)], found[len(first) :]
            rows.append(row)
        return carried + [torch.stack([row[k] for row in rows]) for k in range(len(rows[0]))]
    raise CompilerBug(f"{op} has no meaning to the reference interpreter")
