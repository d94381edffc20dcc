"""A teacher of two geometries serves every student layer once, and never mixes them."""

from hypothesis import given
from hypothesis import strategies as st

from kvdistill.distill.align.layers import by_group, layer_map
from kvdistill.types import LayerGroup


def groups(*layers):
    return [LayerGroup(tuple(chosen), 2, 64, 64) for chosen in layers]


def test_one_group_is_the_map_itself():
    mapping = layer_map("uniform", 4, range(10))
    (only,) = by_group(mapping, groups(range(10)))
    assert only.mapping == mapping
    assert only.student_layers == (0, 1, 2, 3)


def test_a_layer_between_groups_takes_the_nearer():
    mapping = layer_map("explicit", 4, range(4), explicit=[0.5, 1.25, 1.75, 3])
    first, second = by_group(mapping, groups([0, 1], [2, 3]))
    assert (first.student_layers, first.mapping.lower) == ((0, 1), (0, 1))
    assert first.mapping.fraction == (0.5, 0.0)
    assert (second.student_layers, second.mapping.lower) == ((2, 3), (2, 3))


@given(st.integers(1, 12), st.lists(st.integers(0, 2), min_size=1, max_size=16))
def test_every_student_layer_is_served_once(num_student, owners):
    members = [[i for i, owner in enumerate(owners) if owner == g] for g in range(3)]
    split = by_group(layer_map("ratio", num_student, range(len(owners))), groups(*members))
    served = [layer for part in split for layer in part.student_layers]
    assert sorted(served) == list(range(num_student))
    for part in split:
        assert set(part.mapping.needed) <= set(members[part.group_idx])
