"""All that decides what becomes of Dynamo's graph, as one text: equal texts are compiled to the same programs.

What cannot be told by a text (a Python object as an argument, an operator with its author's own rules for gradients)
raises ``Unsuited``. No text depends on the rank: the current device is called so, whatever its number.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch._guards import TracingContext
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import _get_qualified_name as qualified_name
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

from dcompile.capture.decompositions import decompositions
from dcompile.capture.origins import source_of

GroupSize = Callable[[str], int | None]

_OPERATORS = ("aten", "prims", "_c10d_functional", "_c10d_functional_autograd")
"""Namespaces whose operators have their gradients and meaning from PyTorch."""

_PROGRAMS = ("autograd_function_apply", "wrap")
"""Operators on programs that are told by the programs themselves."""

_LIBRARIES = ("torch", "_operator", "operator", "math", "builtins", "dcompile")
"""Packages whose functions change with a version that is part of the key."""

_UNTOLD = frozenset(
    {
        "example_value", "val", "tensor_meta", "stack_trace", "nn_module_stack", "fwd_nn_module_stack",
        "source_fn_stack", "seq_nr", "original_aten", "from_node", "grapharg", "tensor_dict", "steal_arg",
        "torch_fn", "dcompile_source",
    }
)  # fmt: skip
"""Notes on a node that follow from the rest, or do not matter."""

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


class Unsuited(Exception):
    """There is no text for a graph; says why in words that do not vary with the program."""


def identity(gm: fx.GraphModule, inputs: Sequence[Any], salt: str, group_size: GroupSize) -> str:
    """64 hexadecimal digits for ``gm`` on ``inputs`` in the present state of PyTorch.

    Args:
        salt: what else counts.
        group_size: how many ranks a process group has, None for a text that names none.

    Raises:
        Unsuited: why there are none.
    """
    lines = [salt, *_surroundings(), *(_input(item) for item in inputs), f"storages {_storages(inputs)}"]
    lines += _Text(group_size).graph(gm)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Text:
    """Graphs as lines, the programs in them too."""

    def __init__(self, group_size: GroupSize) -> None:
        self.group_size = group_size

    def graph(self, gm: fx.GraphModule) -> list[str]:
        numbers: dict[fx.Node, int] = {}
        lines: list[str] = []
        for node in gm.graph.nodes:
            numbers[node] = len(numbers)
            args = self.value([*node.args, dict(node.kwargs)], numbers)
            lines.append(f"%{numbers[node]} = {self.head(gm, node)} {args} {self.notes(node)} {source_of(node)}")
            _check_sizes(node.meta.get("example_value"))
        return lines

    def head(self, gm: fx.GraphModule, node: fx.Node) -> str:
        if node.op in ("placeholder", "output"):
            return node.op
        if node.op == "call_method":
            return f"method {node.target}"
        if node.op == "call_function":
            return f"call {self.function(node.target)}"
        found: Any = gm
        for part in str(node.target).split("."):
            found = getattr(found, part)
        if node.op == "get_attr" and isinstance(found, fx.GraphModule):
            return "program (\n" + "\n".join(self.graph(found)) + "\n)"
        if node.op == "get_attr":
            raise Unsuited("a constant tensor or object in the graph")
        raise Unsuited("a module in the graph")

    def function(self, target: Any) -> str:
        if isinstance(target, OpOverload | OpOverloadPacket):
            name = str(target)
            namespace = target.namespace if isinstance(target, OpOverload) else target._qualified_op_name.split("::")[0]
            if namespace not in _OPERATORS:
                raise Unsuited("an operator that is not PyTorch's")
            return name
        if isinstance(target, HigherOrderOperator):
            operator = str(target)
            if operator not in _PROGRAMS:
                raise Unsuited(f"the operator {operator} on programs")
            return operator
        name = qualified_name(target)
        if name.partition(".")[0] not in _LIBRARIES:
            raise Unsuited("a function that is not PyTorch's")
        return name

    def notes(self, node: fx.Node) -> str:
        kept = {key: value for key, value in node.meta.items() if key not in _UNTOLD}
        return self.value(kept, {}) if kept else ""

    def value(self, item: Any, numbers: Mapping[fx.Node, int]) -> str:
        """An argument as a text."""
        if isinstance(item, fx.Node):
            return f"%{numbers[item]}"
        if item is None or item is Ellipsis or isinstance(item, bool | int | complex):
            return repr(item)
        if isinstance(item, float):
            return item.hex()
        if isinstance(item, str):
            size = self.group_size(item)
            return repr(item) if size is None else f"{item!r} of {size}"
        if isinstance(item, torch.dtype | torch.layout | torch.memory_format):
            return str(item)
        if isinstance(item, torch.device):
            return device_name(item)
        if isinstance(item, slice):
            return f"slice{self.value((item.start, item.stop, item.step), numbers)}"
        if isinstance(item, list | tuple):
            inner = ", ".join(self.value(part, numbers) for part in item)
            return f"[{inner}]" if isinstance(item, list) else f"({inner})"
        if isinstance(item, dict):
            pairs = (f"{self.value(k, numbers)}: {self.value(v, numbers)}" for k, v in item.items())
            return "{" + ", ".join(pairs) + "}"
        if isinstance(item, _SYMBOLS):
            raise Unsuited("sizes that are symbols")
        raise Unsuited(f"an argument of type {type(item).__name__}")


def device_name(device: torch.device) -> str:
    """The device as every rank has it: without a number if it is the current one."""
    if device.index is None or device.type == "cpu":
        return device.type
    if device.type == "cuda" and device.index == torch.cuda.current_device():
        return device.type
    return str(device)


def _input(item: Any) -> str:
    if isinstance(item, _SYMBOLS):
        raise Unsuited("sizes that are symbols")
    if not isinstance(item, torch.Tensor):
        raise Unsuited(f"an input of type {type(item).__name__}")
    if type(item) not in (torch.Tensor, torch.nn.Parameter, FakeTensor):
        raise Unsuited("an input of a tensor subclass")
    if item.layout is not torch.strided or item.is_quantized:
        raise Unsuited("an input that is not strided")
    _check_sizes(item)
    flags = [isinstance(item, torch.nn.Parameter), item.requires_grad, item.is_leaf, item.is_inference()]
    flags += [item.is_conj(), item.is_neg(), item._is_view()]
    place = (tuple(item.shape), item.stride(), item.storage_offset())
    return f"input {item.dtype} {device_name(item.device)} {place} {flags}"


def _check_sizes(value: Any) -> None:
    if isinstance(value, _SYMBOLS):
        raise Unsuited("sizes that are symbols")
    if isinstance(value, torch.Tensor):
        if any(isinstance(size, torch.SymInt) for size in value.shape):
            raise Unsuited("sizes that are symbols")
    elif isinstance(value, list | tuple):
        for item in value:
            _check_sizes(item)


def storage_number(item: torch.Tensor) -> int:
    """A number that tensors on the same memory share."""
    return int(item.untyped_storage()._cdata)


def _storages(inputs: Sequence[torch.Tensor]) -> list[int]:
    """For each input the first one that shares its memory."""
    if len({id(item) for item in inputs}) < len(inputs):
        raise Unsuited("an input that is passed twice")
    numbers = [storage_number(item) for item in inputs]
    first: dict[int, int] = {}
    return [first.setdefault(number, place) for place, number in enumerate(numbers)]


def _surroundings() -> list[str]:
    """PyTorch's state and settings that tracing looks at."""
    context = TracingContext.try_get()
    if context is not None and context.fakify_first_call:
        raise Unsuited("a first call on fake tensors")
    modes: list[Callable[[], Any]] = [function_modes, dispatch_modes]
    if any(mode() for mode in modes):
        raise Unsuited("a mode that changes what operators do")
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        raise Unsuited("hooks on saved tensors")
    if dynamo_config.compiled_autograd:
        raise Unsuited("compiled autograd")
    kinds = ("cpu", "cuda")
    autocast = [(kind, torch.is_autocast_enabled(kind), str(torch.get_autocast_dtype(kind))) for kind in kinds]
    attention: Any = torch.backends.cuda
    table = decompositions().items()
    parts: dict[str, Any] = {
        "torch": (torch.__version__, platform.python_version()),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": (autocast, torch.is_autocast_cache_enabled()),
        "defaults": (str(torch.get_default_dtype()), device_name(torch.get_default_device())),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        ),
        "attention": (
            attention.flash_sdp_enabled(),
            attention.mem_efficient_sdp_enabled(),
            attention.math_sdp_enabled(),
            attention.cudnn_sdp_enabled(),
        ),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "cpu": (torch.backends.mkldnn.enabled, torch.backends.cpu.get_cpu_capability()),  # type: ignore[attr-defined]
        "gpu": _gpu(),
        "functorch": sorted(
            (key, str(value)) for key, value in functorch_config.get_serializable_config_copy().items()
        ),
        "table": sorted(f"{op} {getattr(f, '__module__', '')}.{getattr(f, '__qualname__', '')}" for op, f in table),
    }
    return [f"{name} {value}" for name, value in parts.items()]


def _gpu() -> tuple[Any, ...]:
    if not torch.cuda.is_available():
        return ()
    return (torch.cuda.get_device_name(), torch.cuda.get_device_capability())
