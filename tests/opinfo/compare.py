"""Is a result as good as eager PyTorch's?"""

from __future__ import annotations

import torch
from torch import Tensor

SLACK = 2.0
"""How many times eager's own distance from the float64 result ours may have."""
TOLERANCE: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-7, 1e-7),
    torch.float32: (1.3e-6, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float16: (1e-3, 1e-5),
    torch.complex64: (1.3e-6, 1e-5),
    torch.complex128: (1e-7, 1e-7),
}
"""(rtol, atol) of ``torch.testing.assert_close`` for each dtype: within it there is nothing to discuss."""


def difference(
    got: Tensor, want: Tensor, exact: Tensor | None = None, values: bool = True, strides: bool = True
) -> str:
    """What is wrong with ``got``; "" if nothing.

    Args:
        want: eager's result.
        exact: the same in float64, if it could be computed.
        values: False compares dtype, shape and strides only.
        strides: compare them too.
    """
    if got.dtype is not want.dtype:
        return f"dtype {got.dtype}, eager gives {want.dtype}"
    if got.shape != want.shape:
        return f"shape {tuple(got.shape)}, eager gives {tuple(want.shape)}"
    if got.layout is not want.layout:
        return f"layout {got.layout}, eager gives {want.layout}"
    if strides and want.layout is torch.strided and want.numel() > 1:
        sides = [d for d, n in enumerate(want.shape) if n != 1]
        if [got.stride(d) for d in sides] != [want.stride(d) for d in sides]:
            return f"strides {got.stride()}, eager gives {want.stride()} (shape {tuple(want.shape)})"
    if not values or want.numel() == 0:
        return ""
    return _values(got, want, exact)


def _values(got: Tensor, want: Tensor, exact: Tensor | None) -> str:
    rtol, atol = TOLERANCE.get(want.dtype, (0.0, 0.0))
    if torch.allclose(_wide(got), _wide(want), rtol, atol, equal_nan=True):
        return ""
    wrong = ~torch.isclose(_wide(got), _wide(want), rtol, atol, equal_nan=True)
    rounded = want.dtype.is_floating_point or want.dtype.is_complex
    judged = exact is not None and exact.shape == want.shape and rounded
    if judged and _no_further(_wide(got), _wide(want), _wide(exact), wrong, rtol, atol):
        return ""
    where = tuple(torch.nonzero(wrong)[0].tolist())
    more = f", float64 gives {exact[where].item()}" if judged else ""
    return (
        f"{int(wrong.sum())} of {wrong.numel()} values, first at {where}: "
        f"{got[where].item()}, eager gives {want[where].item()}{more}"
    )


def _no_further(got: Tensor, want: Tensor, exact: Tensor, wrong: Tensor, rtol: float, atol: float) -> bool:
    """Whether every doubtful value is about as close to the exact one as eager's values are somewhere."""
    theirs, ours = (want - exact).abs(), (got - exact).abs()
    fair = theirs.isfinite()
    worst = theirs[fair].max() if fair.any() else torch.tensor(0.0, dtype=torch.float64)
    limit = SLACK * worst + atol + rtol * exact.abs()
    same = torch.isclose(got, exact, rtol, atol, equal_nan=True)
    return bool((same | (ours <= limit))[wrong].all())


def _wide(value: Tensor) -> Tensor:
    value = value.detach().resolve_conj().resolve_neg()
    if value.layout is not torch.strided:
        value = value.to_dense()
    return value.to(torch.complex128 if value.dtype.is_complex else torch.float64)
