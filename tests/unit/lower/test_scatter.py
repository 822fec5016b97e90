import pytest
import torch

from dcompile.ir.nodes import Store
from dcompile.lower import lower
from tests.unit.lower.harness import check, interpret, trace

aten = torch.ops.aten


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def places(n: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, n, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("padding", [-1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_embedding_gradient(padding: int, dtype: torch.dtype) -> None:
    check(
        lambda g, i: aten.embedding_dense_backward(g, i, 6, padding, False),
        randn(3, 5, 4, dtype=dtype),
        places(6, 3, 5),
    )


def test_embedding_gradient_of_narrow_floats_adds_up_in_f32() -> None:
    g, i = randn(400, 4, dtype=torch.bfloat16), places(2, 400)
    expected = torch.zeros(2, 4, dtype=torch.float64).index_add_(0, i, g.double())
    lowered = lower(trace(lambda g, i: aten.embedding_dense_backward(g, i, 2, -1, False), g, i), "backward")
    torch.testing.assert_close(interpret(lowered, g, i)[0].double(), expected, rtol=1e-2, atol=1e-2)


PUTS = {
    "one": lambda x, i, j, v: torch.index_put(x, (i,), v[0, 0]),
    "two": lambda x, i, j, v: torch.index_put(x, (i, j), v[0]),
    "scalar": lambda x, i, j, v: torch.index_put(x, (i, j), v[0, 0, 0]),
    "none": lambda x, i, j, v: aten.index_put(x, (None, i), v[0, 0]),
    "broadcast": lambda x, i, j, v: torch.index_put(x, (i[:, None], j[None, :]), v[0, 0]),
    "negative": lambda x, i, j, v: torch.index_put(x, (i - 5,), v[0, 0]),
}


@pytest.mark.parametrize("name", PUTS)
def test_index_put(name: str) -> None:
    i, j = torch.tensor([4, 0, 2]), torch.tensor([1, 3, 0])
    check(PUTS[name], randn(5, 5, 6), i, j, randn(2, 3, 6, seed=1))


def test_index_put_accumulates_repeated_positions() -> None:
    i, j = torch.tensor([4, 0, 4, 4]), torch.tensor([1, 3, 1, 0])
    check(lambda x, i, j, v: torch.index_put(x, (i, j), v, accumulate=True), randn(5, 6), i, j, randn(4, seed=1))


def test_scatter() -> None:
    i = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(n))[:3] for n in range(4)])
    x, v = randn(4, 5), randn(4, 6, seed=1)
    check(lambda x, i, v: (x.scatter(1, i, v), x.scatter(1, i, 2.5), x.scatter(-1, i[:2], v)), x, i, v)


def test_one_position_a_line_is_a_choice_and_no_write() -> None:
    x, i, v = torch.randn(6, 5), torch.tensor([[4], [0], [-1], [2], [2], [-5]]), torch.randn(6, 1)
    functions = (
        lambda x, i, v: x.scatter(1, i, v),
        lambda x, i, v: x.scatter(1, i, -1.0),
        lambda x, i, v: x.scatter_add(1, i, v),
        lambda x, i, v: torch.zeros_like(x).scatter(1, i, v),
    )
    for function in functions:
        check(function, x, i % 5, v)
        assert not any(isinstance(node, Store) for node in lower(trace(function, x, i % 5, v), "f").graph.nodes)
    check(lambda x, i, v: x.scatter(0, i, v), x, torch.tensor([[5, 0, 3, 3, 1]]), torch.randn(1, 5))


def test_scatter_add_of_repeated_positions() -> None:
    i, x, v = places(5, 4, 6), randn(4, 5), randn(4, 6, seed=1)
    check(
        lambda x, i, v: (
            x.scatter_add(1, i, v), x.scatter_reduce(1, i, v, "sum"), x.scatter(1, i, v, reduce="add"),
        ),
        x, i, v,
    )  # fmt: skip
    check(
        lambda x, i, v: (x.index_add(0, i, v), x.index_add(-1, i, v.t())),
        randn(5, 5),
        places(5, 3),
        randn(3, 5, seed=1),
    )


def test_index_copy() -> None:
    check(lambda x, i, v: x.index_copy(1, i, v), randn(3, 5), torch.tensor([4, 0]), randn(3, 2, seed=1))


@pytest.mark.parametrize("reduce", ["prod", "amax", "mean"])
def test_other_reductions_are_library_calls(reduce: str) -> None:
    i, x, v = places(5, 4, 6), randn(4, 5), randn(4, 6, seed=1)
    check(lambda x, i, v: x.scatter_reduce(1, i, v, reduce), x, i, v, library=True)


def test_regions_of_a_copy() -> None:
    x = randn(4, 6)
    check(
        lambda x: (
            torch.slice_scatter(x, x[:, :3] * 2, 1, 1, 4), torch.slice_scatter(x, x[:, :2] * 2, 1, 1, 5, 2),
            torch.slice_scatter(x, x * 2), torch.slice_scatter(x, x[:1] * 3, 0, -2, -1),
            torch.slice_scatter(x, x[:0], 0, 2, 2), torch.select_scatter(x, x[0] * 2, 0, 2),
            torch.select_scatter(x, x[:, 0] * 2, -1, -1),
        ),
        x,
    )  # fmt: skip


@pytest.mark.parametrize("pad", [(1, 2), (0, 3, 2, 0), (-1, 2), (1, -2, -1, 1), (-1, -1)])
def test_padding(pad: tuple[int, ...]) -> None:
    check(lambda x: (aten.constant_pad_nd(x, pad, 1.5), aten.constant_pad_nd(x.long(), pad)), randn(3, 5) * 4)


def test_padding_of_nothing() -> None:
    check(lambda x: aten.constant_pad_nd(x, (2, 1), 1.5), randn(3, 0))


def test_inputs_are_written_and_later_readers_see_it() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        before, view = x * 2, x[:, 1:]
        x.copy_(y)
        return before, x + 1, view * 3

    x, y = randn(3, 4), randn(3, 1, seed=1, dtype=torch.float64)
    lowered = lower(trace(function, x, y), "inference")
    expected = function(x.clone(), y)
    for got, want in zip(interpret(lowered, x, y), expected, strict=True):
        torch.testing.assert_close(got, want)
    held = x.clone()
    from dcompile.reference import run_reference

    run_reference([lowered.graph], [[held, y]])
    torch.testing.assert_close(held, y.float().expand(3, 4))


def test_a_write_through_a_view_reaches_the_base() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z = x * 1.0
        z.t()[1:, ::2].copy_(y)
        return (z + 1, z)

    check(function, randn(4, 5), randn(4, 2, seed=1))


@pytest.mark.parametrize("shape", [(2,), (3, 3), (2, 2), (3, 2, 1)])
def test_a_source_that_does_not_fit_is_reported_by_the_library(shape: tuple[int, ...]) -> None:
    """Into rows 0, 1, 0 of a matrix of three by two."""
    args = (randn(3, 2), torch.tensor([0, 1, 0]), randn(*shape))

    def write(x: torch.Tensor, i: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return aten.index_add(x, 0, i, v)

    with pytest.raises((RuntimeError, IndexError)) as eager:
        write(*args)
    with pytest.raises(type(eager.value)):
        interpret(lower(trace(write, *args), "inference"), *args)
