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
from kvdistill.types import KINDS

NUM_BATCHES: Final = 4
"""Training batches that errors and weights are averaged over."""

MAX_EXAMPLE_TOKENS: Final = 32
"""Tokens of the example alignment, so that it can be drawn."""


@torch.inference_mode()
def diagnose(distiller: Distiller, stream: KVStream) -> dict[str, Any]:
    """JSON-ready diagnostics; empty without teachers.

    ``error_by_layer``       per kind and student layer, mean squared error against the target;
                             of a standardised one, 1.0 is the score of predicting the mean
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


def _errors_by_layer(distiller: Distiller, batches: list[Batch]) -> dict[str, list[float]]:
    num_layers = distiller.capture.geometry.num_layers
    totals = {kind: torch.zeros(num_layers) for kind in KINDS}
    num_tokens = 0
    for batch in batches:
        view = distiller.run_student(batch)
        alpha, covered_NBT = distiller.weigh(batch, view.hidden)
        covered_BT = covered_NBT.any(0)
        targets = distiller.targets(batch["teachers"])
        num_tokens += int(covered_BT.sum())
        for kind in KINDS:
            for layers, weight_BLT, ours, target in distiller.comparisons(
                view, kind, targets, alpha
            ):
                error_BLT = (ours.float() - target).square().mean(dim=(2, 4)) * weight_BLT
                totals[kind][layers] += (error_BLT * covered_BT[:, None]).sum(dim=(0, 2)).cpu()
    return {kind: (totals[kind] / max(num_tokens, 1)).tolist() for kind in KINDS}


def _mean_fusion_weights(
    distiller: Distiller, batches: list[Batch], tasks: Mapping[str, int]
) -> dict[str, Any]:
    num_layers = distiller.capture.geometry.num_layers
    names = {number: name for name, number in tasks.items()}
    by_layer: list[Tensor] = []
    by_task: dict[str, list[Tensor]] = defaultdict(list)
    for batch in batches:
        alpha, _ = distiller.weigh(batch, distiller.run_student(batch).hidden)
        alpha = alpha.expand(-1, -1, num_layers, -1).cpu()
        tokens_BL = (alpha.sum(0) > 0).sum(-1).clamp_min(1)
        sample_NBL = alpha.sum(-1) / tokens_BL
        by_layer.append(sample_NBL.mean(1))
        for row, task in enumerate(batch["task"].tolist()):
            by_task[names.get(task, "")].append(sample_NBL[:, row].mean(-1))
    teachers = [space.name for space in distiller.teachers]
    layers_NL = torch.stack(by_layer).mean(0)
    return {
        "by_layer": dict(zip(teachers, layers_NL.tolist(), strict=True)),
        "by_task": {
            task: dict(zip(teachers, torch.stack(rows).mean(0).tolist(), strict=True))
            for task, rows in by_task.items()
        },
    }


def _singular_values(distiller: Distiller) -> dict[str, list[float]]:
    """Singular values of every projector's maps, the mean over layers, largest first."""
    found = {}
    for space in distiller.teachers:
        for kind in KINDS:
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
