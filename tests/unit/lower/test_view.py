import math

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcompile.ir.index import symbol
from dcompile.ir.nodes import Pointwise, View
from dcompile.lower.sizes import Sizes
from dcompile.lower.view import reshape_index
from tests.unit.lower.harness import check

a, b, c = symbol("i0"), symbol("i1"), symbol("i2")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def evaluate(index: tuple[sympy.Expr, ...], at: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(e.subs({symbol(f"i{n}"): v for n, v in enumerate(at)})) for e in index)


GOLDEN = {
    ((4, 6), (24,)): "(i0//6, i0 % 6)",
    ((24,), (4, 6)): "(6*i0 + i1)",
    ((2, 3, 4), (2, 12)): "(i0, i1//4, i1 % 4)",
    ((2, 1, 3), (2, 3)): "(i0, 0, i1)",
    ((5, 1), (1, 5)): "(i1, 0)",
}


@pytest.mark.parametrize(("old", "new"), GOLDEN)
def test_reshape_index_is_short(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    found = reshape_index(old, new, Sizes())
    shown = ", ".join(
        str(e).replace("FloorDiv(i1, 4)", "i1//4").replace("Mod(i1, 4)", "i1 % 4")
        .replace("FloorDiv(i0, 6)", "i0//6").replace("Mod(i0, 6)", "i0 % 6")
        for e in found
    )  # fmt: skip
    assert f"({shown})" == GOLDEN[old, new]


@st.composite
def shape_pairs(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    primes = draw(st.lists(st.sampled_from([1, 2, 2, 3, 3, 5]), min_size=1, max_size=5))

    def cut() -> tuple[int, ...]:
        order = draw(st.permutations(primes))
        shape = [1]
        for p in order:
            if draw(st.booleans()):
                shape.append(p)
            else:
                shape[-1] *= p
        return tuple(shape)

    return cut(), cut()


@given(shape_pairs())
def test_reshape_index_keeps_the_row_major_position(pair: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    old, new = pair
    index = reshape_index(old, new, Sizes())
    place = torch.arange(math.prod(old)).view(old)
    for at in list(torch.cartesian_prod(*(torch.arange(n) for n in new)).reshape(-1, len(new)))[:60]:
        here = tuple(int(v) for v in at)
        assert place[evaluate(index, here)] == torch.arange(math.prod(new)).view(new)[here]


def test_reshape_through_symbolic_sizes() -> None:
    sizes = Sizes()
    s = symbol("s0")
    sizes.hints[s] = 7
    assert reshape_index((s, 8), (8 * s,), sizes) == reshape_index((7, 8), (56,), sizes)
    assert reshape_index((8 * s,), (s, 8), sizes) == (8 * a + b,)
    assert reshape_index((2, s, 8), (2, 8 * s), sizes)[0] == a


VIEWS = {
    "view": lambda x: x.view(2, 12, 5),
    "view_flat": lambda x: x.view(-1),
    "permute": lambda x: x.permute(2, 0, -1, 1),
    "t": lambda x: x[0, 0].t(),
    "transpose": lambda x: x.transpose(-1, 1),
    "unsqueeze": lambda x: (x.unsqueeze(0), x.unsqueeze(-1), x.unsqueeze(2)),
    "squeeze": lambda x: (x[:1].squeeze(0), x[:1, :, :1].squeeze(), x[:, :1].squeeze(-3), x.squeeze(0)),
    "squeeze_dims": lambda x: torch.squeeze(x[:1, :, :1], (0, 2)),
    "slice": lambda x: (x[1:], x[:, -2:], x[..., 1:5:2], x[:, 1:100], x[2:1], x[:]),
    "select": lambda x: (x[0], x[:, -1], x[..., 2]),
    "split": lambda x: (x.split(2, 1), x.split([1, 3], -2), x.chunk(3, 1), x.unbind(1)),
    "expand": lambda x: (x[:, :1].expand(2, 6, 4, 5), x.expand(3, -1, -1, -1, -1)),
    "diagonal": lambda x: (x.diagonal(0, 1, 2), x.diagonal(1, -1, -2), x.diagonal(-1, 2, 3)),
    "unfold": lambda x: x.unfold(3, 3, 2),
    "detach": lambda x: x.detach() + 1,
    "as_strided": lambda x: torch.as_strided(x, (3, 4), (8, 2), 5),
    "flip": lambda x: x.flip(1, -1),
    "roll": lambda x: x.roll((1, -2), (1, 3)),
    "repeat": lambda x: x[0, 0].repeat(3, 2, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=1),
    "chain": lambda x: x.permute(3, 1, 0, 2)[1:, ::2].transpose(0, 2).reshape(-1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_view(name: str) -> None:
    check(VIEWS[name], randn(2, 3, 4, 5) if name != "split" else randn(2, 6, 4, 5))


@pytest.mark.parametrize(
    "name", ["view_flat", "permute", "transpose", "slice", "select", "split", "unsqueeze", "chain"]
)
def test_view_with_symbolic_sizes(name: str) -> None:
    check(VIEWS[name], randn(2, 3, 4, 5) if name != "split" else randn(2, 6, 4, 5), symbolic=True)


def test_unfolding_a_number_gives_a_view_of_it() -> None:
    graph = check(lambda x: x[1].unfold(0, 1, 1), randn(2))
    assert {type(node) for node in graph.nodes} == {View}
    check(lambda x: x[1].unfold(0, 0, 1), randn(2))


def test_views_compute_nothing() -> None:
    graph = check(lambda x: x.view(6, 20).t()[1:, :4], randn(2, 3, 4, 5))
    assert {type(node) for node in graph.nodes} == {View}


def test_resizing_keeps_the_elements_in_order() -> None:
    graph = check(lambda x: torch.ops.aten.resize.default(x, [4, 3]), randn(2, 6))
    assert [type(node) for node in graph.nodes] == [Pointwise]


def test_nothing_is_repeated() -> None:
    check(lambda x: (x.repeat(2, 3, 2), x.t().repeat(2, 0)), randn(0, 3))


def test_views_of_nothing() -> None:
    check(lambda x: (x.view(5, 0), x.permute(1, 0) + 1, x[:, :2]), randn(0, 3))


def test_a_view_of_a_computed_value_is_a_view() -> None:
    graph = check(lambda x: (x * 2).t(), randn(3, 4))
    assert [type(node) for node in graph.nodes] == [Pointwise, View]


def test_complex_tensors_are_viewed_but_computed_by_the_library() -> None:
    x = torch.complex(randn(3, 4), randn(3, 4) * 2)
    check(lambda v: v.t()[1:], x)
    assert check(lambda v: v.t() * 2, x, library=True).nodes


def test_strides_over_a_base_that_is_not_dense_are_a_library_call() -> None:
    check(lambda x: torch.as_strided(x, (3,), (2,), 1), randn(4, 6).t(), library=True)
