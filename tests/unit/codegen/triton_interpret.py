"""Runs cases of ``triton_cases`` in Triton's interpreter and compares them with the reference interpreter.

    TRITON_INTERPRET=1 python -m tests.unit.codegen.triton_interpret CASE...

A process of its own, because Triton reads that variable when it is imported. The interpreter has no libdevice: here its
functions are PyTorch's. And it multiplies the bits of bfloat16 matrices: here they are made float32 first.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from dcompile.codegen.triton import TritonSignature
from dcompile.reference import run_reference
from dcompile.runtime.triton_kernels import load_module
from tests.unit.codegen.triton_cases import CASES, Case, module_of, run_case

NAMES = {"rint": torch.round, "lgamma": torch.lgamma}


class _Libdevice(SimpleNamespace):
    """libdevice functions on interpreted values."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = NAMES.get(name) or getattr(torch, name)

        def call(*values: Any) -> Any:
            import triton.language as tl
            from triton.runtime.interpreter import TensorHandle

            shape = torch.broadcast_shapes(*(value.handle.data.shape for value in values))
            arguments = [torch.from_numpy(value.handle.data.copy()).expand(shape) for value in values]
            data = function(*arguments).numpy()
            kind = values[0].dtype.scalar
            blocked = any(value.type.is_block() for value in values)
            return tl.tensor(TensorHandle(data, kind), tl.block_type(kind, list(shape)) if blocked else kind)

        return call


def _range(*bounds: Any) -> Iterator[int]:
    """Loops whose bounds may be interpreted values."""
    return iter(range(*(int(b.handle.data.item()) if hasattr(b, "handle") else int(b) for b in bounds)))


def _wide_products() -> None:
    """Products of bfloat16 matrices as products of float32 ones, which hold the same numbers."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    narrow = InterpreterBuilder.create_dot

    def wide(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return narrow(self, wide(a), wide(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def check(case: Case) -> None:
    """Outputs of the interpreted kernels equal the reference's."""
    folder = Path(tempfile.mkdtemp(prefix="dcompile-test-"))
    path = folder / "kernels.py"
    path.write_text(module_of(case).source)
    module: ModuleType = load_module(path)
    module.libdevice = _Libdevice()  # type: ignore[attr-defined]
    module.range = _range  # type: ignore[attr-defined]

    def execute(name: str, signature: TritonSignature, buffers: Sequence[torch.Tensor], sizes: Sequence[int]) -> None:
        fault = torch.zeros(1, dtype=torch.int32)
        grid = eval(signature.programs, {f"s{n}": size for n, size in enumerate(sizes)})
        launch = signature.launch
        getattr(module, name)[(grid,)](*buffers, *sizes, fault, X=launch.block, R=launch.inner)
        assert int(fault) == 0, name

    got = run_case(case, execute)
    copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in case.inputs]
    want = run_reference([case.graph], [copies])[0]
    for ref, a, b in zip(case.graph.outputs, got, want, strict=True):
        assert isinstance(b, torch.Tensor)
        tolerance = (
            max(case.tolerance, 1e-2) if b.dtype is torch.bfloat16 else case.tolerance
        )  # narrowing truncates here
        message = partial("{}: {}".format, ref)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=message)


def main(names: Sequence[str]) -> int:
    _wide_products()
    warnings.simplefilter("ignore")  # numpy reports what special values do
    failed = 0
    for name in names:
        torch.manual_seed(0)
        try:
            check(CASES[name]())
        except Exception as error:
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(CASES)))
