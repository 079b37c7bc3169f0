"""Segments: ranges are taken where they fit best, and join again when they are free."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from devguard.transport.leases import PAGE, Segment, round_up


def test_sizes_are_whole_pages() -> None:
    assert [round_up(nbytes) for nbytes in (0, 1, PAGE, PAGE + 1)] == [0, PAGE, PAGE, 2 * PAGE]


def test_the_smallest_range_that_fits_is_taken() -> None:
    segment = Segment(1, 10 * PAGE, [(0, 4 * PAGE), (6 * PAGE, 2 * PAGE)])
    assert segment.take(2 * PAGE) == 6 * PAGE
    assert segment.take(3 * PAGE) == 0
    assert segment.take(2 * PAGE) is None
    assert segment.free == [(3 * PAGE, PAGE)]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6)), max_size=40))
def test_ranges_never_overlap_and_all_free_ranges_join(steps: list[tuple[bool, int]]) -> None:
    segment = Segment(1, 16 * PAGE, [(0, 16 * PAGE)])
    taken: list[tuple[int, int]] = []
    for gives_back, size in steps:
        if gives_back and taken:
            segment.give_back(*taken.pop(size % len(taken)))
        elif not gives_back:
            offset = segment.take(size * PAGE)
            if offset is not None:
                taken.append((offset, size * PAGE))
        position = 0
        for offset, nbytes in sorted([*taken, *segment.free]):
            assert offset == position
            position += nbytes
        assert position == segment.nbytes
        assert segment.leases == len(taken)
        ends = {offset + nbytes for offset, nbytes in segment.free}
        assert not ends & {offset for offset, _ in segment.free}  # neighbours have joined
    while taken:
        segment.give_back(*taken.pop())
    assert segment.free == [(0, 16 * PAGE)]
