"""Text form of graphs: every level prints and parses, ``parse_graph(print_graph(g)) == g``.

Grammar (values and axes: ``text_node``; scalar expressions: ``text_expr``; kernels: ``text_kernel``)::

    graph  = "graph" name "(" (value | symbol ":" "size" "=" hint), ... ")"
             "{" graph... node... "return" output, ... "}"
    node   = [(def | "_"), ... "="] keyword ... ["#" op... "@" source]              # the comment is the node's origin
           | value "=" "pointwise" (axes) exprs
           | value "=" "reduce" kind (axes ";" axes) exprs                              # welford: three values
           | value, ... "=" "scan" (axes) "along" variable "(" exprs, ... ")" rule       # rule: text_kernel
           | value "=" "view" base (axes) "->" "[" index, ... "]"
           | value "=" "store" mode target (axes) [lets] "[" index, ... [bind] "]" "=" expr
           | value "=" "pack" (names)
           | outs "=" "extern" op "(" arg, ..., key "=" arg, ... ")" ["->" out_op] ["writes" (names)]
             ["versions" (values)] ["aliases" (names)] ["binds" "(" symbol "=" hint ["at" position], ... ")"]
             ["promises" "(" number ":" arg, ... ")"] ["effect"] ["fallback"] ["barrier"] ["seq"] ["nested"]
    arg    = "%" name ["item"] | "<" kind value ">" | "none" | "true" | "false" | number | string | size
           | "[" arg, ... "]"
    output = "%" name | "none" | "true" | "false" | float | size

Line breaks mean nothing except that a comment belongs to the line it ends. Other packages add node grammars through
``text_node.register_node``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import sympy

from dcompile.ir import text_kernel
from dcompile.ir.graph import Graph, Output, SizeInput
from dcompile.ir.index import symbol
from dcompile.ir.kernel import Kernel
from dcompile.ir.nodes import Arg, Extern, Literal, Node, Pack, Pointwise, Reduction, Ref, Scan, Store, View
from dcompile.ir.ops import REDUCTIONS, STORE_MODES, WELFORD
from dcompile.ir.text_expr import parse_expr, print_bind, print_expr, print_expr_list, print_exprs, print_position
from dcompile.ir.text_index import parse_index, print_index
from dcompile.ir.text_kernel import print_rule, read_rule
from dcompile.ir.text_node import (
    NodeGrammar,
    Reader,
    grammar_of,
    keyword_grammar,
    keywords,
    print_axes,
    print_def,
    print_defs,
    print_names,
    register_node,
)
from dcompile.ir.tokens import quote_name
from dcompile.ir.types import Def, Number, Origin, Value

_FLAGS = ("effect", "fallback", "barrier", "seq", "nested")
print_body = text_kernel.print_body


def print_graph(graph: Graph) -> str:
    """The text of ``graph``, ending in a line break."""
    inputs = ", ".join(
        f"{quote_name(i.symbol.name)}: size = {i.hint}" if isinstance(i, SizeInput) else print_def(i)
        for i in graph.inputs
    )
    lines = [line for inner in graph.graphs for line in print_graph(inner).splitlines()]
    lines += [line for node in graph.nodes for line in print_node(node).split("\n")]
    lines.append("return " + ", ".join(_print_arg(out) for out in graph.outputs))
    body = "".join(f"  {line.rstrip()}\n" for line in lines)
    return f"graph {quote_name(graph.name)}({inputs}) {{\n{body}}}\n"


def print_node(node: Node) -> str:
    """The text of one node: a line, and for kernels an indented block."""
    grammar = grammar_of(node)
    left = print_defs(grammar.left(node))
    body = grammar.print(node)
    first, *rest = f"{left}{' = ' if left else ''}{grammar.keyword} {body}".rstrip().split("\n")
    return "\n".join((first + _print_origin(node.origin), *rest))


def _print_origin(origin: Origin) -> str:
    words = list(origin.ops) + ([f"@{origin.source}"] if origin.source else [])
    return f"  # {' '.join(words)}" if words else ""


def parse_graph(text: str) -> Graph:
    """The graph ``text`` stands for.

    Raises:
        ParseError: with line, column and what was expected.
    """
    reader = Reader(text)
    graph = _read_graph(reader)
    reader.end()
    return graph


def _read_graph(reader: Reader) -> Graph:
    reader.expect("graph")
    name = reader.name("the graph's name")
    reader.expect("(")
    inputs = reader.sequence(lambda: _read_input(reader), ")")
    reader.expect("{")
    graphs: list[Graph] = []
    while reader.at("graph") and reader.peek(1).text != ":":
        outer = reader.defs, reader.buffers
        reader.defs, reader.buffers = {}, {}
        graphs.append(_read_graph(reader))
        reader.defs, reader.buffers = outer
    nodes: list[Node] = []
    while not reader.accept("return"):
        nodes.append(read_node(reader))
    outputs: tuple[Output, ...] = reader.sequence(lambda: _read_arg(reader), "}")
    return Graph(name, inputs, tuple(nodes), outputs, tuple(graphs))


def read_node(reader: Reader) -> Node:
    """Parse one node at the cursor and make what it defines known.

    Raises:
        ParseError: with line, column and what was expected.
    """
    left: list[Def | None] = []
    if reader.at("_") or reader.peek(1).text == ":":
        while True:
            left.append(None if reader.accept("_") else reader.definition())
            if not reader.accept(","):
                break
        reader.expect("=")
    token = reader.peek()
    grammar = keyword_grammar(token.text)
    if grammar is None:
        reader.fail(f"a node ({', '.join(keywords())}) or 'return'")
    reader.next()
    node = grammar.read(reader, tuple(left))
    if grammar.left(node) != tuple(left):
        reader.fail(f"other results left of '{grammar.keyword}'", token)
    for item in node.defs:
        reader.define(item)
    line = token.line if isinstance(node, Kernel) else reader.last_line
    return _with_origin(node, reader.comments.get(line, ""))


def _with_origin(node: Node, comment: str) -> Node:
    if not comment:
        return node
    ops, _, source = f" {comment}".partition(" @")
    return replace(node, origin=Origin(tuple(ops.split()), source))


def _read_input(reader: Reader) -> Value | SizeInput:
    if reader.peek(1).text == ":" and reader.peek(2).text == "size":
        var = symbol(reader.name())
        reader.expect(":")
        reader.expect("size")
        reader.expect("=")
        return SizeInput(var, reader.integer("a size hint"))
    value = reader.value()
    reader.define(value)
    return value


def _only_value(reader: Reader, left: tuple[Def | None, ...]) -> Value:
    if len(left) != 1 or not isinstance(left[0], Value):
        reader.fail("one tensor left of '='")
    return left[0]


def _values(reader: Reader, left: tuple[Def | None, ...], count: int) -> tuple[Value, ...]:
    found = tuple(item for item in left if isinstance(item, Value))
    if len(found) != count or len(left) != count:
        reader.fail(f"{count} tensors left of '='")
    return found


def _print_pointwise(node: Pointwise) -> str:
    return f"({print_axes(node.axes)}) {print_expr(node.expr)}"


def _read_pointwise(reader: Reader, left: tuple[Def | None, ...]) -> Pointwise:
    return Pointwise(out=_only_value(reader, left), axes=reader.axes(), expr=reader.expr())


def _print_reduction(node: Reduction) -> str:
    entering = print_expr_list(node.exprs) if node.others else print_expr(node.expr)
    return f"{node.kind} ({print_axes(node.axes)}; {print_axes(node.raxes)}) {entering}"


def _read_reduction(reader: Reader, left: tuple[Def | None, ...]) -> Reduction:
    token = reader.peek()
    kind = reader.word("a reduction")
    if kind not in REDUCTIONS:
        reader.fail(f"a reduction ({', '.join(sorted(REDUCTIONS))})", token)
    reader.expect("(")
    axes = reader.sequence(reader.axis, ";")
    raxes = reader.sequence(reader.axis, ")")
    if kind not in WELFORD:
        return Reduction(out=_only_value(reader, left), kind=kind, axes=axes, raxes=raxes, expr=reader.expr())
    out, *more = _values(reader, left, 3)
    exprs = reader.expr_list() if kind == "welford_merge" else (reader.expr(),)
    if len(exprs) not in (1, 3):
        reader.fail("a mean, a sum of squared distances and a weight", token)
    return Reduction(
        out=out, kind=kind, axes=axes, raxes=raxes, expr=exprs[0], more=tuple(more), others=tuple(exprs[1:])
    )


def _print_scan(node: Scan) -> str:
    text = f"({print_axes(node.axes)}) along {quote_name(node.along.name)} {print_expr_list(node.exprs)}"
    return text + print_rule(node.combine, node.start)


def _read_scan(reader: Reader, left: tuple[Def | None, ...]) -> Scan:
    axes = reader.axes()
    reader.expect("along")
    along = symbol(reader.name("the scanned axis"))
    exprs = reader.expr_list()
    combine, start = read_rule(reader, exprs)
    outs = _values(reader, left, len(exprs))
    return Scan(outs=outs, axes=axes, along=along, exprs=exprs, combine=combine, start=start)


def _print_view(node: View) -> str:
    return f"{quote_name(node.base)} ({print_axes(node.axes)}) -> [{print_position(node.index)}]"


def _read_view(reader: Reader, left: tuple[Def | None, ...]) -> View:
    base = reader.name("the base of the view")
    axes = reader.axes()
    reader.expect("->")
    token = reader.peek()
    index, bind = reader.position()
    if bind:
        reader.fail("an index without bindings", token)
    return View(out=_only_value(reader, left), base=base, axes=axes, index=index)


def _print_store(node: Store) -> str:
    lets, (value, *bind) = print_exprs((node.expr, *node.bind))
    where = f"[{print_position(node.index)}{print_bind(bind)}]"
    return f"{node.mode} {quote_name(node.target)} ({print_axes(node.axes)}) {lets}{where} = {value}"


def _read_store(reader: Reader, left: tuple[Def | None, ...]) -> Store:
    token = reader.peek()
    mode = reader.word("a mode")
    if mode not in STORE_MODES:
        reader.fail("a mode (set or add)", token)
    target = reader.name("the target")
    axes = reader.axes()
    outer = reader.scalars
    reader.read_lets()
    index, bind = reader.position()
    reader.expect("=")
    value = reader.operand()
    reader.scalars = outer
    return Store(out=_only_value(reader, left), target=target, axes=axes, index=index, expr=value, bind=bind, mode=mode)


def _print_pack(node: Pack) -> str:
    return f"({print_names(node.parts)})"


def _read_pack(reader: Reader, left: tuple[Def | None, ...]) -> Pack:
    return Pack(out=_only_value(reader, left), parts=reader.names())


def _print_arg(arg: Arg) -> str:
    if isinstance(arg, Ref):
        return f"%{quote_name(arg.name)}{' item' if arg.item else ''}"
    if isinstance(arg, Literal):
        return f"<{quote_name(arg.kind)} {json.dumps(arg.value)}>"
    if arg is None or isinstance(arg, bool):
        return {None: "none", True: "true", False: "false"}[arg]
    if isinstance(arg, str):
        return json.dumps(arg)
    if isinstance(arg, float):
        return repr(arg)
    if isinstance(arg, int | sympy.Expr):
        return print_index(arg)
    if isinstance(arg, tuple):
        return f"[{', '.join(_print_arg(item) for item in arg)}]"
    raise ValueError(f"{arg!r} has no text form as an argument of a library call")


def _read_arg(reader: Reader) -> Any:
    token = reader.peek()
    if reader.accept("%"):
        return Ref(reader.name("the name of an operand"), reader.accept("item"))
    if reader.accept("<"):
        kind = reader.name("the kind of the literal")
        value = _read_string(reader)
        reader.expect(">")
        return Literal(kind, value)
    for word, constant in (("none", None), ("true", True), ("false", False)):
        if reader.accept(word):
            return constant
    if token.kind == "string":
        return _read_string(reader)
    if reader.accept("["):
        return reader.sequence(lambda: _read_arg(reader), "]")
    number = reader.peek(1) if reader.at("-") else token
    if number.kind == "float" or (number.kind == "name" and number.text in ("inf", "nan")):
        negative = reader.accept("-")
        magnitude = float(reader.next().text)
        return -magnitude if negative else magnitude
    return reader.size()


def _read_string(reader: Reader) -> str:
    token = reader.peek()
    if token.kind != "string":
        reader.fail("a string")
    found = json.loads(reader.next().text)
    return str(found)


def _print_extern(node: Extern) -> str:
    args = [_print_arg(a) for a in node.args] + [f"{k} = {_print_arg(a)}" for k, a in node.kwargs]
    text = f"{node.op}({', '.join(args)})"
    if node.out_op is not None:
        text += f" -> {node.out_op}"
    if node.writes:
        text += f" writes ({print_names(node.writes)})"
    if node.versions:
        text += f" versions ({print_defs(node.versions)})"
    if node.aliases:
        text += f" aliases ({print_names(node.aliases)})"
    if node.binds:
        text += f" binds ({', '.join(map(_print_number, node.binds))})"
    if node.promises:
        text += f" promises ({', '.join(f'{at}: {_print_arg(number)}' for at, number in node.promises)})"
    return text + "".join(f" {flag}" for flag in _FLAGS if getattr(node, flag))


def _read_extern(reader: Reader, left: tuple[Def | None, ...]) -> Extern:
    op = reader.word("the name of an operator")
    reader.expect("(")
    args: list[Arg] = []
    kwargs: list[tuple[str, Arg]] = []
    while not reader.at(")"):
        following = reader.peek(1)
        if reader.peek().kind in ("name", "quoted") and following.kind == "sign" and following.text == "=":
            key = reader.next().text.strip("`")
            reader.next()
            kwargs.append((key, _read_arg(reader)))
        elif kwargs:
            reader.fail("a keyword argument")
        else:
            args.append(_read_arg(reader))
        if not reader.accept(","):
            break
    reader.expect(")")
    out_op = reader.word("the name of an operator") if reader.accept("->") else None
    writes = reader.names() if reader.accept("writes") else ()
    versions = reader.values() if reader.accept("versions") else ()
    aliases = reader.optional_names() if reader.accept("aliases") else ()
    binds: tuple[Number, ...] = ()
    if reader.accept("binds"):
        reader.expect("(")
        binds = reader.sequence(lambda: _read_number(reader), ")")
    promises: tuple[tuple[int, Any], ...] = ()
    if reader.accept("promises"):
        reader.expect("(")
        promises = reader.sequence(lambda: _read_promise(reader), ")")
    flags: dict[str, Any] = {flag: reader.accept(flag) for flag in _FLAGS}
    outs = tuple(out if isinstance(out, Value) else None for out in left)
    return Extern(
        outs=outs, op=op, args=tuple(args), kwargs=tuple(kwargs), writes=writes, versions=versions, out_op=out_op,
        aliases=aliases, binds=binds, promises=promises, **flags,
    )  # fmt: skip


def _read_promise(reader: Reader) -> tuple[int, Any]:
    position = reader.integer("a position")
    reader.expect(":")
    return position, _read_arg(reader)


def _print_number(number: Number) -> str:
    position = "" if number.at is None else f" at {number.at}"
    return f"{quote_name(number.name)} = {number.hint}{position}"


def _read_number(reader: Reader) -> Number:
    name = reader.name("a size symbol")
    reader.expect("=")
    value = reader.integer("a hint")
    return Number(name, value, reader.integer("a position") if reader.accept("at") else None)


register_node(NodeGrammar("pointwise", Pointwise, _print_pointwise, _read_pointwise))
register_node(NodeGrammar("reduce", Reduction, _print_reduction, _read_reduction))
register_node(NodeGrammar("scan", Scan, _print_scan, _read_scan))
register_node(NodeGrammar("view", View, _print_view, _read_view))
register_node(NodeGrammar("store", Store, _print_store, _read_store))
register_node(NodeGrammar("pack", Pack, _print_pack, _read_pack))
register_node(NodeGrammar("extern", Extern, _print_extern, _read_extern, lambda node: node.outs))

__all__ = [
    "parse_expr", "parse_graph", "parse_index", "print_body", "print_expr", "print_graph", "print_index",
    "print_node", "read_node",
]  # fmt: skip
