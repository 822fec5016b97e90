"""Text form of fused kernels.

Grammar::

    kernel = "kernel" ["targets" (names)] ["inplace" (out ":" operand, ...)] "{" stmt... "}"
    stmt   = "nest" "(" role axis, ... ")" "{" stmt... "}"
           | "let" name "=" exprs
           | "fold" "(" role axis, ... ")" (acc | "{" (let | acc | write)... "}")
           | "scan" "(" axis ")" [tiles] "{" let... name, ... "=" "running" "(" exprs ")" rule write... "}"
           | write
           | "scratch" name ":" dtype "[" size "]"
    acc    = name, ... "=" kind (exprs | "(" exprs, ... ")")                          # several: welford_merge, dot
    tiles  = "in" size "through" name
    rule   = "by" "(" exprs, ... ")" ["from" "(" expr, ... ")"]                       # over left0, right0, left1, ...
    write  = "write" [mode] buffer [lets] "[" address [bind] "]" "=" expr            # mode "set" is not printed
"""

from __future__ import annotations

from collections.abc import Iterator

from dcompile.ir import expr as ex
from dcompile.ir.combine import left, right
from dcompile.ir.kernel import Accumulator, Fold, Kernel, Let, Nest, Role, ScanLoop, Scratch, Stmt, Tiles, Write
from dcompile.ir.nodes import Axis
from dcompile.ir.ops import PRODUCTS, REDUCTIONS, STORE_MODES, WELFORD
from dcompile.ir.text_expr import print_bind, print_expr, print_expr_list, print_exprs
from dcompile.ir.text_index import print_index
from dcompile.ir.text_node import NodeGrammar, Reader, print_axis, print_names, register_node
from dcompile.ir.tokens import quote_name
from dcompile.ir.types import Def, Value

_INDENT = "  "


def print_body(body: tuple[Stmt, ...], depth: int = 0) -> str:
    """The statements of a kernel, one a line, indented by ``depth`` steps."""
    return "\n".join(_INDENT * depth + line for line in _lines(body))


def _print_kernel(kernel: Kernel) -> str:
    text = f"targets ({print_names(kernel.targets)}) " if kernel.targets else ""
    if kernel.inplace:
        pairs = ", ".join(f"{quote_name(out)}: {quote_name(operand)}" for out, operand in kernel.inplace)
        text += f"inplace ({pairs}) "
    return text + "{\n" + "".join(f"{_INDENT}{line}\n" for line in _lines(kernel.body)) + "}"


def _lines(body: tuple[Stmt, ...]) -> Iterator[str]:
    for stmt in body:
        if isinstance(stmt, Nest):
            yield f"nest ({_role_axes(stmt.axes, stmt.roles)}) {{"
            yield from (_INDENT + line for line in _lines(stmt.body))
            yield "}"
        elif isinstance(stmt, Let):
            yield _let_text(stmt)
        elif isinstance(stmt, Write):
            yield _write_text(stmt)
        elif isinstance(stmt, Scratch):
            yield f"scratch {quote_name(stmt.name)}: {stmt.dtype.value}[{stmt.size}]"
        elif isinstance(stmt, ScanLoop):
            yield from _scan_lines(stmt)
        else:
            yield from _fold_lines(stmt)


def _fold_lines(fold: Fold) -> Iterator[str]:
    head = f"fold ({_role_axes(fold.axes, fold.roles)}) "
    accumulators = [_accumulator_text(a) for a in fold.accumulators]
    if len(accumulators) == 1 and not fold.lets and not fold.writes:
        yield head + accumulators[0]
        return
    yield head + "{"
    for line in (*map(_let_text, fold.lets), *accumulators, *map(_write_text, fold.writes)):
        yield _INDENT + line
    yield "}"


def _accumulator_text(acc: Accumulator) -> str:
    entering = print_expr_list(acc.exprs) if acc.others else print_expr(acc.expr)
    return f"{print_names(acc.names)} = {acc.kind} {entering}"


def _scan_lines(scan: ScanLoop) -> Iterator[str]:
    cut = f" in {scan.tiles.length} through {quote_name(scan.tiles.state)}" if scan.tiles else ""
    yield f"scan ({print_axis(scan.axis)}){cut} {{"
    running = f"{print_names(scan.names)} = running {print_expr_list(scan.exprs)}{print_rule(scan.combine, scan.start)}"
    for line in (*map(_let_text, scan.lets), running, *map(_write_text, scan.writes)):
        yield _INDENT + line
    yield "}"


def print_rule(combine: tuple[ex.Expr, ...], start: tuple[ex.Const, ...]) -> str:
    """How a scan combines, `` by (...) from (...)``."""
    return f" by {print_expr_list(combine)}" + (f" from {print_expr_list(start)}" if start else "")


def read_rule(reader: Reader, exprs: tuple[ex.Expr, ...]) -> tuple[tuple[ex.Expr, ...], tuple[ex.Const, ...]]:
    """The rule and the start of a scan of ``exprs``."""
    outer = reader.scalars
    reader.scalars = dict(outer)
    for k, entering in enumerate(exprs):
        for side in (left(k, entering.dtype), right(k, entering.dtype)):
            assert isinstance(side, ex.Local)
            reader.scalars[side.name] = side
    token = reader.peek()
    reader.expect("by")
    combine = reader.expr_list()
    reader.scalars = outer
    start = reader.expr_list() if reader.accept("from") else ()
    if len(combine) != len(exprs) or (start and len(start) != len(exprs)):
        reader.fail("one rule and one start for each scanned value", token)
    return combine, tuple(c for c in start if isinstance(c, ex.Const))


def _role_axes(axes: tuple[Axis, ...], roles: tuple[Role, ...]) -> str:
    return ", ".join(f"{role.value} {print_axis(axis)}" for axis, role in zip(axes, roles, strict=True))


def _let_text(stmt: Let) -> str:
    return f"let {quote_name(stmt.name)} = {print_expr(stmt.expr)}"


def _write_text(stmt: Write) -> str:
    lets, (value, *bind) = print_exprs((stmt.expr, *stmt.bind))
    mode = "" if stmt.mode == "set" else f"{stmt.mode} "
    where = f"[{print_index(stmt.address)}{print_bind(bind)}]"
    return (
        f"write {mode}{quote_name(stmt.buffer)} {lets}{where} = {value}"
        if lets
        else (f"write {mode}{quote_name(stmt.buffer)}{where} = {value}")
    )


def _read_kernel(reader: Reader, left: tuple[Def | None, ...]) -> Kernel:
    outs = tuple(out for out in left if isinstance(out, Value))
    targets: tuple[str | None, ...] = ()
    inplace: tuple[tuple[str, str], ...] = ()
    if reader.accept("targets"):
        targets = reader.optional_names()
    if reader.accept("inplace"):
        reader.expect("(")
        inplace = reader.sequence(lambda: _read_pair(reader), ")")
    outer_buffers, outer_scalars = reader.buffers, reader.scalars
    reader.buffers = {**outer_buffers, **{out.name: out.dtype for out in outs}}
    body = _read_block(reader)
    reader.buffers, reader.scalars = outer_buffers, outer_scalars
    return Kernel(outs=outs, body=body, targets=targets, inplace=inplace)


def _read_pair(reader: Reader) -> tuple[str, str]:
    out = reader.name("an out")
    reader.expect(":")
    return out, reader.name("an operand")


def _read_block(reader: Reader) -> tuple[Stmt, ...]:
    """``"{" stmt... "}"``; scalars and scratch defined inside are forgotten at its end."""
    outer_scalars, outer_buffers = reader.scalars, reader.buffers
    reader.scalars, reader.buffers = dict(outer_scalars), dict(outer_buffers)
    reader.expect("{")
    body: list[Stmt] = []
    while not reader.accept("}"):
        body.append(_read_stmt(reader))
    reader.scalars, reader.buffers = outer_scalars, outer_buffers
    return tuple(body)


def _read_stmt(reader: Reader) -> Stmt:
    if reader.accept("nest"):
        axes, roles = _read_role_axes(reader)
        return Nest(axes, roles, _read_block(reader))
    if reader.accept("let"):
        return _read_let(reader)
    if reader.accept("fold"):
        return _read_fold(reader)
    if reader.accept("scan"):
        return _read_scan(reader)
    if reader.accept("write"):
        return _read_write(reader)
    if reader.accept("scratch"):
        name = reader.name()
        reader.expect(":")
        dtype = reader.dtype()
        reader.expect("[")
        size = reader.integer("a size")
        reader.expect("]")
        reader.buffers[name] = dtype
        return Scratch(name, dtype, size)
    return reader.fail("a statement (nest, let, fold, scan, write or scratch) or '}'")


def _read_let(reader: Reader) -> Let:
    name = reader.name("the name of a scalar")
    reader.expect("=")
    value = reader.expr()
    reader.scalars[name] = ex.local(name, value.dtype)
    return Let(name, value)


def _read_scan(reader: Reader) -> ScanLoop:
    reader.expect("(")
    axis = reader.axis()
    reader.expect(")")
    tiles = None
    if reader.accept("in"):
        length = reader.integer("the length of a tile")
        reader.expect("through")
        tiles = Tiles(length, reader.name("a buffer"))
    outer = reader.scalars
    reader.scalars = dict(outer)
    reader.expect("{")
    lets: list[Let] = []
    while reader.accept("let"):
        lets.append(_read_let(reader))
    names = _read_names(reader)
    reader.expect("running")
    exprs = reader.expr_list()
    combine, start = read_rule(reader, exprs)
    reader.scalars.update({name: ex.local(name, e.dtype) for name, e in zip(names, exprs, strict=True)})
    writes: list[Write] = []
    while not reader.accept("}"):
        reader.expect("write")
        writes.append(_read_write(reader))
    reader.scalars = outer
    return ScanLoop(axis, names, exprs, combine, start, tuple(lets), tuple(writes), tiles)


def _read_names(reader: Reader) -> tuple[str, ...]:
    """``name, ... "="``."""
    return reader.sequence(lambda: reader.name("the name of a result"), "=")


def _read_accumulator(reader: Reader) -> Accumulator:
    names = _read_names(reader)
    token = reader.peek()
    kind = reader.word("a reduction")
    if kind not in REDUCTIONS | PRODUCTS:
        reader.fail(f"a reduction ({', '.join(sorted(REDUCTIONS | PRODUCTS))})", token)
    if len(names) != (3 if kind in WELFORD else 1):
        reader.fail("one name a result", token)
    exprs = reader.expr_list() if kind == "welford_merge" or kind in PRODUCTS else (reader.expr(),)
    if kind in PRODUCTS and (len(exprs) != 2 or exprs[0].dtype is not exprs[1].dtype):
        reader.fail("two operands of one dtype", token)
    return Accumulator(names[0], kind, exprs[0], names[1:], exprs[1:])


def _read_fold(reader: Reader) -> Fold:
    axes, roles = _read_role_axes(reader)
    outer = reader.scalars
    reader.scalars = dict(outer)
    lets: list[Let] = []
    accumulators: list[Accumulator] = []
    writes: list[Write] = []
    if reader.accept("{"):
        while not reader.accept("}"):
            if reader.accept("let"):
                lets.append(_read_let(reader))
            elif reader.accept("write"):
                writes.append(_read_write(reader))
            else:
                accumulators.append(_read_accumulator(reader))
    else:
        accumulators.append(_read_accumulator(reader))
    reader.scalars = outer
    outer.update({name: ex.local(name, a.dtype) for a in accumulators for name in a.names})
    return Fold(axes, roles, tuple(accumulators), tuple(lets), tuple(writes))


def _read_write(reader: Reader) -> Write:
    following = reader.peek(1)
    mode, token = "set", reader.peek()
    if token.text in STORE_MODES and following.kind in ("name", "quoted") and following.text != "let":
        mode = reader.next().text
    buffer = reader.name("a buffer")
    outer = reader.scalars
    reader.read_lets()
    token = reader.peek()
    position, bind = reader.position()
    if len(position) != 1:
        reader.fail("one flat address", token)
    reader.expect("=")
    value = reader.operand()
    reader.scalars = outer
    return Write(buffer, position[0], value, bind, mode)


def _read_role_axes(reader: Reader) -> tuple[tuple[Axis, ...], tuple[Role, ...]]:
    def item() -> tuple[Axis, Role]:
        token = reader.peek()
        role = reader.word("a role")
        if role not in {r.value for r in Role}:
            reader.fail("a role (parallel, serial or simd)", token)
        return reader.axis(), Role(role)

    reader.expect("(")
    pairs = reader.sequence(item, ")")
    return tuple(axis for axis, _ in pairs), tuple(role for _, role in pairs)


register_node(NodeGrammar("kernel", Kernel, _print_kernel, _read_kernel))
