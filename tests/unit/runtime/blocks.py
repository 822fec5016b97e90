"""Where the working memory of a program is, for tests."""

from __future__ import annotations

from dcompile.runtime.arena import Block
from dcompile.runtime.program import Executable


def waiting_blocks(run: Executable) -> list[Block]:
    """The blocks that no call holds now."""
    free = run.run.__globals__["arena"]._free
    return [block for blocks in free.values() for block in blocks]
