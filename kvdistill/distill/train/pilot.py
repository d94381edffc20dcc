"""What is measured on a few batches before the first step: closed-form maps, and layers by CKA.

Both read the pilot's batches one after the other, on the student's device, and keep sums alone.
Moments of a layer are as large as the square of its width; layers are taken in chunks of at most
``MOMENT_BYTES``, with a pass over the pilot for each (``docs/projection.md`` states the memory).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, product
from statistics import mean
from typing import Any, Final, Literal, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from kvdistill.attention.geometry import HeadShape
from kvdistill.attention.kv_capture import KVCapture
from kvdistill.config.distill import ProjectionConfig
from kvdistill.config.experiment import Experiment
from kvdistill.distill.align.band import band_of
from kvdistill.distill.align.layers import LayerMap, MinibatchCKA, monotone_map
from kvdistill.distill.data.collate import Batch, Collate, Item
from kvdistill.distill.data.stream import Source
from kvdistill.distill.distiller import Distiller
from kvdistill.distill.project.closed_form import Map, PilotMoments, fit_layer
from kvdistill.distill.targets import TeacherHead, TeacherSpace
from kvdistill.types import KINDS, PLURALS, Kind

MOMENT_BYTES: Final = 2 * 2**30
"""Moments that are held at once; a layer whose moments are larger has a pass of its own."""

TEXTS_PER_BATCH: Final = 8
"""Texts that one of ``projection.pilot_batches`` stands for."""

HELD_OUT_EVERY: Final = 4
"""Every fourth text of a pilot is held out from the fit."""

Explained = dict[str, dict[Kind, list[float | None]]]
"""By teacher and kind, per student layer: the variance that the fitted map explains on texts it was
not fitted to; None where no text was held out."""


@dataclass(frozen=True, eq=False)
class Pilot:
    """The first ``num_texts`` of a corpus in batches, read again by every iteration.

    But for rounding, moments do not depend on how the texts are cut into batches.
    """

    source: Source
    collate: Collate
    num_texts: int
    batch_size: int

    def __iter__(self) -> Iterator[Batch]:
        items = islice(self._items(), self.num_texts)
        while batch := list(islice(items, self.batch_size)):
            yield self.collate(batch)

    def _items(self) -> Iterator[Item]:
        for shard_idx in range(len(self.source.sizes)):
            shard = self.source.load(shard_idx)
            yield from (shard.item(i) for i in range(len(shard.samples)))


def pilot_of(source: Source, collate: Collate, experiment: Experiment) -> Pilot:
    """The pilot of an experiment, in batches that fit where training's do."""
    num_texts = TEXTS_PER_BATCH * experiment.projection.pilot_batches
    batch_size = min(experiment.training.batch_size, TEXTS_PER_BATCH)
    return Pilot(source, collate, num_texts, batch_size)


@contextmanager
def measuring(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module on the device, without dropout and gradients; then back as it was."""
    home, training = next(module.parameters()).device, module.training
    module.to(device).eval()
    with torch.no_grad():
        yield
    module.to(home).train(training)


class _Fit(NamedTuple):
    """One layer's map to fit: ``regress`` from the student's KV to the teacher's, or back."""

    teacher_idx: int | None
    """None: the student's own map into a shared space."""
    kind: Kind
    group_idx: int
    row: int
    layer: int
    """Of the student."""
    maps: Any
    regress: bool

    @property
    def widths(self) -> tuple[int, int]:
        """Channels of source and target; the student's own map has none."""
        target = 0 if self.teacher_idx is None else self.maps.target.width
        return self.maps.source.width, target


def fit_projections(
    distiller: Distiller, pilot: Iterable[Batch], init: Literal["pca", "ridge"]
) -> Explained:
    """Fit every teacher's maps in closed form, in place, alike on all ranks.

    ``ridge`` fits the heads of ``student_to_teacher`` and the statistics that standardise their
    input, and projectors from teacher to student or, after the student's own map into it, to the
    shared space; ``pca`` fits projectors from teacher to student alone.

    Raises:
        ConfigError: no token of the pilot is covered by a teacher.
    """
    layers, names = distiller.capture.geometry.num_layers, [t.name for t in distiller.teachers]
    kinds = distiller.losses.kinds
    explained: Explained = {name: {kind: [None] * layers for kind in kinds} for name in names}
    standardised: set[tuple[Kind, int]] = set()
    for chunk in (*_chunks(_own_fits(distiller)), *_chunks(_fits(distiller, init))):
        for fit, moments in zip(chunk, _measure(distiller, pilot, chunk), strict=True):
            if fit.teacher_idx is None:
                fit_layer(fit.maps, fit.row, moments, "pca")
                continue
            if fit.regress:
                standardise = distiller.standardise_student[fit.kind]
                if (fit.kind, fit.layer) not in standardised:
                    fitted = moments.fitted
                    variance = fitted.covariances()[0].diagonal()
                    standardise.set_layer(fit.layer, fitted.means()[0], variance)
                    standardised.add((fit.kind, fit.layer))
                statistics = standardise.mean_LHD, standardise.scale_LHD
                moments.standardise(*(x[fit.layer].flatten() for x in statistics))
            share = fit_layer(fit.maps, fit.row, moments, init)
            if fit.regress or not distiller.regresses:
                explained[names[fit.teacher_idx]][fit.kind][fit.layer] = share
    if torch.distributed.is_initialized():
        for module in (distiller.heads, distiller.standardise_student, distiller.space):
            for tensor in module.state_dict().values():
                torch.distributed.broadcast(tensor, 0)
    return explained


def _fits(distiller: Distiller, init: Literal["pca", "ridge"]) -> Iterator[_Fit]:
    for (idx, teacher), kind in product(enumerate(distiller.teachers), distiller.losses.kinds):
        head = distiller.head(teacher.name, kind)
        for group_idx, group in enumerate(head.groups):
            for row, layer in enumerate(group.student_layers):
                place = idx, kind, group_idx, row, layer
                if init == "ridge" and len(head.regress):
                    yield _Fit(*place, head.regress[group_idx], regress=True)
                maps = head.project[group_idx] if len(head.project) else None
                if isinstance(maps, Map):
                    yield _Fit(*place, maps, regress=False)


def _own_fits(distiller: Distiller) -> Iterator[_Fit]:
    """The student's maps into a shared space, on which those of teachers depend."""
    for kind, adapter in distiller.space.items():
        for layer in range(adapter.num_layers):
            yield _Fit(None, kind, 0, layer, layer, adapter, regress=False)


def _chunks(fits: Iterable[_Fit]) -> Iterator[list[_Fit]]:
    chunk: list[_Fit] = []
    size = 0
    for fit in fits:
        own = PilotMoments.size_bytes(*fit.widths)
        if chunk and size + own > MOMENT_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(fit)
        size += own
    if chunk:
        yield chunk


def _measure(distiller: Distiller, pilot: Iterable[Batch], fits: list[_Fit]) -> list[PilotMoments]:
    """Moments of every fit, in one pass over the pilot."""
    device = next(distiller.parameters()).device
    moments = [PilotMoments(*fit.widths, device) for fit in fits]
    num_texts = 0
    for batch in pilot:
        moved = send_to_device(batch, device)
        teachers = moved["teachers"]
        output = distiller.run_student(moved)
        texts_B = num_texts + torch.arange(len(moved["input_ids"]), device=device)
        held_out_B = texts_B % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        num_texts += len(texts_B)
        stacked = distiller.targets(teachers) if distiller.needs_all_layers else {}
        targets = distiller.target_rows(teachers, stacked)
        kinds = distiller.losses.kinds
        compared = {k: distiller.in_target_space(output.kind(k), k) for k in kinds}
        for fit, found in zip(fits, moments, strict=True):
            own_BHTD = output.kind(fit.kind)[:, fit.layer]
            if fit.teacher_idx is None:
                mask_BT = torch.stack([teachers[t.name]["covered"] for t in distiller.teachers])
                mask_BT, pair = mask_BT.any(0), (own_BHTD, own_BHTD[..., :0])
            else:
                mask_BT = teachers[distiller.teachers[fit.teacher_idx].name]["covered"]
                target = targets[fit.kind][fit.teacher_idx][fit.group_idx](fit.row)
                projected = target, compared[fit.kind][:, fit.layer]
                pair = (own_BHTD, target) if fit.regress else projected
            x_NI, y_NO = (_masked_tokens(kv_BHTD, mask_BT) for kv_BHTD in pair)
            found.add(x_NI, y_NO, held_out_B[:, None].expand_as(mask_BT)[mask_BT])
    return moments


def _masked_tokens(kv_BHTD: Tensor, mask_BT: Tensor) -> Tensor:
    """The masked-in tokens of one layer, ``[N, H·D]``."""
    return kv_BHTD.transpose(1, 2).flatten(2)[mask_BT]


def explained_lines(explained: Explained) -> list[str]:
    """One line per teacher and kind that was fitted by ridge, for the log."""
    lines = []
    rows = ((name, *row) for name, kinds in explained.items() for row in kinds.items())
    for teacher, kind, shares in rows:
        if found := [share for share in shares if share is not None]:
            layers = " ".join(f"{share:.2f}" for share in found)
            lines.append(
                f"{teacher}: variance of {PLURALS[kind]} explained before step 1, on texts held "
                f"out from the fit: {mean(found):.2f} (by layer {layers})"
            )
    return lines


def cka_map(student: Any, teacher: TeacherSpace, pilot: Iterable[Batch]) -> LayerMap:
    """Monotone layer map of largest total similarity, by linear CKA of keys and values.

    ``teacher`` maps every stored layer to itself; the pilot's batches have it.
    """
    capture, device = KVCapture(student), next(student.parameters()).device
    unused = ProjectionConfig(mode="joint")
    heads = {
        kind: TeacherHead(teacher, kind, HeadShape(1, 1), unused, projects=False).to(device)
        for kind in KINDS
    }
    similarity = {kind: MinibatchCKA() for kind in KINDS}
    for batch in pilot:
        moved = send_to_device(batch, device)
        found = moved["teachers"][teacher.name]
        mask_BT, band = found["covered"], band_of(found)
        with capture() as captured:
            student(moved["input_ids"], attention_mask=moved["attention_mask"], use_cache=False)
        for kind in KINDS:
            similarity[kind].add(
                [_masked_tokens(getattr(layer, kind), mask_BT) for layer in captured],
                (
                    _masked_tokens(group(row), mask_BT)
                    for group in heads[kind].layers(found[kind], band)
                    for row in range(len(group))
                ),
            )
    order = [layer for group in teacher.groups for layer in group.layer_map.lower]
    columns = torch.tensor([order.index(layer) for layer in sorted(order)])
    total = sum(similarity[kind].value() for kind in KINDS)
    return monotone_map(torch.as_tensor(total)[:, columns], sorted(order))
