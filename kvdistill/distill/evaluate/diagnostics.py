"""Diagnostics of a trained distiller, for the report: layer maps, an alignment, errors by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import islice
from typing import Any, Final

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from kvdistill.distill.align.band import band_of
from kvdistill.distill.data.collate import Batch, tokenize
from kvdistill.distill.data.stream import KVStream
from kvdistill.distill.distiller import Distiller

NUM_BATCHES: Final = 4
"""Training batches that errors and weights are averaged over."""

MAX_EXAMPLE_TOKENS: Final = 32
"""Tokens of the example alignment, so that it can be drawn."""


@torch.inference_mode()
def diagnose(distiller: Distiller, stream: KVStream) -> dict[str, Any]:
    """JSON-ready diagnostics; empty without teachers.

    ``error_by_layer``       per kind and student layer, mean squared error against the target;
                             of a standardised one, 1.0 is the score of predicting the mean; null
                             where no teacher serves the layer
    ``weights``              fusion weights by layer and by task
    ``spectra``              singular values of the projectors
    ``teachers.layer_map``   student layer → real-valued teacher layer
    ``teachers.alignment``   student tokens × teacher tokens of the first text, as strings
    """
    if not distiller.teachers:
        return {}
    was_training = distiller.training
    distiller.eval()
    device = next(distiller.parameters()).device
    batches = [send_to_device(batch, device) for batch in islice(stream, NUM_BATCHES)]
    figures = {
        "error_by_layer": _errors_by_layer(distiller, batches),
        "weights": _mean_fusion_weights(distiller, batches, stream.collate.tasks),
        "spectra": _singular_values(distiller),
        "teachers": {
            space.name: {"layer_map": space.depths, "alignment": _example(stream, space.name)}
            for space in distiller.teachers
        },
    }
    distiller.train(was_training)
    return figures


def _errors_by_layer(distiller: Distiller, batches: list[Batch]) -> dict[str, list[float | None]]:
    num_layers = distiller.capture.geometry.num_layers
    kinds = distiller.losses.kinds
    totals = {kind: torch.zeros(2, num_layers) for kind in kinds}
    for batch in batches:
        view = distiller.run_student(batch)
        alpha = distiller.weigh(batch, view.hidden).alpha()
        targets = distiller.targets(batch["teachers"])
        for kind in kinds:
            sides = zip(
                distiller.predictions(view, kind),
                distiller.compared(kind, targets, alpha),
                strict=True,
            )
            for ours, (layers, weight_BLT, target) in sides:
                error_BLT = (ours.float() - target).square().mean(dim=(2, 4)) * weight_BLT
                found = torch.stack([error_BLT, weight_BLT]).sum(dim=(1, 3))
                totals[kind][:, layers] += found.cpu()
    return {
        kind: [error / weight if weight else None for error, weight in total.T.tolist()]
        for kind, total in totals.items()
    }


def _mean_fusion_weights(
    distiller: Distiller, batches: list[Batch], tasks: Mapping[str, int]
) -> dict[str, Any]:
    """Mean weights over what is served; 0 of all teachers where nothing is."""
    names = {number: name for name, number in tasks.items()}
    found: list[Tensor] = []  # teachers and, last, what is served: [N + 1, L] of every sample
    by_task: dict[str, list[Tensor]] = defaultdict(list)
    for batch in batches:
        alpha = distiller.weigh(batch, distiller.run_student(batch).hidden).alpha()
        served = (alpha.sum(0, keepdim=True) > 0).float()
        rows = torch.cat([alpha, served]).sum(-1).cpu().unbind(1)
        found += rows
        for row, task in zip(rows, batch["task"].tolist(), strict=True):
            by_task[names.get(task, "")].append(row.sum(1))

    def mean(rows: list[Tensor]) -> dict[str, Any]:
        *totals, served = torch.stack(rows).sum(0)
        spaces = zip(distiller.teachers, totals, strict=True)
        return {space.name: (x / served.clamp_min(1)).tolist() for space, x in spaces}

    return {"by_layer": mean(found), "by_task": {task: mean(by_task[task]) for task in by_task}}


def _singular_values(distiller: Distiller) -> dict[str, list[float]]:
    """Singular values of every projector's maps, the mean over layers, largest first."""
    found = {}
    for space in distiller.teachers:
        for kind in distiller.losses.kinds:
            head = distiller.head(space.name, kind)
            for maps in (head.regress, head.project):
                for name, weight in maps.named_parameters():
                    if weight.ndim == 3:
                        values = torch.linalg.svdvals(weight.detach().float().cpu()).mean(0)
                        label = name.rpartition(".")[2].partition("_")[0]
                        found[f"{space.name} {kind} {label}"] = values.tolist()
    return found


def _example(stream: KVStream, name: str) -> dict[str, Any]:
    """The alignment of the corpus's first text with one teacher, truncated."""
    item = stream.source.load(0).item(0)
    collate = stream.collate
    band = band_of(collate([item])["teachers"][name])
    (tokens,) = tokenize(collate.tokenizer, [item.sample], collate.max_length)
    shard, sample_idx = item.shards[name]
    span = shard.tokens.span(sample_idx)
    text = item.sample.text
    student = _strings(text, tokens.char_start, tokens.char_end)
    teacher = _strings(text, shard.tokens.char_start[span], shard.tokens.char_end[span])
    matrix = torch.zeros(len(student), len(teacher) + band.weight.shape[-1])
    columns = band.start[0, :, None] + torch.arange(band.weight.shape[-1])
    matrix.scatter_add_(1, columns, band.weight[0])
    return {
        "student_tokens": student[:MAX_EXAMPLE_TOKENS],
        "teacher_tokens": teacher[:MAX_EXAMPLE_TOKENS],
        "weights": matrix[:MAX_EXAMPLE_TOKENS, : min(len(teacher), MAX_EXAMPLE_TOKENS)].tolist(),
    }


def _strings(text: str, start: Any, end: Any) -> list[str]:
    return [text[a:b] for a, b in zip(start.tolist(), end.tolist(), strict=True)]
