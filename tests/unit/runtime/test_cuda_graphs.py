"""When programs are replayed as graphs, on a device that records calls on the CPU and runs them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dcompile.capture import storage_users
from dcompile.runtime.cuda_graphs import CLONED_BYTES, MOST_CAPTURES, GraphedProgram

BIG = CLONED_BYTES // 4 + 1


class Replayer:
    """Captures by running; a replay runs again and copies into the first results' memory, as a graph writes it."""

    def __init__(self, refuse: str = "") -> None:
        self.refuse, self.stream = refuse, 0

    def lane(self) -> object:
        return self.stream

    def capture(self, run: Callable[[], list[Any]]) -> tuple[Callable[[], None], list[Any]]:
        if self.refuse:
            raise RuntimeError(self.refuse)
        results = run()
        memory = [r.detach() if isinstance(r, Tensor) else r for r in results]

        def replay() -> None:
            for old, new in zip(memory, run(), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        return replay, results


def moving(*tensors: Tensor) -> list[Tensor]:
    """Inputs that lie elsewhere than the last ones did."""
    return [t.clone() for t in tensors]


def graphed(program: Callable[[list[Any]], list[Any]], **options: Any) -> GraphedProgram:
    given: dict[str, Any] = {"written": frozenset(), "returned": 0, "users": storage_users, "device": Replayer()}
    made = GraphedProgram(program, "test", **{**given, **options})
    made._settled = on_gpu(made._settled)  # type: ignore[method-assign]
    return made


def on_gpu(settled: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The CPU tensors of these tests pass for a GPU's."""

    class Elsewhere(Tensor):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("meta")

    return lambda inputs: settled([t.as_subclass(Elsewhere) if isinstance(t, Tensor) else t for t in inputs])


def product(inputs: list[Any]) -> list[Any]:
    weight, x = inputs
    inputs.clear()
    return [weight * x, None]


def run(program: GraphedProgram, weight: Tensor, keep: list[Any] | None = None, calls: int = 6) -> None:
    held = []
    for _ in range(calls):
        x = torch.randn(BIG)
        held.append(x)  # so that the next one lies elsewhere
        inputs = [weight, x]
        result, nothing = program(inputs)
        assert inputs == []
        assert nothing is None
        torch.testing.assert_close(result, weight * x)
        if keep is not None:
            keep.append((result, weight * x))
        del result


def test_a_settled_program_is_replayed_with_its_moving_inputs_copied() -> None:
    program = graphed(product)
    weight = torch.randn(BIG)
    run(program, weight)
    assert (program.captures, program.replays) == (1, 3)
    weight.mul_(2)
    run(program, weight, calls=1)
    assert program.replays == 4


def test_results_that_are_kept_stay_as_they_are() -> None:
    program = graphed(product)
    kept: list[tuple[Tensor, Tensor]] = []
    run(program, torch.randn(BIG), kept, calls=12)
    for result, want in kept:
        torch.testing.assert_close(result, want)
    assert program.replays <= 4


def test_a_detached_result_counts_as_kept() -> None:
    program = graphed(product)
    weight = torch.randn(BIG)
    run(program, weight, calls=4)
    x = torch.randn(BIG)
    part = program([weight, x])[0].detach()[1:]
    want = part.clone()
    run(program, weight, calls=3)
    assert torch.equal(part, want)


def test_small_results_for_the_user_are_copies() -> None:
    program = graphed(lambda inputs: [inputs[0].sum()], returned=1)
    weight = torch.randn(8)
    losses = []
    for _ in range(8):
        losses.append(program([weight])[0])
        weight.add_(1)
    assert len({float(loss) for loss in losses}) == 8
    assert program.replays == 8 - 3


def test_accumulating_gradients_alternate_between_two_graphs() -> None:
    program = graphed(product)
    weight, x = torch.randn(BIG), torch.randn(BIG)
    for _ in range(20):
        first = program([weight, x])[0]
        second = program([weight, x])[0]
        torch.testing.assert_close(first + second, 2 * weight * x)
        del first, second
    assert program.captures == 2
    assert program.replays > 20


def test_inputs_are_returned_and_aliased_as_the_callers_own() -> None:
    def views(inputs: list[Any]) -> list[Any]:
        weight, x = inputs
        return [x, x.detach()[2:5], weight + x]

    program = graphed(views)
    weight, xs = torch.randn(BIG), [torch.randn(BIG) for _ in range(6)]
    for x in xs:
        same, part, fresh = program([weight, x])
        assert same is x
        assert part.data_ptr() == x[2:].data_ptr()
        assert torch.equal(part, x[2:5])
        torch.testing.assert_close(fresh, weight + x)
        del fresh
    assert program.replays > 0


def test_an_input_that_is_written_is_never_copied() -> None:
    def count(inputs: list[Any]) -> list[Any]:
        inputs[0].add_(1)
        return []

    program = graphed(count, written=frozenset({0}))
    states = [torch.zeros(BIG) for _ in range(8)]
    for state in states:
        program([state])
    assert program.captures == 0
    for _ in range(5):
        program([states[0]])
    assert program.captures == 1
    assert float(states[0][0]) == 6 + 1  # capturing on this device also runs


def test_other_strides_at_the_same_address_run_the_plain_program() -> None:
    program = graphed(lambda inputs: [inputs[0].clone()])
    x = torch.randn(300, 300)
    for _ in range(5):
        program([x])
    replays = program.replays
    assert torch.equal(program([x.t()])[0], x.t())
    assert program.replays == replays


def test_each_stream_has_graphs_of_its_own() -> None:
    device = Replayer()
    program = graphed(product, device=device)
    weight, x = torch.randn(BIG), torch.randn(BIG)
    for _ in range(5):
        program([weight, x])
    replays, device.stream = program.replays, 1
    program([weight, x])
    assert program.replays == replays
    for _ in range(3):
        program([weight, x])
    assert program.captures == 2


def test_what_cannot_be_captured_warns_once_and_runs_plainly() -> None:
    program = graphed(product, device=Replayer("operation not permitted when stream is capturing"))
    with pytest.warns(RuntimeWarning, match="without a CUDA graph") as caught:
        run(program, torch.randn(BIG), calls=8)
    assert len(caught) == 1
    assert "not permitted" in program.refusal


def test_inputs_that_never_settle_stop_being_captured() -> None:
    program = graphed(product)
    for _ in range(MOST_CAPTURES + 8):
        run(program, torch.randn(BIG), calls=3)
    assert program.captures <= MOST_CAPTURES


def test_earlier_faults_are_raised_before_a_replay() -> None:
    def fail() -> None:
        raise IndexError("out of range in an earlier call")

    program = graphed(product, poll=fail)
    with pytest.raises(IndexError):
        run(program, torch.randn(BIG))


def test_memory_of_the_plain_program_is_given_back_after_a_capture() -> None:
    given_back = []
    program = graphed(product, captured=lambda: given_back.append(1))
    run(program, torch.randn(BIG))
    assert given_back == [1]
