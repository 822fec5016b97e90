"""Memory in host programs: which variable holds what, tensors and addresses of planned memory, allocation, release."""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from dcompile.codegen.host_text import Namer, dtype_text, size_text, sizes_text
from dcompile.codegen.places import Place, places
from dcompile.errors import CompilerBug
from dcompile.ir.index import as_size
from dcompile.ir.types import DType, Size, Value
from dcompile.plan import Home, Plan, Storage


class HostMemory:
    """The variables of a host program while it is printed, and its lines.

    Attributes:
        places: memory of every tensor.
        var: identifiers.
        symbols: variable of each size symbol.
        lines: the program so far.
        held: variable of the tensor that offsets from each anchor count from (``places.Place.anchor``).
        arena_tensors: tensors over arena memory: variable and the text that makes it, by memory and layout.
        pointer_uses: how often kernels get an address in each anchor's memory.
    """

    def __init__(self, plan: Plan, name: str, reserved: frozenset[str]) -> None:
        self.plan, self.name, self.graph = plan, name, plan.graph
        self.places = places(plan)
        self.var = Namer(reserved)
        self.symbols: dict[sympy.Symbol, str] = {}
        self.lines: list[str] = []
        self.held: dict[str, str] = {}
        self.arena_tensors: dict[tuple[object, ...], tuple[str, str]] = {}
        self.pointer_uses: dict[str, int] = {}
        self._typed: dict[str, Place] = {}
        self._aliases: dict[tuple[object, ...], str] = {}
        self._pointers: dict[str, str] = {}
        self._owned: dict[str, list[str]] = {}

    def say(self, text: str, comment: str = "") -> None:
        """Append a line."""
        self.lines.append(f"{text}  # {comment}" if comment else text)

    def device(self, device: str) -> str:
        """The expression of a device type."""
        return 'torch.device("cpu")' if device == "cpu" else f"device_{device}"

    def hold(self, anchor: str, variable: str, place: Place) -> None:
        """``variable`` now is the tensor that offsets from ``anchor`` count from."""
        self.held[anchor] = variable
        self._typed[anchor] = place
        self._owned.setdefault(anchor, []).append(variable)

    def allocate(self, name: str) -> None:
        """Make the FRESH storage of a value, unless it is there."""
        place = self.places[name]
        if place.anchor is None or place.anchor in self.held:
            return
        storage = self.plan.storages.get(place.anchor)
        if storage is None or storage.home is not Home.FRESH:
            raise CompilerBug(f"{self.name}: {name} is written before the memory of {place.anchor} exists")
        typed = self._representative(storage)
        variable = self.var.fresh(storage.name)
        device = "" if storage.device == "cpu" else f", device={self.device(storage.device)}"
        shape, stride = sizes_text(typed.shape, self.symbols), sizes_text(typed.stride, self.symbols)
        if storage.donor is None:
            self.say(f"{variable} = empty_strided({shape}, {stride}, dtype={dtype_text(typed.dtype)}{device})")
        else:
            self.say(f"{variable} = rt.take({self.held[storage.donor]}, {shape}, {stride}, {dtype_text(typed.dtype)})")
        self.hold(storage.name, variable, typed)

    def _representative(self, storage: Storage) -> Place:
        """The tensor to allocate ``storage`` as: an output that spans all of it if there is one, or plain bytes."""
        whole = [
            (name, place)
            for name, place in self.places.items()
            if place.anchor == storage.name and place.offset == 0 and _same(_span(place), storage.nbytes)
        ]
        whole.sort(key=lambda item: item[0] not in self.graph.output_names)
        if whole:
            return whole[0][1]
        return Place(storage.name, 0, DType.U8, (storage.nbytes,), (1,), storage.device)

    def tensor(self, name: str) -> str:
        """The expression of a tensor; makes it in a line of its own if needed."""
        return self.tensor_at(self.places[name], name)

    def tensor_at(self, place: Place, wish: str) -> str:
        if place.anchor is None and not _symbolic(place):
            return self._arena_tensor(place, wish)
        key = (place.anchor, place.offset, place.dtype, place.shape, place.stride)
        if key in self._aliases:
            return self._aliases[key]
        shape, stride = sizes_text(place.shape, self.symbols), sizes_text(place.stride, self.symbols)
        if place.anchor is None:
            offset = size_text(place.offset, self.symbols)
            return f"block.tensor({place.arena!r}, {offset}, {dtype_text(place.dtype)}, {shape}, {stride})"
        base, typed = self.held[place.anchor], self._typed[place.anchor]
        if place.offset == 0 and (place.dtype, place.shape, place.stride) == (typed.dtype, typed.shape, typed.stride):
            return base
        offset = size_text(_elements(place.offset, place.dtype.itemsize), self.symbols)
        dtype = "" if place.dtype is typed.dtype else f", {dtype_text(place.dtype)}"
        variable = self._aliases[key] = self.var.fresh(wish)
        self._owned[place.anchor].append(variable)
        self.say(f"{variable} = alias({base}, {offset}, {shape}, {stride}{dtype})")
        return variable

    def _arena_tensor(self, place: Place, wish: str) -> str:
        key = (place.arena, place.offset, place.dtype, place.shape, place.stride)
        if key not in self.arena_tensors:
            shape, stride = sizes_text(place.shape, {}), sizes_text(place.stride, {})
            made = f"block.tensor({place.arena!r}, {place.offset}, {dtype_text(place.dtype)}, {shape}, {stride})"
            self.arena_tensors[key] = (self.var.fresh(wish), made)
        return self.arena_tensors[key][0]

    def pointer(self, name: str) -> str:
        """The address of a tensor's first element; addresses used several times get a variable."""
        place = self.places[name]
        offset = "" if place.offset == 0 else f" + {size_text(place.offset, self.symbols)}"
        if place.anchor is None:
            return f"{place.arena}{offset}"
        if place.anchor in self._pointers:
            return f"{self._pointers[place.anchor]}{offset}"
        text = f"{self.held[place.anchor]}.data_ptr()"
        if self.pointer_uses.get(place.anchor, 0) > 1:
            variable = self._pointers[place.anchor] = self.var.fresh(f"{self.held[place.anchor]}_p")
            self.say(f"{variable} = {text}")
            text = variable
        return f"{text}{offset}"

    def forget(self, anchors: Sequence[str]) -> None:
        variables = [variable for anchor in anchors for variable in self._owned.pop(anchor, [])]
        for anchor in anchors:
            self.held.pop(anchor, None)
            self._pointers.pop(anchor, None)
            self._aliases = {key: value for key, value in self._aliases.items() if key[0] != anchor}
        if variables:
            self.say(f"del {', '.join(variables)}")

    def moved(self, name: str) -> None:
        """A library call has written ``name`` and may have given it other memory: ask for its address again."""
        self._pointers.pop(self.places[name].anchor or "", None)


def _symbolic(place: Place) -> bool:
    return any(isinstance(size, sympy.Expr) for size in (place.offset, *place.shape, *place.stride))


def _span(place: Place) -> Size:
    """Bytes from the first to the last element."""
    return as_size(Value("", place.dtype, place.shape, place.stride).nbytes)


def _same(a: Size, b: Size) -> bool:
    return bool(a == b or sympy.expand(a - b) == 0)


def _elements(nbytes: Size, itemsize: int) -> Size:
    """A byte offset in elements.

    Raises:
        CompilerBug: it is not a whole number of elements.
    """
    if isinstance(nbytes, int):
        if nbytes % itemsize:
            raise CompilerBug(f"host program: offset of {nbytes} bytes is no multiple of {itemsize}")
        return nbytes // itemsize
    return as_size(sympy.expand(nbytes / itemsize))
