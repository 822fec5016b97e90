from __future__ import annotations

import torch

from dcompile.plan import ALIGNMENT
from dcompile.runtime.arena import Arena, alias


def test_a_block_is_used_again_and_a_second_call_gets_another() -> None:
    arena = Arena({"cpu": 1000}, lambda block: (block.tensor("cpu", 64, torch.float32, (2, 3), (3, 1)),))
    first, second = arena.take(), arena.take()
    assert first is not second
    assert first.base["cpu"] % ALIGNMENT == second.base["cpu"] % ALIGNMENT == 0
    assert abs(first.base["cpu"] - second.base["cpu"]) >= 1000
    assert first.tensors[0].data_ptr() == first.base["cpu"] + 64
    arena.give(first)
    assert arena.take() is first


def test_tensors_over_a_block_share_its_bytes() -> None:
    block = Arena({"cpu": 256}).take()
    values = torch.randn(4, 3)
    block.tensor("cpu", 16, torch.float32, (4, 3), (3, 1)).copy_(values)
    assert torch.equal(block.tensor("cpu", 20, torch.float32, (2, 3), (1, 2)), values.view(-1)[1:7].view(3, 2).t())
    assert torch.equal(block.tensor("cpu", 16, torch.uint8, (48,), (1,)), values.view(-1).view(torch.uint8))


def test_an_alias_is_no_autograd_view_and_counts_in_its_own_dtype() -> None:
    whole = torch.randn(6, 4)
    base = whole[1:]
    part = alias(base, 4, (4, 2), (1, 4))
    assert torch.equal(part, base[1:3].t())
    assert not part._is_view()
    part.zero_()
    assert not whole[2:4].any()
    assert torch.equal(alias(base, 2, (2,), (1,), torch.int16), base.view(-1)[1:2].view(torch.int16))
