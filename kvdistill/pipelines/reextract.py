"""Verification of a store against its teachers: read some samples again and compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvdistill.config.experiment import Experiment
from kvdistill.corpus.samples import Sample
from kvdistill.errors import ShardNotFound, StoreMismatch
from kvdistill.extract.extract_shard import extract_samples
from kvdistill.pipelines.extract import open_teacher
from kvdistill.store.codecs import codec_of
from kvdistill.store.codecs.parts import parts_of
from kvdistill.store.format import group_prefix
from kvdistill.store.manifest import TeacherManifest
from kvdistill.store.reader import KVStore
from kvdistill.store.shard import EncodedShard
from kvdistill.types import Kind

TOLERANCE: Final = {"float32": 0.01, "float16": 0.03, "bfloat16": 0.05}
"""Largest relative error by the teacher's dtype: another batch size rounds differently, and may
change a value's code."""
MOVED: Final = 0.05
"""Largest share of slots or top tokens that may be others: rounding decides between equal ranks."""


@dataclass(frozen=True)
class Reextraction:
    """Stored against re-extracted keys, values and predictions, over some samples of a teacher."""

    teacher: str
    samples: int
    tokens: int
    key_error: float
    """Relative error (Frobenius) of decoded keys, the worst sample."""
    value_error: float
    tolerance: float
    moved: float = 0.0
    """Share of an evicted teacher's slots that now hold another token, or of the most likely tokens
    that now are others, the worst sample. The errors of keys and values exclude such slots."""
    prediction_error: float | None = None
    """Relative error of ``nll``, ``entropy`` and the probabilities of the most likely tokens and of
    the rest, the worst sample and array; None where none is stored."""
    hidden_error: float | None = None
    """As ``key_error``, of hidden states."""

    @property
    def agrees(self) -> bool:
        """Whether the errors are within ``tolerance``, and at most ``MOVED`` are others."""
        others = (self.prediction_error or 0.0, self.hidden_error or 0.0)
        worst = max(self.key_error, self.value_error, *others)
        return worst <= self.tolerance and self.moved <= MOVED


def reextract(store: KVStore, experiment: Experiment, name: str, count: int) -> Reextraction:
    """Read ``count`` samples, spread over the committed shards, with the teacher again.

    Raises:
        ShardNotFound: nothing is committed.
        TeacherError: the teacher cannot be loaded or verified.
        StoreMismatch: its fingerprints differ from the stored ones, or it tokenises a sample
            differently.
    """
    chosen = _spread_samples(store, name, count)
    teacher = open_teacher(store, experiment, name)
    errors: dict[Kind, float] = dict.fromkeys(teacher.manifest.kinds, 0.0)
    moved, num_tokens, predicted = 0.0, 0, list[float]()
    for shard_id, sample_idx, sample in chosen:
        budget = experiment.extraction.batch_tokens
        fresh = extract_samples(teacher, [sample], batch_tokens=budget).shard
        table = store.token_table(name, shard_id)
        stored_ids = table.token_ids[table.span(sample_idx)]
        if not np.array_equal(stored_ids, fresh.tokens.token_ids):
            raise StoreMismatch(
                f"{store.where}: teacher {name!r} tokenises sample {sample.sample_id!r} "
                f"differently ({fresh.tokens.num_tokens} tokens, stored {stored_ids.size}); its "
                "tokenizer or template changed"
            )
        num_tokens += stored_ids.size
        same = _same_slots(store, teacher.manifest, shard_id, sample_idx, fresh)
        layers = [layer_HT for group in same for layer_HT in group if layer_HT.size]
        others, found = _other_predictions(store, name, shard_id, table.span(sample_idx), fresh)
        moved = max([moved, others, *(1 - float(layer_HT.mean()) for layer_HT in layers)])
        predicted += found
        for kind in teacher.manifest.kinds:
            error = _relative_error(store, teacher.manifest, sample, kind, fresh=fresh, same=same)
            errors[kind] = max(errors[kind], error)
    tolerance = TOLERANCE[teacher.manifest.dtype]
    worst = (errors["key"], errors["value"], tolerance, moved, max(predicted, default=None))
    return Reextraction(name, len(chosen), num_tokens, *worst, errors.get("hidden"))


def _spread_samples(store: KVStore, name: str, count: int) -> list[tuple[str, int, Sample]]:
    """``count`` samples, evenly spread over the committed shards and inside them."""
    committed = store.committed(name)
    shard_ids = [shard_id for shard_id in store.shard_ids if shard_id in committed]
    if not shard_ids:
        raise ShardNotFound(f"{store.where}: teacher {name!r} has no shard yet")
    every = [
        (shard_id, i) for shard_id in shard_ids for i in range(store.plan(shard_id).num_samples)
    ]
    picked = [every[i * len(every) // count] for i in range(min(count, len(every)))]
    chosen = []
    for shard_id, sample_idx in picked:
        own = store.read_shard(name, shard_id, kinds=()).texts
        texts = store.samples(shard_id) if own is None else own
        chosen.append((shard_id, sample_idx, texts[sample_idx]))
    return chosen


def _same_slots(
    store: KVStore, manifest: TeacherManifest, shard_id: str, sample_idx: int, fresh: EncodedShard
) -> list[NDArray[np.bool]]:
    """Per group of an evicted teacher, ``[L, H, T]``: slots that hold the stored token."""
    if manifest.eviction is None:
        return []
    shard = store.read_shard(manifest.name, shard_id, kinds=())
    span = shard.tokens.span(sample_idx)
    names = [f"{group_prefix(manifest, i)}kept" for i in range(len(manifest.groups))]
    return [shard.arrays[name][:, :, span] == fresh.arrays[name] for name in names]


def _other_predictions(
    store: KVStore, name: str, shard_id: str, span: slice, fresh: EncodedShard
) -> tuple[float, list[float]]:
    """The share of top tokens that are others, and the ``prediction_error`` of every array."""
    others, errors = 0.0, []
    for array in ("top_ids", "nll", "entropy", "top_logprobs", "rest_logprob"):
        new = fresh.arrays.get(array, np.empty(0))[1:]  # nothing predicts a first token
        if not new.size:
            continue
        old = store.token_array(name, shard_id, array)[span][1:]
        if array == "top_ids":
            others = 1 - float((new[:, :, None] == old[:, None]).any(2).mean())
            continue
        new, old = (x.astype(np.float64) for x in (new, old))
        if "logprob" in array:
            new, old = np.exp(new), np.exp(old)
        size = float(np.linalg.norm(new))
        errors.append(float(np.linalg.norm(new - old)) / size if size else 0.0)
    return others, errors


def _relative_error(
    store: KVStore,
    manifest: TeacherManifest,
    sample: Sample,
    kind: Kind,
    *,
    fresh: EncodedShard,
    same: Sequence[NDArray[np.bool]],
) -> float:
    """Frobenius norm of the difference over that of the fresh values, in the ``same`` slots."""
    difference, size = 0.0, 0.0
    for i, group in enumerate(manifest.groups):
        prefix = group_prefix(manifest, i)
        parts = parts_of(fresh.arrays, f"{prefix}{kind}")
        slots = same[i] if same else ...
        codec = codec_of(manifest.codec, kind, store.transforms(manifest.name), prefix)
        fresh_LHTD = codec.decode(parts, kind)
        stored_LHTD = store.read_sample(manifest.name, sample.sample_id, kind, group.layers)
        apart = (stored_LHTD - fresh_LHTD)[slots]
        difference += float(np.square(apart, dtype=np.float64).sum())
        size += float(np.square(fresh_LHTD[slots], dtype=np.float64).sum())
    return (difference / size) ** 0.5 if size else 0.0
