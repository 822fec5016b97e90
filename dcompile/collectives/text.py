"""Text form of graphs with collectives. Use this ``print_graph`` and ``parse_graph``: they know every node.

Grammar, beside that of ``ir.text``::

    pending = name ":" "pending" ["in" "place"] (values)
    node    = pending "=" "start" kind["."reduction] (names) "@" label "[" size "]" ["root" n]
              ["splits" "[" sizes "]" "->" "[" sizes "]"] ["via" lowering]
            | value, ... "=" "wait" pending
"""

from __future__ import annotations

from dcompile.collectives.group import Group
from dcompile.collectives.nodes import REDUCTIONS, Kind, Pending, Start, Via, Wait
from dcompile.ir.text import parse_expr, parse_graph, print_expr, print_graph, print_node
from dcompile.ir.text_node import (
    DefGrammar,
    NodeGrammar,
    Reader,
    print_defs,
    print_names,
    print_sizes,
    register_def,
    register_node,
)
from dcompile.ir.tokens import quote_name
from dcompile.ir.types import Def, Size, Value


def _print_pending(pending: Pending) -> str:
    return f"{' in place' if pending.in_place else ''} ({print_defs(pending.results)})"


def _read_pending(reader: Reader, name: str) -> Pending:
    in_place = reader.accept("in")
    if in_place:
        reader.expect("place")
    return Pending(name, reader.values(), in_place)


def _print_start(node: Start) -> str:
    kind = node.kind.value + (f".{node.reduction}" if node.reduction is not None else "")
    root = f" root {node.root}" if node.root is not None else ""
    splits = ""
    if node.in_splits or node.out_splits:
        splits = f" splits [{print_sizes(node.in_splits)}] -> [{print_sizes(node.out_splits)}]"
    via = "" if node.via is Via.LIBRARY else f" via {node.via.value}"
    group = f"@{quote_name(node.group.label)}[{node.group.size}]"
    return f"{kind} ({print_names(node.sources)}) {group}{root}{splits}{via}"


def _read_start(reader: Reader, left: tuple[Def | None, ...]) -> Start:
    if len(left) != 1 or not isinstance(left[0], Pending):
        reader.fail("one pending left of '= start'")
    token = reader.peek()
    kind, _, reduction = reader.word("a kind of collective").partition(".")
    if kind not in {k.value for k in Kind}:
        reader.fail(f"a kind of collective ({', '.join(k.value for k in Kind)})", token)
    if reduction and reduction not in REDUCTIONS:
        reader.fail(f"a reduction ({', '.join(REDUCTIONS)})", token)
    sources = reader.names()
    reader.expect("@")
    label = reader.name("the label of a group")
    reader.expect("[")
    size = reader.integer("the size of the group")
    reader.expect("]")
    root = reader.integer("the root's rank") if reader.accept("root") else None
    in_splits, out_splits = _read_splits(reader) if reader.accept("splits") else ((), ())
    via = _read_via(reader) if reader.accept("via") else Via.LIBRARY
    return Start(
        pending=left[0], kind=Kind(kind), group=Group(label, size), sources=sources, reduction=reduction or None,
        root=root, in_splits=in_splits, out_splits=out_splits, via=via,
    )  # fmt: skip


def _read_via(reader: Reader) -> Via:
    token = reader.peek()
    name = reader.word("a lowering")
    if name not in {via.value for via in Via}:
        reader.fail(f"a lowering ({', '.join(via.value for via in Via)})", token)
    return Via(name)


def _read_splits(reader: Reader) -> tuple[tuple[Size, ...], tuple[Size, ...]]:
    reader.expect("[")
    in_splits = reader.sequence(reader.size, "]")
    reader.expect("->")
    reader.expect("[")
    return in_splits, reader.sequence(reader.size, "]")


def _print_wait(node: Wait) -> str:
    return quote_name(node.pending)


def _read_wait(reader: Reader, left: tuple[Def | None, ...]) -> Wait:
    return Wait(outs=tuple(out for out in left if isinstance(out, Value)), pending=reader.name("a pending"))


register_def(DefGrammar("pending", Pending, _print_pending, _read_pending))
register_node(NodeGrammar("start", Start, _print_start, _read_start))
register_node(NodeGrammar("wait", Wait, _print_wait, _read_wait))

__all__ = ["parse_expr", "parse_graph", "print_expr", "print_graph", "print_node"]
