"""Layer maps: where student layers look, and that mixing them is a plain weighted sum."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.distill.align.layers import layer_map
from kvdistill.distill.align.resample import align_global
from kvdistill.errors import ConfigError, GeometryError
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
    with pytest.raises(
        GeometryError, match=r"expected teacher layers \[0, 2, 4\], got an axis of 2"
    ):
        layer_map("ratio", 3, range(6)).apply(torch.zeros(1, 2, 1, 1, 1))
    with pytest.raises(ConfigError, match="got 2 for 3; use ratio"):
        layer_map("last_aligned", 3, range(2))
    with pytest.raises(ConfigError, match=r"teacher layers \[7\] that are not stored"):
        layer_map("explicit", 2, range(6), explicit=[0, 7])
    with pytest.raises(ConfigError, match="one teacher layer per student layer, got 1 for 2"):
        layer_map("explicit", 2, range(6), explicit=[0])
    with pytest.raises(ConfigError, match="both need at least one"):
        layer_map("ratio", 2, [])


@pytest.mark.parametrize("num_student", [2, 4, 9])
def test_bands_and_layer_maps_commute(num_student):
    mapping = layer_map("uniform", num_student, range(4))
    x = torch.randn(2, 4, 3, 8, 5)[:, list(mapping.needed)]
    band = align_global(torch.ones(2, 6).bool(), torch.ones(2, 8).bool())
    expected = place(band, mapping.apply(x))
    torch.testing.assert_close(mapping.apply(place(band, x)), expected)
