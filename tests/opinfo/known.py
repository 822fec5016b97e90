"""Operators that are not tested, or tested for less than equal values, by name and with the reason."""

from __future__ import annotations

from torch.testing._internal.common_methods_invocations import op_db

_NO_VALUES = (
    "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "resize_", "resize_as_",
)  # fmt: skip
UNINITIALISED: frozenset[str] = frozenset(_NO_VALUES)
"""Their results hold whatever the memory held."""


def _outside() -> dict[str, str]:
    found: dict[str, str] = {}
    for op in op_db:
        if "sparse" in op.name:
            found[op.full_name] = "sparse tensors"
        elif all(dtype.is_complex for dtype in op.dtypes):
            found[op.full_name] = "complex numbers only"
        elif op.full_name in ("to_sparse", "spmm"):
            found[op.full_name] = "sparse tensors"
    return found


OUTSIDE: dict[str, str] = _outside()
"""Entries that are about something else than dense real tensors."""

_DATA = "its result's shape or value decides the program; Dynamo splits it there"
UNTRACEABLE: dict[str, str] = dict.fromkeys(
    (
        "allclose", "argwhere", "combinations", "corrcoef", "cov", "equal", "index_fill", "item", "linalg.lstsq",
        "linalg.lstsq.grad_oriented", "masked_select", "narrow", "nn.functional.ctc_loss",
        "nn.functional.gaussian_nll_loss", "nonzero", "tensor_split", "unique", "unique_consecutive",
    ),
    _DATA,
)  # fmt: skip
"""Operators with samples that AOTAutograd cannot trace, whatever the backend. ``test_from_end_to_end`` runs some."""

_NO_FAKE = "PyTorch has no fake implementation for symbolic sizes"
UNTRACEABLE_SYMBOLIC: dict[str, str] = {
    **dict.fromkeys(("geqrf", "histogramdd", "nn.functional.fractional_max_pool3d"), _NO_FAKE),
    **dict.fromkeys(("resize_", "resize_as_"), "PyTorch does not resize the tensors its tracer wraps"),
}
"""Operators that AOTAutograd cannot trace with symbolic sizes."""

UNTRACEABLE_IN_PLACE: dict[str, str] = {
    f"polygamma.polygamma_n_{n}": "AOTAutograd takes polygamma_ for a custom operator" for n in range(5)
}
"""Operators whose in-place variant AOTAutograd cannot trace."""

FAILING: dict[str, str] = {
    "tensor_split-float32-dynamic": "positions in a tensor become sizes that nothing in the graph tells",
}
"""Cases of ``test_operators`` that do not pass yet, with the cause."""

END_TO_END = (
    "add", "addmm", "cat", "cumsum", "expand", "gather", "index_put", "linalg.inv", "masked_fill", "mul",
    "nn.functional.avg_pool2d", "nn.functional.batch_norm", "nn.functional.conv2d", "nn.functional.cross_entropy",
    "nn.functional.dropout", "nn.functional.embedding", "nn.functional.gelu", "nn.functional.interpolate.bilinear",
    "nn.functional.layer_norm", "nn.functional.max_pool2d", "nn.functional.pad.reflect", "rand_like", "scatter_add",
    "softmax.with_dtype", "sort", "special.zeta", "split", "std", "transpose_copy", "where",
)  # fmt: skip
"""Operators that the fast part compiles through ``torch.compile``."""
