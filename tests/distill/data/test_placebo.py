"""Partners: another text for every text, of similar length, determined by the seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.corpus.samples import Sample
from kvdistill.distill.data.placebo import ShuffledShard, partners


@given(st.lists(st.integers(1, 500), min_size=2, max_size=60), st.integers(0, 2**40))
def test_partners_are_a_permutation_without_fixed_points(lengths: list[int], seed: int) -> None:
    found = partners(lengths, seed)
    assert (found != np.arange(len(lengths))).all()
    assert sorted(found) == list(range(len(lengths)))
    assert (found == partners(lengths, seed)).all()


def test_partners_are_of_similar_length_and_depend_on_the_seed() -> None:
    lengths = list(np.random.default_rng(0).permutation(400))
    found = partners(lengths, 0)
    gaps = [abs(lengths[i] - lengths[j]) for i, j in enumerate(found)]
    assert max(gaps) <= 8  # groups of eight lengths in a row
    assert (found != partners(lengths, 1)).any()


def test_only_the_named_teachers_are_swapped() -> None:
    samples = tuple(Sample(name, (("text", name),)) for name in "abc")
    shards: Any = {"real": object(), "placebo": object()}
    lent = {"placebo": (shards["placebo"], np.array([1, 2, 0]))}
    item = ShuffledShard(samples, shards, lent).item(2)
    assert item.sample.sample_id == "c"
    assert {name: idx for name, (_, idx) in item.shards.items()} == {"real": 2, "placebo": 0}
