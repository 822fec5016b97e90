"""Custom ops that row tests call. Importing this module registers them."""

from __future__ import annotations

import torch
from torch import Tensor

LIBRARY = torch.library.Library("dcompile_rows", "DEF")


def define(schema: str, function: object, fake: object) -> None:
    """Register an op for every device, and what it gives for fake tensors."""
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dcompile_rows::{name}", fake, lib=LIBRARY)


NOTED: list[int] = []
"""Numbers of elements ``note`` was called with."""


def _note(x: Tensor) -> None:
    NOTED.append(x.numel())


define("note(Tensor x) -> ()", _note, lambda x: None)


def _bump(x: Tensor) -> None:
    x.add_(1)


def _two_of_three(a: Tensor, b: Tensor, c: Tensor) -> None:
    a.add_(c)
    b.mul_(c)


def _halve(x: Tensor, y: Tensor) -> Tensor:
    x.mul_(0.5)
    return x + y


def _double_all(xs: list[Tensor]) -> None:
    for x in xs:
        x.mul_(2)


def _fill(x: Tensor, v: float) -> None:
    x.fill_(v)


define("bump(Tensor(a!) x) -> ()", _bump, lambda x: None)
define("two_of_three(Tensor(a!) a, Tensor(b!) b, Tensor c) -> ()", _two_of_three, lambda a, b, c: None)
define("halve(Tensor(a!) x, Tensor y) -> Tensor", _halve, lambda x, y: torch.empty_like(x))
define("double_all(Tensor(a!)[] xs) -> ()", _double_all, lambda xs: None)
define("fill_(Tensor(a!) x, float v) -> ()", _fill, lambda x, v: None)


def _mixed(x: Tensor) -> tuple[Tensor, int, Tensor | None, list[Tensor], float]:
    return x + 1, x.numel(), None, [x * 2, x * 3], x.numel() / 2


def _mixed_fake(x: Tensor) -> tuple[Tensor, int, Tensor | None, list[Tensor], float]:
    return torch.empty_like(x), x.numel(), None, [torch.empty_like(x), torch.empty_like(x)], x.numel() / 2


define("mixed(Tensor x) -> (Tensor, int, Tensor?, Tensor[], float)", _mixed, _mixed_fake)
define("halves(Tensor x) -> (Tensor low, Tensor high)", lambda x: (x / 2, x * 2), lambda x: (x + 0, x + 0))
define("half_count(Tensor x) -> float", lambda x: x.numel() / 2, lambda x: x.numel() / 2)
define("total(Tensor x) -> float", lambda x: float(x.sum()), lambda x: 0.0)


def _positive_fake(x: Tensor) -> tuple[Tensor, torch.SymInt]:
    count = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(count), count


define(
    "positive(Tensor x) -> (Tensor, SymInt)",
    lambda x: ((found := x[x > 0].clone()), found.numel()),
    _positive_fake,
)


def _liar(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


define("liar(Tensor x) -> Tensor", _liar, lambda x: x.new_empty(x.shape))
define(
    "options(Tensor x, *, float scale=2.0, int[] shift=[1, 2]) -> Tensor",
    lambda x, scale=2.0, shift=(1, 2): x * scale + shift[1],
    lambda x, scale=2.0, shift=(1, 2): torch.empty_like(x),
)
define("ramp(SymInt n, float step) -> Tensor", lambda n, step: torch.arange(n) * step, lambda n, step: torch.empty(n))
