"""The words in which the tiles of a scan tell each other what they come to.

Word 0 counts the tiles that were taken up. Then follow, for what a tile comes to alone and again for what it and all
before it come to, one word for each 32 bits of each result, row and tile: 1 in the upper half, the bits in the lower.
A word says by itself that it is there, so that no order between words matters (the single-pass scan of Merrill and
Garland, "Single-pass parallel prefix scan with decoupled look-back", 2016, with values of any width).
"""

from __future__ import annotations

from collections.abc import Sequence

from dcompile.ir.index import product
from dcompile.ir.types import DType, Size


def pieces(dtype: DType) -> int:
    """Words that one result takes."""
    return 2 if dtype.compute.itemsize == 8 else 1


def state_words(dtypes: Sequence[DType], rows: Size, tiles: Size) -> Size:
    """Words of a scan of so many rows in so many tiles, whose results have ``dtypes``."""
    told = product((2 * sum(map(pieces, dtypes)), rows, tiles))
    return told + 1


__all__ = ["pieces", "state_words"]
