"""Python objects in a graph, such as the device mesh of a DTensor, pass by the compiled program.

AOTAutograd takes a DTensor apart into its local tensor and, from torch 2.13 on, its mesh, an input or a constant.
Nothing computes with it: a graph only hands it back where it returns a DTensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from dcompile.capture.origins import source_of
from dcompile.capture.outputs import edit_outputs, output_node, outputs_of
from dcompile.errors import Unsupported
from dcompile.ir.types import Origin

Program = Callable[[list[Any]], Sequence[Any]]


_PLAIN = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, int, float, str, fx.GraphModule, type(None))


def _objects(gm: fx.GraphModule) -> dict[fx.Node, Any]:
    """Opaque inputs by their position, opaque constants themselves in a list of one."""
    found: dict[fx.Node, Any] = {}
    position = 0
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if "val" in node.meta and not isinstance(node.meta["val"], _PLAIN):
                found[node] = position
            position += 1
        elif node.op == "get_attr":
            constant: Any = gm
            for part in str(node.target).split("."):
                constant = getattr(constant, part)
            if not isinstance(constant, _PLAIN):
                found[node] = [constant]
    return found


def lift_opaque(
    gm: fx.GraphModule, inputs: list[Any]
) -> tuple[list[Any], Callable[[Program], Program], tuple[int, ...]]:
    """Take opaque inputs and constants out of ``gm``, in place.

    Args:
        gm: a traced graph.
        inputs: one for each of its placeholders.

    Returns:
        The inputs that are left, what makes of a program for the new graph one for the old, and the positions of the
        outputs that are gone.

    Raises:
        Unsupported: an op uses the object.
    """
    opaque = _objects(gm)
    if not opaque:
        return inputs, lambda program: program, ()
    output = output_node(gm)
    for node in opaque:
        for user in node.users:
            if user is not output:
                raise Unsupported(
                    Origin((str(user.target),), source_of(user)),
                    what=f"the operator {user.target}, which takes a Python object",
                    instead="keep it outside the compiled function",
                )
    results = outputs_of(gm)
    returned = {place: opaque[item] for place, item in enumerate(results) if item in opaque}
    edit_outputs(gm, lambda entries: [entry for place, entry in enumerate(entries) if place not in returned])
    for node in opaque:
        gm.graph.erase_node(node)
    gm.recompile()
    lifted = frozenset(position for position in opaque.values() if isinstance(position, int))

    def wrap(program: Program) -> Program:
        def call(arguments: list[Any]) -> Sequence[Any]:
            objects = {n: arguments[at] if isinstance(at, int) else at[0] for n, at in returned.items()}
            kept = [argument for position, argument in enumerate(arguments) if position not in lifted]
            arguments.clear()
            tensors = iter(program(kept))
            return tuple(objects[n] if n in objects else next(tensors) for n in range(len(results)))

        return call

    left = [item for position, item in enumerate(inputs) if position not in lifted]
    return left, wrap, tuple(returned)
