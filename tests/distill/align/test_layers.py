"""Layer maps, groups of unequal geometry, and layers matched by CKA."""

from __future__ import annotations

from itertools import combinations_with_replacement, permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.distill.align.layers import (
    CKA_TOKENS,
    MinibatchCKA,
    by_group,
    layer_map,
    monotone_map,
)
from kvdistill.distill.align.resample import align_global
from kvdistill.errors import ConfigError, GeometryError
from kvdistill.types import LayerGroup
from tests.distill.dense import place


def depths(mapping):
    return [
        low + (up - low) * part
        for low, up, part in zip(mapping.lower, mapping.upper, mapping.fraction, strict=True)
    ]


@pytest.mark.parametrize(
    ("method", "student", "teacher", "expected"),
    [
        ("ratio", 6, 30, [0, 5, 10, 15, 20, 25]),
        ("ratio", 4, 6, [0, 1.5, 3, 4.5]),
        ("ratio", 4, 2, [0, 0.5, 1, 1]),
        ("uniform", 3, 30, [0, 14.5, 29]),
        ("uniform", 1, 5, [0]),
        ("uniform", 4, 2, [0, 1 / 3, 2 / 3, 1]),
        ("skip", 4, 30, [0, 7, 14, 21]),
        ("last_aligned", 4, 6, [2, 3, 4, 5]),
    ],
)
def test_depths(method, student, teacher, expected):
    assert depths(layer_map(method, student, range(teacher))) == pytest.approx(expected)


@given(
    st.sampled_from(["ratio", "uniform"]),
    st.integers(1, 40),
    st.lists(st.integers(0, 80), min_size=1, max_size=40, unique=True).map(sorted),
)
def test_stays_inside_and_rises(method, student, layers):
    mapping = layer_map(method, student, layers)
    assert set(mapping.needed) <= set(layers)
    assert len(mapping.lower) == student
    assert depths(mapping) == sorted(depths(mapping))
    assert all(0 <= part < 1 for part in mapping.fraction)


@given(st.sampled_from(["ratio", "uniform", "skip", "last_aligned"]), st.integers(1, 12))
def test_equal_depth_is_the_identity(method, num_layers):
    mapping = layer_map(method, num_layers, range(num_layers))
    assert depths(mapping) == list(range(num_layers))
    assert mapping.needed == tuple(range(num_layers))


def test_apply_mixes_the_two_neighbours():
    mapping = layer_map("explicit", 3, [2, 5, 6, 9], explicit=[2, 5.25, 9])
    assert mapping.needed == (2, 5, 6, 9)
    x = torch.randn(2, 4, 3, 7, 5, requires_grad=True)
    out = mapping.apply(x)
    expected = torch.stack([x[:, 0], 0.75 * x[:, 1] + 0.25 * x[:, 2], x[:, 3]], 1)
    torch.testing.assert_close(out, expected)


def test_an_unused_upper_layer_is_not_needed():
    mapping = layer_map("ratio", 3, range(6))
    assert mapping.needed == (0, 2, 4)
    x = torch.randn(1, 3, 1, 1, 1)
    torch.testing.assert_close(mapping.apply(x), x)


def test_errors_name_the_layers():
    with pytest.raises(GeometryError, match=r"needs teacher layers \[0, 2, 4\], got an axis of 2"):
        layer_map("ratio", 3, range(6)).apply(torch.zeros(1, 2, 1, 1, 1))
    with pytest.raises(GeometryError, match=r"needs teacher layers \[0, 2, 4\], got an axis of 6"):
        layer_map("ratio", 3, range(6)).apply(torch.zeros(1, 6, 1, 1, 1))
    with pytest.raises(ConfigError, match="got 2 for 3; use ratio"):
        layer_map("last_aligned", 3, range(2))
    with pytest.raises(ConfigError, match=r"teacher layers \[7\] that are not stored"):
        layer_map("explicit", 2, range(6), explicit=[0, 7])
    with pytest.raises(ConfigError, match="one teacher layer per student layer, got 1 for 2"):
        layer_map("explicit", 2, range(6), explicit=[0])


@pytest.mark.parametrize("num_student", [2, 4, 9])
def test_bands_and_layer_maps_commute(num_student):
    mapping = layer_map("uniform", num_student, range(4))
    x = torch.randn(2, 4, 3, 8, 5)[:, list(mapping.needed)]
    band = align_global(torch.ones(2, 6).bool(), torch.ones(2, 8).bool())
    expected = place(band, mapping.apply(x))
    torch.testing.assert_close(mapping.apply(place(band, x)), expected)


def groups(*layers):
    return [LayerGroup(tuple(chosen), 2, 64, 64) for chosen in layers]


def test_one_group_is_the_map_itself():
    mapping = layer_map("uniform", 4, range(10))
    assert list(by_group(mapping, groups(range(10)))) == [(0, (0, 1, 2, 3), mapping)]


def test_a_layer_between_groups_takes_the_nearer():
    mapping = layer_map("explicit", 4, range(4), explicit=[0.5, 1.25, 1.75, 3])
    (_, served, first), (_, others, second) = by_group(mapping, groups([0, 1], [2, 3]))
    assert (served, first.lower) == ((0, 1), (0, 1))
    assert first.fraction == (0.5, 0.0)
    assert (others, second.lower) == ((2, 3), (2, 3))


@given(st.integers(1, 12), st.lists(st.integers(0, 2), min_size=1, max_size=16))
def test_every_student_layer_is_served_once(num_student, owners):
    members = [[i for i, owner in enumerate(owners) if owner == g] for g in range(3)]
    split = [*by_group(layer_map("ratio", num_student, range(len(owners))), groups(*members))]
    served = [layer for _, layers, _ in split for layer in layers]
    assert sorted(served) == list(range(num_student))
    for group_idx, _, mapping in split:
        assert set(mapping.needed) <= set(members[group_idx])


def cka(student, *teacher_batches):
    found = MinibatchCKA()
    for x, y in zip(student, teacher_batches, strict=True):
        found.add(list(x), iter(y))
    return found.value()


def hsic(x, y):
    """The unbiased estimator as a mean over all ordered quadruples of different tokens."""
    k, m = x.double() @ x.double().T, y.double() @ y.double().T
    terms = [
        k[a, b] * (m[a, b] + m[c, d] - 2 * m[a, c]) for a, b, c, d in permutations(range(len(x)), 4)
    ]
    return float(torch.stack(terms).mean())


def test_cka_equals_the_mean_over_quadruples_of_tokens():
    torch.manual_seed(0)
    batches = [(torch.randn(2, n, 5), torch.randn(3, n, 7) + 2) for n in (8, 6)]
    got = cka([x for x, _ in batches], *(y for _, y in batches))
    for i in range(2):
        for j in range(3):
            pairs = [(x[i], y[j]) for x, y in batches]
            cross, own, theirs = (
                sum(hsic(*way(x, y)) for x, y in pairs)
                for way in (lambda x, y: (x, y), lambda x, _: (x, x), lambda _, y: (y, y))
            )
            assert float(got[i, j]) == pytest.approx(cross / (own * theirs) ** 0.5, rel=1e-3)


def test_cka_does_not_depend_on_the_batches():
    torch.manual_seed(0)
    x = torch.randn(1, 4000, 6)
    y = x @ torch.randn(6, 6) + 2 * torch.randn(1, 4000, 6)
    small = cka(x.split(100, 1), *y.split(100, 1))
    large = cka(x.split(1000, 1), *y.split(1000, 1))
    assert float(small) == pytest.approx(float(large), abs=0.02)
    assert 0.1 < float(large) < 0.9


def test_unrelated_layers_are_not_alike_even_where_channels_outnumber_tokens():
    torch.manual_seed(0)
    x, y = torch.randn(1, 60, 500), torch.randn(1, 60, 500)
    assert abs(float(cka([x], y))) < 0.05  # the biased estimator finds 0.9


def test_a_long_batch_is_thinned_evenly():
    torch.manual_seed(0)
    x = torch.randn(1, 2 * CKA_TOKENS, 4)
    assert torch.equal(cka([x], x.flip(2)), cka([x[:, ::2]], x.flip(2)[:, ::2]))


def test_a_rotated_and_scaled_layer_is_itself():
    torch.manual_seed(0)
    teacher = torch.randn(5, 300, 6)
    turn = torch.linalg.qr(torch.randn(6, 6)).Q
    similarity = cka([3 * teacher[[0, 2, 3]] @ turn + 1], teacher)
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(similarity[[0, 1, 2], [0, 2, 3]], ones, atol=1e-5, rtol=0)
    assert monotone_map(similarity, [1, 2, 4, 6, 9]).lower == (1, 4, 6)


def test_cka_without_a_pilot_is_refused():
    with pytest.raises(ConfigError, match="cka has no pilot"):
        MinibatchCKA().value()


@pytest.mark.parametrize("seed", range(8))
def test_assignment_is_the_best_monotone_one(seed):
    similarity = torch.rand(4, 5, generator=torch.Generator().manual_seed(seed))
    best = max(
        combinations_with_replacement(range(5), 4),
        key=lambda way: sum(float(similarity[i, j]) for i, j in enumerate(way)),
    )
    assert monotone_map(similarity, range(5)).lower == best


def test_fewer_teacher_layers_than_student_layers():
    mapping = monotone_map(torch.rand(6, 2), [3, 7])
    assert len(mapping.lower) == 6
    assert list(mapping.lower) == sorted(mapping.lower)
    assert set(mapping.needed) <= {3, 7}


def test_cka_refuses_undefined_similarities():
    with pytest.raises(ConfigError, match="finite similarities"):
        monotone_map(torch.full((2, 2), float("nan")), [0, 1])
