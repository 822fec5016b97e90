import pytest
import torch
import torch.nn.functional as F

from dcompile.lower import lower
from tests.unit.lower.harness import check, compare, interpret, trace


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def places(n: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, n, shape, generator=torch.Generator().manual_seed(1))


def test_embedding() -> None:
    check(lambda w, i: (F.embedding(i, w), F.embedding(i, w, padding_idx=2)), randn(7, 4), places(7, 3, 5))
    check(lambda w, i: F.embedding(i, w), randn(7, 4), places(7, 6).int()[2])


def test_gather_and_index_select() -> None:
    check(lambda x, i: (x.gather(1, i), x.gather(-1, i)), randn(4, 6), places(6, 4, 3))
    check(lambda x, i: (x.index_select(0, i), x.index_select(-1, i)), randn(5, 6), places(5, 9))


INDEXINGS = {
    "one": lambda x, i, j: x[i],
    "second": lambda x, i, j: x[:, i],
    "neighbours": lambda x, i, j: x[:, i, j],
    "apart": lambda x, i, j: x[i, :, j],
    "broadcast": lambda x, i, j: x[i[:, None], j[None, :]],
    "trailing": lambda x, i, j: x[..., i],
    "negative": lambda x, i, j: x[i - 4, j - 4],
    "scalar": lambda x, i, j: torch.ops.aten.index(x, [i[0], j]),
    "matrix": lambda x, i, j: x[:, torch.stack((i, j))],
}


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("name", INDEXINGS)
def test_advanced_indexing(name: str, symbolic: bool) -> None:
    check(INDEXINGS[name], randn(4, 5, 6), places(4, 3), places(4, 3).flip(0), symbolic=symbolic)


def test_masks_are_a_library_call() -> None:
    check(lambda x: torch.index_put(x, (x > 0,), torch.tensor(2.0)), randn(4, 5), library=True)


def test_sizes_that_depend_on_data_are_learned_from_the_call() -> None:
    x = randn(4, 5)
    lowered = lower(trace(lambda x: x[x > 0] * 2, x), "inference")
    compare(interpret(lowered, x)[0], x[x > 0] * 2)


def test_out_of_range_is_reported() -> None:
    lowered = lower(trace(lambda x, i: x[i], randn(4, 5), places(4, 3)), "inference")
    with pytest.raises(IndexError):
        interpret(lowered, randn(4, 5), torch.tensor([0, 4, 1]))
