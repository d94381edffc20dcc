"""What a finished run can tell about itself: layer maps, one alignment, KV error by layer."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from kvdistill.distill.data.collate import Batch
from kvdistill.distill.data.stream import KVStream
from kvdistill.distill.data.tokens import tokenize
from kvdistill.distill.distiller import Distiller, band_of
from kvdistill.types import KINDS, Kind

BATCHES = 4
"""Batches of training text that the errors are taken over."""
MATRIX_TOKENS = 32
"""How much of the example alignment is kept: enough to see, little enough to draw."""


@torch.inference_mode()
def diagnose(distiller: Distiller, stream: KVStream) -> dict[str, Any]:
    """JSON-ready figures of a trained distiller, for the report; empty without teachers.

    ``error_by_layer``       per kind and student layer, mean squared error against the
                             standardised target; 1.0 is what predicting the mean would score
    ``teachers.layer_map``   student layer → real-valued teacher layer
    ``teachers.alignment``   student tokens × teacher tokens of the first text, as strings
    """
    if not distiller.teacher_names:
        return {}
    was_training = distiller.training
    distiller.eval()
    device = next(distiller.parameters()).device
    totals = {kind: torch.zeros(distiller.capture.geometry.num_layers) for kind in KINDS}
    num_tokens = 0
    for batch in islice(stream, BATCHES):
        num_tokens += _add_errors(distiller, send_to_device(batch, device), totals)
    distiller.train(was_training)
    return {
        "error_by_layer": {kind: (totals[kind] / max(num_tokens, 1)).tolist() for kind in KINDS},
        "teachers": {
            name: {"layer_map": distiller.depths(name), "alignment": _example(stream, name)}
            for name in distiller.teacher_names
        },
    }


def _add_errors(distiller: Distiller, batch: Batch, totals: dict[Kind, Tensor]) -> int:
    """Add squared errors summed over tokens to ``totals [L]``; returns the tokens counted."""
    _, student = distiller.student_kv(batch)
    alpha, covered_BT = distiller.weights(batch["teachers"])
    for kind in KINDS:
        for weight_BT, ours, target in distiller.pairs(
            student[kind], kind, batch["teachers"], alpha
        ):
            error_BLT = (ours.float() - target).square().mean(dim=(2, 4))
            totals[kind] += (error_BLT * (weight_BT * covered_BT)[:, None]).sum(dim=(0, 2)).cpu()
    return int(covered_BT.sum())


def _example(stream: KVStream, name: str) -> dict[str, Any]:
    """The alignment of the corpus's first text, cut to its first tokens."""
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
        "student_tokens": student[:MATRIX_TOKENS],
        "teacher_tokens": teacher[:MATRIX_TOKENS],
        "weights": matrix[:MATRIX_TOKENS, : min(len(teacher), MATRIX_TOKENS)].tolist(),
    }


def _strings(text: str, start: Any, end: Any) -> list[str]:
    return [text[a:b] for a, b in zip(start.tolist(), end.tolist(), strict=True)]
