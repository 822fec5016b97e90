"""The table of lowering rules: one per ATen overload. Rules register themselves when their file is imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar


class NoRule(Exception):
    """A rule declines a call; the call becomes a library call instead. Never leaves ``lower``."""


@dataclass(frozen=True)
class Rule:
    """How one overload is lowered.

    Attributes:
        apply: called as ``apply(lowering, *args, **kwargs)`` with tensors as ``Value``, sizes as ``Size``, lists as
            tuples; gives what the op returns in the same terms.
        any_dtype: the rule also handles complex tensors (it moves elements and never computes with them).
        any_device: operands may live on other devices than the result.
    """

    apply: Callable[..., Any]
    any_dtype: bool = False
    any_device: bool = False


RULES: dict[str, Rule] = {}
F = TypeVar("F", bound=Callable[..., Any])


def qualified(op: str) -> str:
    """``"exp"`` -> ``"aten.exp.default"``, ``"add.Tensor"`` -> ``"aten.add.Tensor"``; three parts stay as they are."""
    parts = op.split(".")
    if len(parts) == 1:
        return f"aten.{op}.default"
    return f"aten.{op}" if len(parts) == 2 else op


def rule(*ops: str, any_dtype: bool = False, any_device: bool = False) -> Callable[[F], F]:
    """Register the decorated function for ``ops`` (see ``qualified`` for short names).

    Raises:
        ValueError: an op has a rule already.
    """

    def register(function: F) -> F:
        for op in map(qualified, ops):
            if op in RULES:
                raise ValueError(f"{op} has two lowering rules")
            RULES[op] = Rule(function, any_dtype, any_device)
        return function

    return register
