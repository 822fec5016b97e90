"""Tokens of the IR's text form and the cursor every grammar reads them through."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from dcompile.errors import ParseError

RESERVED = frozenset(
    {
        "_", "graph", "return", "true", "false", "none", "inf", "nan", "size", "let", "in", "nest", "fold",
        "write", "scratch", "kernel", "extern", "writes", "versions", "aliases", "effect", "fallback",
        "barrier", "seq", "nested", "promises", "targets", "inplace", "place", "root",
    }
)  # fmt: skip
"""Words that mean something where a name may stand; a value of such a name is printed in backquotes."""

_IDENTIFIER = r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*"
_TOKEN = re.compile(
    r"(?P<space>[ \t\r\n]+)"
    r"|(?P<comment>\#[^\n]*)"
    rf"|(?P<name>{_IDENTIFIER})"
    r"|(?P<quoted>`[^`\n]+`)"
    r"|(?P<float>\d+\.\d*(?:e[+-]?\d+)?|\d+e[+-]?\d+)"
    r"|(?P<int>\d+)"
    r'|(?P<string>"(?:[^"\\\n]|\\.)*")'
    r"|(?P<sign>->|\*\*|//|==|!=|<=|>=|[-+*/%<>=:;,|@()\[\]{}])"
)
_PLAIN_NAME = re.compile(_IDENTIFIER)


@dataclass(frozen=True)
class Token:
    """A word of the text; ``kind`` is ``name``, ``quoted``, ``int``, ``float``, ``string``, ``sign`` or ``end``.

    ``line`` and ``column`` count from 1.
    """

    kind: str
    text: str
    line: int
    column: int

    def __str__(self) -> str:
        return "the end of the text" if self.kind == "end" else f"'{self.text}'"


def quote_name(name: str) -> str:
    """``name`` as it stands in the text: bare, or in backquotes when it could be taken for something else.

    Raises:
        ValueError: the name is empty or holds a backquote or a line break.
    """
    if _PLAIN_NAME.fullmatch(name) and name not in RESERVED:
        return name
    if not name or "`" in name or "\n" in name:
        raise ValueError(f"{name!r} cannot be the name of a value")
    return f"`{name}`"


class Cursor:
    """A position in a token list. Comments are set aside, by the line they stand on, in ``comments``."""

    def __init__(self, text: str) -> None:
        self.comments: dict[int, str] = {}
        self._tokens: list[Token] = []
        self._position = 0
        line, line_start, at = 1, 0, 0
        while at < len(text):
            match = _TOKEN.match(text, at)
            column = at - line_start + 1
            if match is None:
                raise ParseError(f"line {line}, column {column}: expected a token, found {text[at]!r}")
            kind, word = match.lastgroup or "", match.group()
            if kind == "comment":
                self.comments[line] = word[1:].strip()
            elif kind != "space":
                self._tokens.append(Token(kind, word, line, column))
            if breaks := word.count("\n"):
                line, line_start = line + breaks, at + word.rindex("\n") + 1
            at = match.end()
        self._tokens.append(Token("end", "", line, at - line_start + 1))

    def peek(self, ahead: int = 0) -> Token:
        """The token ``ahead`` places on, without consuming it."""
        return self._tokens[min(self._position + ahead, len(self._tokens) - 1)]

    def next(self) -> Token:
        token = self.peek()
        self._position += 1
        return token

    @property
    def last_line(self) -> int:
        """Line of the token consumed last."""
        return self._tokens[max(self._position - 1, 0)].line

    def fail(self, expected: str, at: Token | None = None) -> NoReturn:
        """Raise ``ParseError`` with line and column of ``at`` (the current token unless given)."""
        token = at or self.peek()
        raise ParseError(f"line {token.line}, column {token.column}: expected {expected}, found {token}")

    def at(self, *texts: str) -> bool:
        """Whether the current token is one of these signs or bare words."""
        token = self.peek()
        return token.kind in ("sign", "name") and token.text in texts

    def accept(self, text: str) -> bool:
        """Consume the sign or word if it is next."""
        if self.at(text):
            self._position += 1
            return True
        return False

    def expect(self, text: str) -> Token:
        """Consume the sign or word.

        Raises:
            ParseError: something else is next.
        """
        if not self.at(text):
            self.fail(f"'{text}'")
        return self.next()

    def at_name(self) -> bool:
        """Whether a name is next: a bare word that is not reserved, or anything in backquotes."""
        token = self.peek()
        return token.kind == "quoted" or (token.kind == "name" and token.text not in RESERVED)

    def name(self, what: str = "a name") -> str:
        if not self.at_name():
            self.fail(what)
        return self.next().text.strip("`")

    def word(self, what: str) -> str:
        """A bare word, reserved or not (operation names)."""
        if self.peek().kind != "name":
            self.fail(what)
        return self.next().text

    def integer(self, what: str = "an integer") -> int:
        negative = self.accept("-")
        if self.peek().kind != "int":
            self.fail(what)
        value = int(self.next().text)
        return -value if negative else value

    def end(self) -> None:
        if self.peek().kind != "end":
            self.fail("the end of the text")
