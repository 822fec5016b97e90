"""Scans in Triton: the associative rule as a function of its own, a block at a time, carried from block to block, or
from tile to tile by programs that look back at what those before them have told."""

from __future__ import annotations

from collections.abc import Sequence

from dcompile.codegen.triton_expr import op_text
from dcompile.codegen.triton_launch import Launch
from dcompile.codegen.triton_text import literal, register_text
from dcompile.errors import CompilerBug
from dcompile.ir import expr as ex
from dcompile.ir.tiles import pieces
from dcompile.ir.types import DType


def rule_function(name: str, rule: Sequence[ex.Expr]) -> list[str]:
    """The lines of ``name(left0, ..., right0, ...)``, which gives the combined partial results.

    Raises:
        CompilerBug: the rule reads anything but its partial results.
    """
    count = len(rule)
    parameters = [f"{side}{k}" for side in ("left", "right") for k in range(count)]
    lines = ["@triton.jit", f"def {name}({', '.join(parameters)}):"]
    names: dict[ex.Expr, str] = {}

    def text(node: ex.Expr) -> str:
        if node in names:
            return names[node]
        if isinstance(node, ex.Local):
            if node.name not in parameters:
                raise CompilerBug(f"the rule of a scan reads {node.name}")
            return node.name
        if isinstance(node, ex.Const):
            return literal(node.value, node.dtype)
        if not isinstance(node, ex.Op):
            raise CompilerBug(f"the rule of a scan contains a {type(node).__name__}")
        arguments = tuple(text(arg) for arg in node.args)
        names[node] = f"t{len(names)}"
        lines.append(f"    {names[node]} = {op_text(node.name, arguments, node.args[-1].dtype, node.dtype)}")
        return names[node]

    results = [text(root) for root in rule]
    return [*lines, f"    return {', '.join(results)}", "", ""]


WARP = 32

THERE = 1 << 32
"""The upper half of a word that has been told."""


def asked_at_once(launch: Launch) -> int:
    """Tiles that are asked at once: one word for each thread of a program. Were there less, several threads would read
    the same word, perhaps at different times, and take different turns where the language knows only one."""
    return max(WARP * launch.num_warps // launch.block, 1)


def look_back_functions(rule: str, dtypes: Sequence[DType]) -> list[str]:
    """The lines of the functions with which tiles of a scan by ``rule`` talk, through words as ``ir.tiles`` has them.

    ``{rule}_tell(words, x, tile, tiles, rows, final, value0, ...)``: what this tile comes to in rows ``x``, alone or,
    if ``final``, with all before it. ``{rule}_before(words, x, tile, tiles, rows, W)``: what the tiles before this one
    come to, nothing of sense for the first one; asks W of them at once, backwards, until one knows it finally. A tile
    that has not told yet is asked again: it runs, or has ended.
    """
    return [*_tell(rule, dtypes), *_over(rule, len(dtypes)), *_before(rule, dtypes)]


def _tell(rule: str, dtypes: Sequence[DType]) -> list[str]:
    values = [f"value{k}" for k in range(len(dtypes))]
    halves = [half for value, dtype in zip(values, dtypes, strict=True) for half in _halves(value, dtype)]
    lines = [
        "@triton.jit",
        f"def {rule}_tell(words, x, tile, tiles, rows, final, {', '.join(values)}):",
        f"    at = words + 1 + (tl.where(final, {len(halves)}, 0) * rows + x) * tiles + tile",
    ]
    for n, half in enumerate(halves):
        place = f"at + {n} * rows * tiles" if n else "at"
        word = f"({half}).to(tl.int64) & {THERE - 1} | {THERE}"
        lines.append(f'    tl.atomic_xchg({place}, {word}, mask=x < rows, sem="relaxed")')
    return [*lines, "", ""]


def _over(rule: str, count: int) -> list[str]:
    """The rule of parts of which a final one makes everything before it superfluous."""
    sides = [f"final_{side}, " + ", ".join(f"{side}{k}" for k in range(count)) for side in ("left", "right")]
    both = ", ".join(f"both{k}" for k in range(count))
    results = ", ".join(f"tl.where(final_right != 0, right{k}, both{k}).to(right{k}.dtype)" for k in range(count))
    operands = ", ".join(f"{side}{k}" for side in ("left", "right") for k in range(count))
    return [
        "@triton.jit",
        f"def {rule}_over({', '.join(sides)}):",
        f"    {both} = {rule}({operands})",
        f"    return final_left | final_right, {results}",
        "",
        "",
    ]


def _before(rule: str, dtypes: Sequence[DType]) -> list[str]:
    count = len(dtypes)
    total = sum(pieces(dtype) for dtype in dtypes)
    values, news = [f"value{k}" for k in range(count)], [f"new{k}" for k in range(count)]
    alone, final = [f"alone{n}" for n in range(total)], [f"final{n}" for n in range(total)]
    lines = ["@triton.jit", f"def {rule}_before(words, x, tile, tiles, rows, W: tl.constexpr):"]
    for value, dtype in zip(values, dtypes, strict=True):
        lines.append(f"    {value} = (x * 0).to({register_text(dtype)})")
    lines += [
        "    step = rows * tiles",
        "    known = (x * 0).to(tl.int32)",
        "    end = tile",
        "    while end > 0:",
        "        at = end - W + tl.arange(0, W)[None, :]",
        "        asked = (x < rows) & (at >= 0)",
        "        place = words + 1 + x * tiles + at",
    ]
    for n, name in enumerate((*alone, *final)):
        where = f"place + {n} * step" if n else "place"
        lines.append(f"        {name} = tl.load({where}, mask=asked, other={THERE}, volatile=True)")
    lines += [
        f"        is_final = ({' & '.join(f'({name} >> 32)' for name in final)}).to(tl.int32)",
        f"        there = is_final | ({' & '.join(f'({name} >> 32)' for name in alone)}).to(tl.int32)",
        "        if tl.min(there) != 0:",
    ]
    at = 0
    for new, dtype in zip(news, dtypes, strict=True):
        words = [f"tl.where(is_final != 0, {final[n]}, {alone[n]})" for n in range(at, at + pieces(dtype))]
        lines.append(f"            {new} = {_whole(words, dtype)}")
        at += pieces(dtype)
    lines.append(
        f"            is_final, {', '.join(news)} = tl.associative_scan((is_final, {', '.join(news)}), 1, {rule}_over)"
    )
    for new in news:
        lines.append(f"            {new} = last_of_rows({new}, W)")
    both = ", ".join(f"both{k}" for k in range(count))
    lines.append(f"            {both} = {rule}({', '.join([*news, *values])})")
    for k, (value, new) in enumerate(zip(values, news, strict=True)):
        grown = f"tl.where(end == tile, {new}, both{k})"
        lines.append(f"            {value} = tl.where(known != 0, {value}, {grown}).to({value}.dtype)")
    lines += [
        "            known = known | last_of_rows(is_final, W)",
        "            end = tl.where(tl.min(known) != 0, 0, end - W).to(end.dtype)",
    ]
    return [*lines, f"    return {', '.join(values)}", "", ""]


def _halves(value: str, dtype: DType) -> list[str]:
    """The bits of a value, 32 at a time, lower ones first."""
    bits = f"{value}.to(tl.int{32 * pieces(dtype)}, bitcast=True)" if dtype.is_float else value
    return [bits] if pieces(dtype) == 1 else [bits, f"({bits}) >> 32"]


def _whole(words: Sequence[str], dtype: DType) -> str:
    """The value whose bits are the lower halves of ``words``."""
    if len(words) == 1:
        bits = f"({words[0]}).to(tl.int32)"
    else:
        bits = f"(({words[0]}) & {THERE - 1} | (({words[1]}) << 32))"
    return f"{bits}.to({register_text(dtype)}{', bitcast=True' if dtype.is_float else ''})"


__all__ = ["asked_at_once", "look_back_functions", "rule_function"]
