"""Every error dcompile raises. Each one names the user's source line, the rule that was broken and the way out."""

from __future__ import annotations

from typing import Protocol


class HasSource(Protocol):
    """Anything that knows where in the user's program it comes from (``ir.types.Origin`` does)."""

    @property
    def source(self) -> str: ...


class DCompileError(RuntimeError):
    """Base class of all errors of this package."""


class Unsupported(DCompileError):
    """The user's program asks for something dcompile cannot do.

    Args:
        origin: where the construct stands in the user's program, or None when no line is known.
        what: the construct, in the user's words.
        instead: what the user can do about it.
    """

    def __init__(self, origin: HasSource | None, what: str, instead: str) -> None:
        where = origin.source if origin is not None and origin.source else "<unknown line>"
        stack = getattr(origin, "stack", "")
        super().__init__(f"{where}: {what} is not supported. Instead: {instead}" + (f"\n{stack}" if stack else ""))
        self.origin = origin
        self.what = what
        self.instead = instead


class OutOfRange(IndexError, RuntimeError):
    """An index in the user's data is out of range. Eager raises the one or the other, op by op; this is both."""


class DividedByZero(ZeroDivisionError, RuntimeError):
    """The user's program divided an integer by zero. Eager raises a RuntimeError of that name; this is both."""


class CompilerBug(DCompileError):
    """A stage broke its contract. Never the user's fault; the message names the stage and the broken rule."""


class UnsafePlan(CompilerBug):
    """The verifier found a step that touches a buffer in flight. Such a plan never runs."""


class ParseError(DCompileError):
    """The text of a graph or plan does not follow the grammar; names line and column."""


class ToolchainError(DCompileError):
    """The C++ compiler is missing or rejected generated code; carries the command and its output."""


class CacheError(DCompileError):
    """A cache entry is corrupt or not trustworthy and could not be rebuilt."""


class Divergence(DCompileError):
    """Ranks compiled different programs; names the ranks and the first differing step."""


class DeadlineExceeded(DCompileError):
    """Another rank did not answer in time; names the rank, what was awaited and for how many seconds."""


class PeerGone(DCompileError):
    """Another rank ended, or the store did, while it was still needed; names it and its last words."""
