"""Teachers whose layers differ in heads or dims.

Such a teacher is stored in groups of equal geometry. Layers of different groups cannot be mixed,
so a student layer that would lie between two of them takes the nearer one; and every group then
acts as a teacher of its own for the student layers that it serves. Together the groups serve
every student layer exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvdistill.distill.alignment.layers import LayerMap
from kvdistill.types import LayerGroup


@dataclass(frozen=True)
class GroupMap:
    """Which student layers one group of teacher layers serves, and how."""

    group_idx: int
    student_layers: tuple[int, ...]
    mapping: LayerMap
    """One entry per ``student_layers``; ``needed`` lies within the group."""


def by_group(mapping: LayerMap, groups: Sequence[LayerGroup]) -> tuple[GroupMap, ...]:
    """Split a layer map by groups; groups that serve no student layer are left out.

    With one group the result is that group with the whole map, unchanged.
    """
    group_of = {layer: idx for idx, group in enumerate(groups) for layer in group.layers}
    entries: dict[int, list[tuple[int, int, int, float]]] = {}
    rows = zip(mapping.lower, mapping.upper, mapping.fraction, strict=True)
    for student_layer, (lower, upper, fraction) in enumerate(rows):
        low, up, part = lower, upper, fraction
        if part and group_of[low] != group_of[up]:
            low, up, part = (low, low, 0.0) if part < 0.5 else (up, up, 0.0)
        entries.setdefault(group_of[low], []).append((student_layer, low, up, part))
    out = []
    for group_idx, found in sorted(entries.items()):
        students, lowers, uppers, fractions = zip(*found, strict=True)
        out.append(GroupMap(group_idx, students, LayerMap(lowers, uppers, fractions)))
    return tuple(out)
