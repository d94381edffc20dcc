"""What is measured on a few batches before training: closed-form projectors, and layers by CKA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from kvdistill.attention.geometry import HeadShape
from kvdistill.attention.hooks import KVCapture
from kvdistill.config.distill import FusionConfig, ProjectionConfig
from kvdistill.distill.align.layers import LayerMap, linear_cka, monotone_map
from kvdistill.distill.data.collate import Batch, Collate
from kvdistill.distill.data.source import Source, StoreSource
from kvdistill.distill.distiller import Distiller, band_of
from kvdistill.distill.project.closed_form import PilotMoments, initialise
from kvdistill.distill.targets import TeacherHead, TeacherSpace, teacher_space
from kvdistill.store.reader import KVStore
from kvdistill.types import KINDS, Kind


def pilot(source: Source, collate: Collate, batch_size: int, batches: int) -> Iterator[Batch]:
    """The corpus's first batches, in order."""

    def all_batches() -> Iterator[Batch]:
        for shard_idx in range(len(source.sizes)):
            shard = source.load(shard_idx)
            items = [shard.item(i) for i in range(len(shard.samples))]
            for start in range(0, len(items), batch_size):
                yield collate(items[start : start + batch_size])

    return islice(all_batches(), batches)


@torch.no_grad()
def start_projectors(distiller: Distiller, batches: Iterable[Batch], init: Any) -> None:
    """Set every teacher-to-student map from pilot moments (``pca`` or ``ridge``).

    Raises:
        ConfigError: no token of the pilot is covered by a teacher.
    """
    student = distiller.capture.geometry.heads
    heads = [distiller.head(t.name, kind) for t in distiller.teachers for kind in KINDS]
    moments = {
        (head, i): PilotMoments(
            len(group.student_layers), group.shapes[head.kind].width, student.width
        )
        for head in heads
        for i, group in enumerate(head.groups)
    }
    device = next(distiller.parameters()).device
    for batch in batches:
        moved = send_to_device(batch, device)
        view = distiller.view(moved)
        targets = distiller.targets(moved["teachers"])
        for t, teacher in enumerate(distiller.teachers):
            mask = moved["teachers"][teacher.name]["covered"]
            for kind in KINDS:
                head = distiller.head(teacher.name, kind)
                for i, target in enumerate(targets[kind][t]):
                    moments[head, i].add(target, head.of_group(view.kind(kind), i), mask)
    for (head, i), found in moments.items():
        projection: Any = head.project[i]
        initialise(projection, found, init)


@torch.no_grad()
def cka_map(student: Any, store: KVStore, name: str, collate: Collate, batches: int) -> LayerMap:
    """Teacher layers for the student's by linear CKA of keys and values, monotone.

    Args:
        student: on any device.
        store: holds the teacher.
        name: of the teacher.
        collate: the run's, of which the teachers are replaced.
        batches: how many batches of 8 samples to measure on.
    """
    layers = store.teacher(name).layers
    every = LayerMap(layers, layers, (0.0,) * len(layers))
    space = teacher_space(store, name, every, FusionConfig())
    alone = replace(collate, teachers=[space])
    source = StoreSource(store, {name: layers})
    capture = KVCapture(student)
    device = next(student.parameters()).device
    heads = {kind: _head(space, kind) for kind in KINDS}
    ours: dict[Kind, list[Tensor]] = {kind: [] for kind in KINDS}
    theirs: dict[Kind, list[list[Tensor]]] = {kind: [] for kind in KINDS}
    for batch in pilot(source, alone, 8, batches):
        moved = send_to_device(batch, device)
        mask_BT = moved["teachers"][name]["covered"]
        with capture() as captured:
            student(moved["input_ids"], attention_mask=moved["attention_mask"], use_cache=False)
        for kind in KINDS:
            layers_kv = [getattr(layer, kind) for layer in captured]
            ours[kind].append(_covered_tokens(torch.stack(layers_kv, 1), mask_BT))
            parts, band = moved["teachers"][name][kind], band_of(moved["teachers"][name])
            found = heads[kind].to(device).targets(parts, band)
            theirs[kind].append([_covered_tokens(x, mask_BT) for x in found])
    order = [layer for group in space.groups for layer in group.layer_map.lower]
    similarity = sum(_similarity(ours[kind], theirs[kind]) for kind in KINDS)
    columns = torch.tensor([order.index(layer) for layer in layers])
    return monotone_map(torch.as_tensor(similarity).cpu()[:, columns], layers)


def _head(space: TeacherSpace, kind: Kind) -> TeacherHead:
    unused = ProjectionConfig(mode="joint")
    return TeacherHead(space, kind, HeadShape(1, 1), unused, projects=False)


def _covered_tokens(x_BLHTD: Tensor, mask_BT: Tensor) -> Tensor:
    """``[L, N, H·D]`` of the tokens that count."""
    return x_BLHTD.permute(0, 3, 1, 2, 4).flatten(3)[mask_BT].transpose(0, 1)


def _similarity(ours: list[Tensor], theirs: list[list[Tensor]]) -> Tensor:
    """``[L_s, L_t]``; teacher layers group by group."""
    student = torch.cat(ours, dim=1)
    groups = [torch.cat(parts, dim=1) for parts in zip(*theirs, strict=True)]
    return torch.cat([linear_cka(student, group) for group in groups], dim=1)
