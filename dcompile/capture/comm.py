"""Which graph nodes communicate. Names only: nothing here launches or waits for anything."""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import node as fx_node

NAMESPACE = "_c10d_functional"
AUTOGRAD_NAMESPACE = "_c10d_functional_autograd"
WAIT = "wait_tensor"


def op_name(target: Any) -> str:
    """``"_c10d_functional.all_reduce"`` of an overload or a packet; ``""`` of anything else."""
    if isinstance(target, OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return f"{namespace}.{name}"
    if isinstance(target, OpOverloadPacket):
        return target._qualified_op_name.replace("::", ".")
    return ""


def communication(node: fx.Node) -> str:
    """What ``node`` does: name of the collective it launches (``"all_reduce"``), ``"wait_tensor"``, or ``""``."""
    if node.op != "call_function":
        return ""
    namespace, _, name = op_name(node.target).partition(".")
    return name if namespace in (NAMESPACE, AUTOGRAD_NAMESPACE) else ""


def is_launch(node: fx.Node) -> bool:
    """``node`` starts a collective."""
    return communication(node) not in ("", WAIT)


def is_wait(node: fx.Node) -> bool:
    """``node`` ends a collective."""
    return communication(node) == WAIT


def is_view(node: fx.Node) -> bool:
    """``node`` gives an alias of its first argument: by its schema a view, or a ``getitem``."""
    if node.op != "call_function" or communication(node):
        return False
    if node.target is operator.getitem:
        return True
    return isinstance(node.target, OpOverload) and node.target.is_view


def view_root(node: fx.Node) -> fx.Node:
    """The node at the end of the chain of views that leads to ``node``."""
    while is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def acts(node: fx.Node) -> bool:
    """``node`` does something that its result does not show: it communicates, or calls a custom op that writes its
    arguments or returns no tensor."""
    return node.op == "call_function" and (bool(communication(node)) or _acts_unseen(node.target))


def _acts_unseen(target: Any) -> bool:
    if target is torch.ops.higher_order.auto_functionalized_v2:
        return True
    if not isinstance(target, OpOverload) or target.namespace in _BUILT_IN:
        return False
    return not any("Tensor" in str(returned.type) for returned in target._schema.returns)


_BUILT_IN = frozenset({"aten", "prims", "prim", NAMESPACE, AUTOGRAD_NAMESPACE})


def eliminate_dead_code(gm: fx.GraphModule) -> None:
    """Remove nodes without users. What acts always stays, communication above all: every rank must launch what the
    others launch."""
    gm.graph.eliminate_dead_code(is_impure_node=lambda node: acts(node) or bool(node.is_impure()) or _checks(node))


def _unseen_actions(gm: fx.GraphModule) -> set[Any]:
    """The ops that Dynamo's graph calls and that act, communication aside."""
    found: set[Any] = {torch.ops.higher_order.auto_functionalized_v2}
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            target: Any = node.target
            packet = isinstance(target, OpOverloadPacket)
            listed = [getattr(target, name) for name in target.overloads()] if packet else [target]
            found.update(one for one in listed if node.op == "call_function" and _acts_unseen(one))
    return found


def _checks(node: fx.Node) -> bool:
    """``node`` returns nothing: it is there to raise or to print."""
    return isinstance(node.target, OpOverload) and not node.target._schema.returns


def _targets() -> set[Any]:
    found: set[Any] = set()
    for registered in torch._C._dispatch_get_all_op_names():
        namespace, _, name = registered.partition("::")
        if namespace in (NAMESPACE, AUTOGRAD_NAMESPACE):
            packet = getattr(getattr(torch.ops, namespace), name.partition(".")[0])
            found.add(packet)
            found.update(getattr(packet, overload) for overload in packet.overloads())
    return found


_marking = threading.RLock()


@contextlib.contextmanager
def collectives_have_effects(enabled: bool = True) -> Iterator[None]:
    """While active, PyTorch's dead-code elimination keeps (``enabled``) or may drop functional collectives.

    PyTorch only marks ``wait_tensor`` so, and only sometimes; a launch whose result one rank does not use would be
    dropped on that rank and the others would hang.
    """
    with _marked(_targets(), enabled):
        yield


@contextlib.contextmanager
def actions_have_effects(gm: fx.GraphModule) -> Iterator[None]:
    """While active, PyTorch's dead-code elimination keeps everything in ``gm`` that ``acts``."""
    with _marked(_targets() | _unseen_actions(gm), True):
        yield


@contextlib.contextmanager
def _marked(targets: set[Any], enabled: bool) -> Iterator[None]:
    """Puts PyTorch's marks on ``targets``, or takes them away, and back afterwards: other compilers do not see them.

    The marks belong to the process. Blocks of one thread nest; a second thread waits until the first has left its
    outermost block, because neither may see the other's marks.
    """
    with _marking:
        marked = fx_node._side_effectful_functions
        changed = targets - marked if enabled else targets & marked
        marked.symmetric_difference_update(changed)
        try:
            yield
        finally:
            marked.symmetric_difference_update(changed)
