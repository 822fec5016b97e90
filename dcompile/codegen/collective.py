"""Host text of collectives: one line for the launch, one for the wait."""

from __future__ import annotations

from collections.abc import Callable

from dcompile.codegen.host_text import tuple_text
from dcompile.collectives.nodes import Start, Via
from dcompile.ir.types import Size


def describe(start: Start) -> str:
    """What error messages call the collective: ``"p1 = all_reduce.sum at train.py:41"``."""
    kind = f"{start.kind.value}.{start.reduction}" if start.reduction else start.kind.value
    place = f" at {start.origin.source}" if start.origin.source else ""
    return f"{start.pending.name} = {kind}{place}"


def start_text(
    start: Start, handle: str, tensor: Callable[[str], str], sizes: Callable[[tuple[Size, ...]], str]
) -> str:
    """The launch: ``handle = start(kind, sources, results, group, reduction, root, in_place, name[, splits][, via])``.

    Args:
        handle: variable of the work handle.
        tensor: the expression of a tensor by its IR name.
        sizes: the expression of a tuple of sizes.
    """
    sources = [tensor(name) for name in start.sources]
    results = sources if start.pending.in_place else [tensor(value.name) for value in start.pending.results]
    options = (start.group.label, start.reduction, start.root, start.pending.in_place, describe(start))
    arguments = ", ".join(repr(option) for option in options)
    if start.in_splits:
        arguments += f", ({sizes(start.in_splits)}, {sizes(start.out_splits)})"
    if start.via is not Via.LIBRARY:
        arguments += f", via={start.via.value!r}"
    return f"{handle} = start({start.kind.value!r}, {tuple_text(sources)}, {tuple_text(results)}, {arguments})"


def wait_text(handle: str) -> str:
    """The wait: the results are in planned memory afterwards."""
    return f"wait({handle})"
