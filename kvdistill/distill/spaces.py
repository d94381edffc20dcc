"""What training needs to know of a teacher, read from its store and from nowhere else."""

from __future__ import annotations

import torch

from kvdistill.config import AlignmentConfig
from kvdistill.distill.alignment import layer_map
from kvdistill.distill.distiller import TeacherSpace
from kvdistill.distill.projection import ChannelStatistics, HeadShape
from kvdistill.errors import StoreMismatch
from kvdistill.store.reader import KVStore
from kvdistill.types import KINDS


def teacher_space(
    store: KVStore, name: str, num_student_layers: int, alignment: AlignmentConfig
) -> TeacherSpace:
    """Layer map, shapes and statistics of one stored teacher.

    Raises:
        StoreMismatch: its stored layers differ in heads or dims, so no one projector fits all.
    """
    manifest = store.teacher(name)
    if len(manifest.groups) > 1:
        shapes = [
            f"layers {list(group.layers)}: {group.num_key_value_heads} heads of "
            f"{group.key_head_dim}"
            for group in manifest.groups
        ]
        raise StoreMismatch(
            f"teacher {name!r} stores layers of different geometry ({'; '.join(shapes)}); "
            "extract it with teachers.<name>.layers set to one of these groups"
        )
    (group,) = manifest.groups
    mapping = layer_map(alignment.layers, num_student_layers, group.layers)
    rows = [group.layers.index(layer) for layer in mapping.needed]
    stored = store.statistics(name)
    return TeacherSpace(
        name=name,
        layer_map=mapping,
        codec=manifest.codec,
        shapes={kind: HeadShape(group.num_key_value_heads, group.head_dim(kind)) for kind in KINDS},
        statistics={
            kind: ChannelStatistics(
                torch.from_numpy(stored[kind].mean[rows]),
                torch.from_numpy(stored[kind].variance[rows]),
            )
            for kind in KINDS
        },
    )
