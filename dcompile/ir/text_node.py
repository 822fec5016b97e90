"""What node grammars share: printing and reading values, axes and lists, and the registry of node grammars.

Grammar::

    def   = name ":" dtype "[" size, ... "]" ["{" stride, ... "}"] ["@" device]     # strides: if not contiguous;
                                                                                  # device: if not cpu
          | name ":" word ...                                                       # other things, see register_def
    axes  = name ":" size, ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from dcompile.ir.index import symbol
from dcompile.ir.nodes import Axis, Node
from dcompile.ir.text_expr import ExprReader
from dcompile.ir.text_index import print_index, read_size
from dcompile.ir.tokens import quote_name
from dcompile.ir.types import Def, DType, Size, Value, contiguous_stride

T = TypeVar("T")


class Reader(ExprReader):
    """A cursor over the text of a graph.

    Attributes:
        defs: everything defined so far, by name.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.defs: dict[str, Def] = {}

    def define(self, item: Def) -> None:
        """Make a definition known to what follows."""
        self.defs[item.name] = item
        if isinstance(item, Value):
            self.buffers[item.name] = item.dtype

    def sequence(self, item: Callable[[], T], close: str) -> tuple[T, ...]:
        """``item, ... close``; the closing sign is consumed, a comma before it is not required."""
        found: list[T] = []
        while not self.at(close):
            found.append(item())
            if not self.accept(","):
                break
        self.expect(close)
        return tuple(found)

    def names(self) -> tuple[str, ...]:
        """``"(" name, ... ")"``."""
        self.expect("(")
        return self.sequence(self.name, ")")

    def optional_names(self) -> tuple[str | None, ...]:
        """``"(" (name | "_"), ... ")"``."""
        self.expect("(")
        return self.sequence(lambda: None if self.accept("_") else self.name(), ")")

    def size(self) -> Size:
        return read_size(self)

    def axis(self) -> Axis:
        name = self.name("a loop variable")
        self.expect(":")
        return symbol(name), self.size()

    def axes(self) -> tuple[Axis, ...]:
        """``"(" axis, ... ")"``."""
        self.expect("(")
        return self.sequence(self.axis, ")")

    def value(self) -> Value:
        """A definition that must be a tensor."""
        token = self.peek()
        found = self.definition()
        if not isinstance(found, Value):
            self.fail("a tensor", token)
        return found

    def values(self) -> tuple[Value, ...]:
        """``"(" value, ... ")"``."""
        self.expect("(")
        return self.sequence(self.value, ")")

    def definition(self) -> Def:
        name = self.name("the name of a value")
        self.expect(":")
        kind = _DEFS.get(self.peek().text)
        if kind is not None:
            self.next()
            return kind.read(self, name)
        return self._tensor(name)

    def _tensor(self, name: str) -> Value:
        dtype = self.dtype()
        self.expect("[")
        shape = self.sequence(self.size, "]")
        stride, token = contiguous_stride(shape), self.peek()
        if self.accept("{"):
            stride = self.sequence(self.size, "}")
            if len(stride) != len(shape):
                self.fail(f"{len(shape)} strides", token)
        return Value(name, dtype, shape, stride, self.word("a device") if self.accept("@") else "cpu")


@dataclass(frozen=True)
class NodeGrammar:
    """How one kind of node is written: ``left... = keyword <print>``.

    Attributes:
        print: the text after the keyword.
        read: parses that text, given what stands left of ``=``; defines nothing itself.
        left: what stands left of ``=``, None for a result that has no name.
    """

    keyword: str
    node: type[Node]
    print: Callable[[Any], str]
    read: Callable[[Reader, tuple[Def | None, ...]], Node]
    left: Callable[[Any], tuple[Def | None, ...]] = lambda node: node.defs


@dataclass(frozen=True)
class DefGrammar:
    """How a definition that is not a tensor is written: ``name: keyword<print>``."""

    keyword: str
    item: type[Def]
    print: Callable[[Any], str]
    read: Callable[[Reader, str], Def]


_NODES: dict[str, NodeGrammar] = {}
_BY_TYPE: dict[type[Node], NodeGrammar] = {}
_DEFS: dict[str, DefGrammar] = {}


def register_node(grammar: NodeGrammar) -> None:
    """Make a kind of node known to printer and parser."""
    _NODES[grammar.keyword] = grammar
    _BY_TYPE[grammar.node] = grammar


def register_def(grammar: DefGrammar) -> None:
    """Make a kind of definition known to printer and parser.

    Raises:
        ValueError: the keyword is a dtype.
    """
    if grammar.keyword in {d.value for d in DType}:
        raise ValueError(f"{grammar.keyword} is a dtype")
    _DEFS[grammar.keyword] = grammar


def grammar_of(node: Node) -> NodeGrammar:
    """The grammar of a node's type.

    Raises:
        ValueError: none is registered.
    """
    if type(node) not in _BY_TYPE:
        raise ValueError(f"{type(node).__name__} has no registered text form")
    return _BY_TYPE[type(node)]


def keyword_grammar(keyword: str) -> NodeGrammar | None:
    return _NODES.get(keyword)


def keywords() -> tuple[str, ...]:
    return tuple(_NODES)


def print_def(item: Def) -> str:
    """``name: type`` of a definition.

    Raises:
        ValueError: it is neither a tensor nor registered.
    """
    if not isinstance(item, Value):
        for grammar in _DEFS.values():
            if isinstance(item, grammar.item):
                return f"{quote_name(item.name)}: {grammar.keyword}{grammar.print(item)}"
        raise ValueError(f"{type(item).__name__} has no registered text form")
    text = f"{quote_name(item.name)}: {item.dtype.value}[{print_sizes(item.shape)}]"
    if item.stride != contiguous_stride(item.shape):
        text += f"{{{print_sizes(item.stride)}}}"
    return text + (f"@{item.device}" if item.device != "cpu" else "")


def print_defs(items: Iterable[Def | None]) -> str:
    return ", ".join("_" if item is None else print_def(item) for item in items)


def print_sizes(sizes: Iterable[Size]) -> str:
    return ", ".join(print_index(s) for s in sizes)


def print_axis(axis: Axis) -> str:
    return f"{quote_name(axis[0].name)}: {print_index(axis[1])}"


def print_axes(axes: Iterable[Axis]) -> str:
    return ", ".join(print_axis(a) for a in axes)


def print_names(names: Iterable[str | None]) -> str:
    return ", ".join("_" if name is None else quote_name(name) for name in names)
