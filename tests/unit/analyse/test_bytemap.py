"""The byte map against a plain list of bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dcompile.analyse.bytemap import ByteMap

SPAN = 24
ranges = st.tuples(st.integers(0, SPAN), st.integers(0, SPAN)).map(lambda pair: (min(pair), max(pair)))


@given(st.lists(st.tuples(st.booleans(), ranges, st.integers(1, 5)), max_size=25))
def test_it_behaves_like_a_list_of_bytes(steps: list[tuple[bool, tuple[int, int], int]]) -> None:
    plain = [0] * SPAN
    packed = ByteMap(0)
    for is_set, (start, stop), value in steps:
        if is_set:
            packed.set(start, stop, value)
            plain[start:stop] = [value] * (stop - start)
        else:
            packed.update(start, stop, lambda old, value=value: (old + value) % 7)  # type: ignore[misc]
            plain[start:stop] = [(old + value) % 7 for old in plain[start:stop]]
        assert [v for lo, hi, v in packed.over(0, SPAN) for _ in range(lo, hi)] == plain
        assert [v for lo, hi, v in packed.over(start, stop) for _ in range(lo, hi)] == plain[start:stop]
    for (_, end, _), (begin, _, _) in zip(list(packed.over(0, SPAN)), list(packed.over(0, SPAN))[1:], strict=False):
        assert end == begin


def test_updates_that_cancel_leave_one_stretch() -> None:
    held: ByteMap[frozenset[str]] = ByteMap(frozenset())
    for start in range(0, 600, 6):
        held.update(start, start + 6, lambda old: old | {"p"})
    assert len(list(held.over(0, 600))) == 1
    held.update(0, 600, lambda old: old - {"p"})
    assert list(held.over(0, 700)) == [(0, 700, frozenset())]
