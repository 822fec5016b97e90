"""Whether the ranks of a group reach each other's memory, tried out, and what collectives cost that copy through it."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dcompile.analyse.calibration import Prices
from dcompile.collectives.nodes import Kind
from dcompile.runtime.comm import Team
from dcompile.runtime.peers import Block, Peers
from dcompile.runtime.symmetric import SymmetricWindow, refusal

Agree = Callable[[str, str], list[str]]
"""Gives the texts of all ranks under a key, see ``agree.exchange``."""

Runs = dict[tuple[Kind, int], Callable[[], Any]]
"""Collectives by kind and payload, as functions that launch one and give its work."""

MOST_RANKS = 8
"""GPUs that are joined to one another on one board."""

KINDS = (Kind.ALL_GATHER, Kind.ALL_TO_ALL)


def reach(team: Team, device: torch.device, agree: Agree, nbytes: int) -> tuple[Peers, Block] | None:
    """The group's ranks and a window of ``nbytes`` between them, if bytes written to each peer arrive there.

    Nothing is mapped unless every rank says that it can be, so that no rank waits for one that cannot.
    """
    said = agree("peers", json.dumps([socket.gethostname(), refusal(team.process_group, device)]))
    answers = [tuple(json.loads(text)) for text in said]
    if len(set(answers)) > 1 or answers[0][1] or team.size > MOST_RANKS:
        return None
    peers = Peers(team.rank, team.size, lambda size, where: SymmetricWindow(size, where, team.process_group))
    found = ""
    try:
        block = peers.allocate(nbytes, device)
        found = _try(peers, block, device)
    except RuntimeError as error:
        found = f"no: {error}"
    return (peers, block) if set(agree("peers reached", found)) == {""} else None


def _try(peers: Peers, block: Block, device: torch.device) -> str:
    """Whether a small gather gives what it must; "" if it does."""
    mine = torch.full((64,), peers.rank + 1, dtype=torch.int32, device=device)
    result = block.memory[: 256 * peers.ranks].view(torch.int32)
    result.zero_()
    torch.cuda.synchronize(device)
    peers.launch("all_gather", (mine,), (result,)).wait()
    wanted = torch.arange(1, peers.ranks + 1, dtype=torch.int32, device=device).repeat_interleave(64)
    return "" if torch.equal(result, wanted) else "no: other bytes have arrived"


def peer_runs(peers: Peers, block: Block, sizes: Sequence[int], device: torch.device) -> Runs:
    """A collective of each kind and payload, at most the window's size, into the window."""
    whole = torch.zeros(max(sizes), dtype=torch.uint8, device=device)

    def run(kind: Kind, nbytes: int) -> Callable[[], Any]:
        sent = nbytes // peers.ranks if kind is Kind.ALL_GATHER else nbytes // peers.ranks * peers.ranks
        result = block.memory[: sent * peers.ranks if kind is Kind.ALL_GATHER else sent]
        return lambda: peers.launch(kind.value, (whole[:sent],), (result,))

    return {(kind, size): run(kind, size) for kind in KINDS for size in sizes}


def prices_of(times: Mapping[tuple[Kind, int], float], contention: float) -> Prices:
    """What was measured, by kind and size."""
    kinds, sizes = dict.fromkeys(kind for kind, _ in times), sorted({size for _, size in times})
    return Prices({kind: tuple((size, times[kind, size]) for size in sizes) for kind in kinds}, contention)
