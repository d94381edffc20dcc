"""Cost estimate of an extraction, from a pilot of a few hundred samples.

Lengths come from tokenising the pilot. Sizes come from extracting a few samples into a scratch
store and encoding them again in every other codec, so they include compression and scales. Both are
extrapolated by characters, which are known for the whole corpus.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvdistill.config.experiment import Experiment
from kvdistill.corpus.samples import Sample, Shard, cut_into_shards
from kvdistill.distill.align.band import AlignmentQuality, quality
from kvdistill.distill.align.character_iou import Spans, align_tokens
from kvdistill.distill.align.layers import LayerMap, layer_map
from kvdistill.distill.student.build import check_student, tokenizer_of
from kvdistill.errors import StudentError
from kvdistill.extract.encode import fit_bases
from kvdistill.extract.extract_shard import ExtractedShard, extract_samples, token_table
from kvdistill.extract.teacher import Teacher, load_teacher
from kvdistill.extract.tokenise import PromptTokenizer, TokenisedSample
from kvdistill.pipelines.extract_tasks import live_shards, texts_to_extract
from kvdistill.pipelines.store_options import (
    DISK_MARGIN,
    SINGLE,
    StoreOption,
    StoreOptions,
    codec_name,
    joint_options,
    kept_tokens,
    store_options,
    try_codecs,
)
from kvdistill.store.bucket import local_folder
from kvdistill.store.codecs import codec_of
from kvdistill.store.codecs.parts import part_name
from kvdistill.store.confidence import mean_likelihoods
from kvdistill.store.derived import load_transforms, published_bases
from kvdistill.store.format import group_prefix
from kvdistill.store.manifest import TeacherManifest
from kvdistill.store.reader import KVStore
from kvdistill.store.shard import EncodedShard
from kvdistill.store.writer import add_teacher, create, publish_shard
from kvdistill.types import SEGMENT_IDS, CodecSpec

BUDGETS: Final = (8, 16, 24, 32, 64, 128, 256)
"""Eviction budgets in tokens; 24 is KaVa's (arXiv 2510.02312)."""
PLAIN: Final = CodecSpec(key="bf16", value="bf16")
QUANTILES: Final = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class TeacherEstimate:
    """Estimate for one teacher over the whole corpus."""

    teacher: str
    tokens: int
    """Tokens of what it reads of the corpus."""
    tokens_per_second: float
    hours: float
    """With one process; divide by the number of processes."""
    codec: str
    gigabytes: dict[str, float]
    """On disk, by codec, named ``int8`` or ``key/value``."""
    kept: float
    """Share of keys and values that is stored: below 1 with selected heads or eviction."""
    lengths: dict[float, int]
    """Quantiles of tokens per sample."""
    rationale_lengths: dict[float, int]
    """Quantiles over samples that have a rationale; empty without any."""
    too_long: float
    """Share of samples longer than the teacher's context."""
    touched: dict[int, float]
    """Per eviction budget, the share of samples whose rationale (or text) is longer."""
    nats_per_character: dict[str, float]
    """Of the pilot, all of it and by task; empty without ``extraction.confidence``."""
    alignment: AlignmentQuality | None
    """With the student's tokenizer, where the config names one that can be loaded."""
    num_layers: int
    """Layers that the config stores."""
    mapped_depths: tuple[float, ...] | None
    """The depth that each student layer is compared with, a mixture of layers where it is not
    whole; None where the student cannot be built yet, or ``alignment.layers`` is ``cka``."""
    mapped_layers: tuple[int, ...]
    """Layers that training reads; empty where that is not known."""
    options: tuple[StoreOption, ...] = ()
    """Ways to store it, where they were asked for."""


@dataclass(frozen=True)
class ExtractionEstimate:
    """Estimate for an experiment."""

    samples: int
    characters: int
    shards: int
    teachers: tuple[TeacherEstimate, ...]
    free_gigabytes: float

    @property
    def needed_gigabytes(self) -> float:
        """Disk for all teachers at their configured codecs, with a margin."""
        return DISK_MARGIN * sum(plan.gigabytes[plan.codec] for plan in self.teachers)

    @property
    def fits(self) -> bool:
        """Whether the store fits on its disk."""
        return self.needed_gigabytes <= self.free_gigabytes

    def options(self) -> list[StoreOptions]:
        """Ways to store all teachers, the smallest error first."""
        return joint_options({plan.teacher: plan.options for plan in self.teachers})


def estimate_extraction(
    experiment: Experiment, num_samples: int = 256, num_sized: int = 12, *, options: bool = False
) -> ExtractionEstimate:
    """Tokenise ``num_samples`` with every teacher, and extract ``num_sized`` per codec.

    With ``options``, also measure what codecs make of attention on the latter.

    Raises:
        CorpusError, ConfigError: as ``prepare_store``.
        TeacherError: a teacher cannot be loaded or verified, or cannot read a sample.
    """
    shards = shards_to_extract(experiment, texts_to_extract(experiment))
    samples = [sample for shard in shards for sample in shard.samples]
    student = _student_layers(experiment)
    counts: Any = {"num_samples": num_samples, "num_sized": num_sized, "with_options": options}
    # One teacher in memory at a time.
    teachers = [
        _estimate_teacher(experiment, load_teacher(name, experiment), samples, student, **counts)
        for name in experiment.teachers
    ]
    return ExtractionEstimate(
        samples=len(samples),
        characters=_num_characters(samples),
        shards=len(shards),
        teachers=tuple(teachers),
        free_gigabytes=shutil.disk_usage(existing(local_folder(experiment.store))).free / 1e9,
    )


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def shards_to_extract(experiment: Experiment, samples: Sequence[Sample]) -> list[Shard]:
    """The shards that stage 1 reads of these texts."""
    shards = list(cut_into_shards(samples, experiment.corpus.shard_chars))
    if experiment.kv_source == "store":
        return shards
    first = live_shards(experiment, ((shard.shard_id, shard.samples) for shard in shards))
    return [shard for shard in shards if shard.shard_id in first]


def _estimate_teacher(
    experiment: Experiment,
    teacher: Teacher,
    samples: Sequence[Sample],
    student: tuple[PromptTokenizer, int] | None,
    *,
    num_samples: int,
    num_sized: int,
    with_options: bool,
) -> TeacherEstimate:
    """The estimate from a pilot of the samples that this teacher reads."""
    read = [sample for sample in samples if sample.is_of(teacher.manifest.parts)]
    pilot = spread(read, num_samples)
    encoded = teacher.tokenise(pilot)
    lengths = np.array([sample.max_tokens for sample in encoded])
    share = float(lengths.sum()) / max(_num_characters(pilot), 1)
    tokens = round(_num_characters(read) * share)
    limit = teacher.max_length or math.inf
    readable = [s for s, length in zip(pilot, lengths, strict=True) if 0 < length <= limit]
    per_batch = experiment.extraction.batch_tokens / max(float(lengths.mean()), 1.0)
    sized = spread(readable, max(num_sized, round(per_batch)))
    bytes_per_token, rate, nats = _sizes(experiment, teacher, sized)
    rationale = np.array([int((s.segment == SEGMENT_IDS["rationale"]).sum()) for s in encoded])
    budgeted = np.where(rationale > 0, rationale, lengths)
    mapped = None if student is None else _map_of(experiment, teacher, student[1])
    needed, options = () if mapped is None else mapped.needed, tuple[StoreOption, ...]()
    if with_options and sized:
        tried = spread(readable, num_sized)
        trials = try_codecs(teacher, tried, read, experiment.extraction.batch_tokens)
        made = store_options(
            experiment,
            teacher,
            trials,
            encoded,
            mapped=needed,
            sizes=bytes_per_token,
            tokens=tokens,
        )
        options = tuple(made)
    return TeacherEstimate(
        teacher=teacher.manifest.name,
        tokens=tokens,
        tokens_per_second=rate,
        hours=tokens / rate / 3600 if rate else 0.0,
        codec=codec_name(teacher.manifest.codec),
        gigabytes={name: size * tokens / 1e9 for name, size in bytes_per_token.items()},
        kept=_kept(teacher, encoded),
        lengths=_length_quantiles(lengths),
        rationale_lengths=_length_quantiles(rationale[rationale > 0]),
        too_long=float((lengths > limit).mean()),
        touched={budget: float((budgeted > budget).mean()) for budget in BUDGETS},
        nats_per_character=nats,
        alignment=None if student is None else _alignment(student[0].tokenise(pilot), encoded),
        num_layers=len(teacher.manifest.layers),
        mapped_depths=None if mapped is None else mapped.depths,
        mapped_layers=needed,
        options=options,
    )


def _map_of(experiment: Experiment, teacher: Teacher, num_layers: int) -> LayerMap | None:
    alignment, name = experiment.alignment, teacher.manifest.name
    if alignment.layers == "cka" or experiment.latent is not None:
        return None
    explicit = (alignment.explicit_layers or {}).get(name)
    return layer_map(alignment.layers, num_layers, teacher.manifest.layers, explicit=explicit)


def _num_characters(samples: Sequence[Sample]) -> int:
    return sum(len(sample.text) for sample in samples)


def _sizes(
    experiment: Experiment, teacher: Teacher, samples: Sequence[Sample]
) -> tuple[dict[str, float], float, dict[str, float]]:
    """Bytes on disk per token by codec; of the configured one tokens per second, and confidence.

    The teacher reads once, after a warm-up, in batches as large as those of the extraction. The
    other codecs encode what that has stored, or what a second pass has if it is too coarse.
    """
    manifest, batch_tokens = teacher.manifest, experiment.extraction.batch_tokens
    sizes, nats = {codec_name(manifest.codec): 0.0}, dict[str, float]()  # which comes first
    if not samples:
        return sizes, 0.0, nats
    with tempfile.TemporaryDirectory(prefix="kvdistill-plan-") as folder:
        shards = [Shard("00000", 0, tuple(samples))]
        store = create(Path(folder) / "own", shards)
        if manifest.codec.transforms:  # bytes of a token do not depend on the pilot
            fit = partial(fit_bases, teacher, samples, batch_tokens)
            checksum = published_bases(store.place, manifest.name, "plan", fit)
            manifest = manifest.model_copy(update={"transform": checksum})
            transforms = load_transforms(store.place, manifest)
            teacher = replace(teacher, manifest=manifest, transforms=transforms)
        extract_samples(teacher, samples[:1], batch_tokens=batch_tokens)
        found = extract_samples(teacher, samples, batch_tokens=batch_tokens)
        sizes[codec_name(manifest.codec)] = _published_bytes(store, manifest, found)
        source = found.shard
        if {manifest.codec.key, manifest.codec.value} & {"int4", "int4_v1", "klt"}:  # too coarse
            plain = manifest.model_copy(update={"codec": PLAIN, "transform": None})
            exact = replace(teacher, manifest=plain, transforms={})
            again = extract_samples(exact, samples, batch_tokens=batch_tokens)
            store, source = create(Path(folder) / "plain", shards), again.shard
            sizes[codec_name(PLAIN)] = _published_bytes(store, plain, again)
        for spec in (spec for spec in SINGLE if codec_name(spec) not in sizes):
            other = manifest.model_copy(update={"codec": spec, "transform": None})
            shard = replace(found, shard=_encoded_again(store, source, other))
            into = create(Path(folder) / codec_name(spec), shards)
            sizes[codec_name(spec)] = _published_bytes(into, other, shard)
    if (nll := found.shard.arrays.get("nll")) is not None:
        own_text = found.shard.texts is not None
        nats = mean_likelihoods([(samples, found.shard.tokens, nll)], own_text=own_text)
    per_token = {name: size / max(found.num_read, 1) for name, size in sizes.items()}
    return per_token, found.num_read / found.seconds, nats


def _published_bytes(store: KVStore, manifest: TeacherManifest, found: ExtractedShard) -> int:
    """Publish a shard in a scratch store; returns its bytes on disk."""
    add_teacher(store, manifest)
    publish_shard(store, manifest.name, "00000", found.shard, found.statistics)
    files = store.paths.shard(manifest.name, "00000").rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def _encoded_again(store: KVStore, shard: EncodedShard, manifest: TeacherManifest) -> EncodedShard:
    """A stored shard in the codec of a manifest that else is that of its teacher."""
    own = store.teacher(manifest.name)
    arrays = dict(shard.arrays)
    for group_idx, group in enumerate(manifest.groups):
        prefix = group_prefix(manifest, group_idx)
        for kind in manifest.kinds:
            for part in codec_of(own.codec, kind, store.transforms(own.name), prefix).parts(kind):
                del arrays[part_name(f"{prefix}{kind}", part.suffix)]
            codec = codec_of(manifest.codec, kind, {}, prefix)
            read = partial(store.read_sample, own.name, kind=kind, layers=group.layers)
            values = (torch.from_numpy(read(sample_id)) for sample_id in shard.tokens.sample_ids)
            encoded = [codec.encode(x_LHTD, kind) for x_LHTD in values]
            for part in codec.parts(kind):
                pieces = [parts[part.suffix].numpy() for parts in encoded]
                name = part_name(f"{prefix}{kind}", part.suffix)
                arrays[name] = np.concatenate(pieces, axis=2)
    return replace(shard, arrays=arrays)


def _student_layers(experiment: Experiment) -> tuple[PromptTokenizer, int] | None:
    """Its tokenizer, and its layers with keys; None where there is no such student yet."""
    try:
        tokenizer = tokenizer_of(experiment.student)
        layers = check_student(experiment.student, tokenizer).num_layers
        return PromptTokenizer(tokenizer), layers
    except StudentError:
        # The estimate may precede the training of the student's tokenizer.
        return None


def _alignment(
    student: Sequence[TokenisedSample], teacher: Sequence[TokenisedSample]
) -> AlignmentQuality:
    pooled = AlignmentQuality()
    for own, theirs in zip(student, teacher, strict=True):
        if own.num_tokens and theirs.num_tokens:
            rows, columns = _spans(own), _spans(theirs)
            pooled += quality(align_tokens(rows, columns), rows.real, columns.real)
    return pooled


def _spans(encoded: TokenisedSample) -> Spans:
    table = token_table([Sample("", ())], [encoded])
    columns = (table.char_start, table.char_end, table.segment)
    start, end, segment = (torch.from_numpy(c.astype(np.int64))[None] for c in columns)
    return Spans(start, end, segment, segment >= 0)


def _kept(teacher: Teacher, encoded: Sequence[TokenisedSample]) -> float:
    """Share of the pilot's keys and values, over the kept layers, that the config stores."""
    manifest = teacher.manifest
    heads = sum(layer.num_key_value_heads for layer in teacher.layers)
    stored_heads = sum(len(g.layers) * g.num_key_value_heads for g in manifest.groups)
    return kept_tokens(encoded, manifest.eviction) * stored_heads / max(heads, 1)


def _length_quantiles(lengths: NDArray[np.int64]) -> dict[float, int]:
    return {q: round(float(np.quantile(lengths, q))) for q in QUANTILES} if lengths.size else {}


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most ``count`` samples, evenly spaced: corpus files are often sorted."""
    step = max(1, math.ceil(len(samples) / max(count, 1)))
    return list(samples[::step])
