"""Sizes and durations: every unit, and the values that round up to the next one."""

from __future__ import annotations

import pytest

from kvdistill.text import format_bytes, format_duration, parse_bytes


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (5_234_000, "5.2 MB"),
        (99_960_000, "100 MB"),
        (534_000_000, "534 MB"),
        (999_600_000, "1.0 GB"),
        (31.4e9, "31.4 GB"),
        (2.5e12, "2.5 TB"),
        (1.2345e16, "12,345 TB"),
    ],
)
def test_sizes(size_bytes: float, shown: str) -> None:
    assert format_bytes(size_bytes) == shown


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("2TB", 2e12), ("500 GB", 5e11), ("1.5TiB", 1.5 * 2**40), ("10kB", 1e4), (".5MiB", 2**19)],
)
def test_sizes_that_people_write(text: str, size_bytes: float) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.42, "0.4 s"),
        (9.96, "10 s"),
        (97, "97 s"),
        (119.6, "2 min"),
        (2280, "38 min"),
        (7169, "119 min"),
        (7171, "2.0 h"),
        (55_080, "15.3 h"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown
