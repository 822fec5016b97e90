"""Lowering: from traced ATen ops to the LOOPS level of the IR, one rule per op in a table, split by family."""

from __future__ import annotations

from dcompile.lower import (
    activation,
    collective,
    concat,
    creation,
    embedding_bag,
    foreach,
    indexing,
    loss,
    matmul,
    moments,
    norm,
    point_to_point,
    pointwise,
    pooling,
    random,
    reduction,
    scan,
    scatter,
    special,
    storage,
    upsample,
    view,
)
from dcompile.lower.constants import OnDevice
from dcompile.lower.fallback import LIBRARY_OPS
from dcompile.lower.lowered import Extra, Lowered, SizeOf
from dcompile.lower.table import RULES
from dcompile.lower.walk import lower

FAMILIES = (
    point_to_point,
    pointwise,
    activation,
    creation,
    foreach,
    random,
    view,
    storage,
    concat,
    indexing,
    embedding_bag,
    loss,
    scatter,
    reduction,
    moments,
    scan,
    matmul,
    norm,
    pooling,
    upsample,
    special,
    collective,
)
"""The files that hold rules; importing them fills ``RULES``."""

__all__ = [
    "FAMILIES",
    "LIBRARY_OPS",
    "RULES",
    "Extra",
    "Lowered",
    "OnDevice",
    "SizeOf",
    "lower",
]
