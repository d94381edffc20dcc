"""The reading order: every sample once, pure in (seed, epoch), restorable anywhere."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvdistill.distill.data.order import windows

SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=9)


def rows(
    seed: int, epoch: int, sizes: list[int], window: int, start: int = 0
) -> list[tuple[int, int]]:
    found = []
    for part in windows(seed, epoch, sizes, window, start):
        skip = max(0, start - part.first_position)
        found += [(int(s), int(i)) for s, i in part.rows[skip:]]
    return found


@given(sizes=SIZES, window=st.integers(1, 4), seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_every_sample_once_and_windows_hold_few_shards(
    sizes: list[int], window: int, seed: int, epoch: int
) -> None:
    found = rows(seed, epoch, sizes, window)
    assert sorted(found) == [(s, i) for s, size in enumerate(sizes) for i in range(size)]
    assert found == rows(seed, epoch, sizes, window)
    assert all(len(part.shards) <= window for part in windows(seed, epoch, sizes, window))


@given(sizes=SIZES, window=st.integers(1, 4), data=st.data())
def test_starting_anywhere_gives_the_tail(
    sizes: list[int], window: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, sum(sizes)))
    assert rows(3, 1, sizes, window, start) == rows(3, 1, sizes, window)[start:]


def test_epochs_and_seeds_differ() -> None:
    sizes = [5] * 8
    orders = [rows(seed, epoch, sizes, 3) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
