"""Small teachers and shards without any model: random keys and values, real encoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvdistill.corpus.samples import Sample, Shard, cut_into_shards
from kvdistill.store.channel_statistics import ChannelStatistics
from kvdistill.store.codecs import CODECS, codec_of
from kvdistill.store.codecs.klt import Basis, fit_basis, layer_blocks
from kvdistill.store.codecs.parts import part_name
from kvdistill.store.derived import blocks_of, published_bases, with_bases
from kvdistill.store.format import UNPREDICTED, Counts, group_prefix, shard_arrays
from kvdistill.store.manifest import TeacherManifest
from kvdistill.store.reader import KVStore
from kvdistill.store.shard import EncodedShard, TokenTable
from kvdistill.store.writer import add_teacher, create, publish_shard
from kvdistill.types import KINDS, LayerGroup

ALONE = sorted(set(CODECS) - {"klt"})
"""Codecs that are not fitted to a teacher."""


@dataclass(frozen=True)
class Made:
    """A shard as it went in, with the values before encoding."""

    shard: EncodedShard
    statistics: dict[str, ChannelStatistics]
    values: dict[str, list[torch.Tensor]]
    """Per "key", "g0/value" … one ``[L, H, T, D]`` per sample."""


def make_teacher(**changes: Any) -> TeacherManifest:
    body: dict[str, Any] = {
        "name": "tiny",
        "model": "models/tiny",
        "revision": None,
        "model_type": "llama",
        "kind": "decoder",
        "weights_fingerprint": "w" * 64,
        "tokenizer_fingerprint": "t" * 64,
        "template": None,
        "extraction_fingerprint": "e" * 64,
        "versions": {"torch": "2"},
        "dtype": "float32",
        "attn_implementation": "eager",
        "backend": "zarr",
        "codec": {"key": "int8", "value": "int8"},
        "groups": (LayerGroup((0, 1, 3), 2, 8, 4),),
        "position_encoding": "none",
        "hidden_size": 6,
        "adapter": "test",
        "adapter_error": 0.0,
    }
    return TeacherManifest.model_validate({**body, **changes})


def statistics_of(samples: Sequence[Any]) -> ChannelStatistics:
    """Statistics of all tokens of samples ``[L, H, T, D]`` at once, without merging."""
    x = np.concatenate([np.asarray(sample, np.float64) for sample in samples], axis=2)
    mean = x.sum(axis=2) / max(x.shape[2], 1)
    return ChannelStatistics(x.shape[2], mean, ((x - mean[:, :, None]) ** 2).sum(axis=2))


TWO_GROUPS = (LayerGroup((0, 2), 1, 8, 8), LayerGroup((1,), 3, 4, 4))


def make_shard(
    teacher: TeacherManifest, sample_ids: Sequence[str], lengths: Sequence[int], seed: int = 0
) -> Made:
    generator = torch.Generator().manual_seed(seed)
    ptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    num_tokens = int(ptr[-1])
    starts = np.concatenate([np.arange(n) for n in lengths] or [[]]).astype(np.int32)
    table = TokenTable(
        tuple(sample_ids),
        ptr,
        np.arange(num_tokens, dtype=np.int32),
        starts,
        starts + 1,
        np.zeros(num_tokens, np.int8),
    )
    arrays, statistics, values = dict[str, np.ndarray](), {}, {}
    transforms = with_bases(teacher, make_bases(teacher)) if teacher.codec.transforms else {}
    for group_idx, group in enumerate(teacher.groups):
        prefix = group_prefix(teacher, group_idx)
        lead = (len(group.layers), group.num_key_value_heads)
        for kind in KINDS:
            name, dim = f"{prefix}{kind}", group.head_dim(kind)
            codec = codec_of(teacher.codec, kind, transforms, prefix)
            samples = [torch.randn(*lead, n, dim, generator=generator) * 3 for n in lengths]
            encoded = [codec.encode(x, kind) for x in samples]
            for part in codec.parts(kind):
                pieces = [parts[part.suffix].numpy() for parts in encoded]
                arrays[part_name(name, part.suffix)] = np.concatenate(pieces, axis=2)
            statistics[name] = statistics_of(samples)
            values[name] = samples
        if teacher.has_importance:
            importance = torch.rand(*lead, num_tokens, generator=generator)
            arrays[f"{prefix}importance"] = importance.half().numpy()
    if teacher.has_hidden_at_cue:
        shape = (len(teacher.layers) + 1, len(lengths), teacher.hidden_size)
        arrays["hidden_at_cue"] = torch.randn(*shape, generator=generator).numpy()
    if teacher.has_summaries:
        shape = (2, len(lengths), teacher.hidden_size)
        arrays["hidden_summary"] = torch.randn(*shape, generator=generator).numpy()
    counts = Counts(table.num_samples, num_tokens, table.num_blocks)
    for name, spec in shard_arrays(teacher, counts).items():
        if UNPREDICTED in spec.attributes:
            predicted = torch.rand(spec.shape, generator=generator).mul(9).numpy()
            predicted = predicted.astype(spec.dtype)
            predicted[ptr[:-1][np.diff(ptr) > 0]] = float(spec.attributes[UNPREDICTED])
            arrays[name] = predicted
    texts = None
    if teacher.own_text:
        texts = tuple(Sample(i, (("text", "own\n\u2028text" * 20),)) for i in sample_ids)
    return Made(EncodedShard(table, arrays, texts), statistics, values)


def make_bases(teacher: TeacherManifest) -> dict[str, Basis]:
    """Bases of codec klt for keys and values as ``make_shard`` draws them."""
    generator, bases = torch.Generator().manual_seed(0), {}
    for stem, layout in blocks_of(teacher).items():
        width = layout.group.num_key_value_heads * layout.group.head_dim(KINDS["value" in stem])
        for i, layers in enumerate(layer_blocks(layout.layers, teacher.codec.block_layers)):
            x = torch.randn(400, len(layers) * width, generator=generator) * 3
            bases[f"{stem}.{i}"] = fit_basis(x, torch.ones(x.shape[1]), layout.num_bytes)
    return bases


def registered(store: KVStore, teacher: TeacherManifest) -> TeacherManifest:
    """Add a teacher to a store, after its bases if it has any."""
    if teacher.codec.transforms:
        bases = partial(make_bases, teacher)
        checksum = published_bases(store.place, teacher.name, "made", bases)
        teacher = teacher.model_copy(update={"transform": checksum})
    return add_teacher(store, teacher)


def make_corpus(num_shards: int = 2, samples_per_shard: int = 3) -> list[Shard]:
    texts = ["0123456789" * 20] * (num_shards * samples_per_shard)
    samples = [Sample(f"s{i}", (("text", text),)) for i, text in enumerate(texts)]
    return list(cut_into_shards(samples, shard_chars=200 * samples_per_shard))


LENGTHS = (130, 0, 64)


def make_store(
    path: Path, teacher: TeacherManifest, num_shards: int = 2
) -> tuple[KVStore, dict[str, Made]]:
    """A store with every shard of one teacher committed."""
    shards = make_corpus(num_shards)
    store = create(path, shards)
    registered(store, teacher)
    made = {}
    for seed, shard in enumerate(shards):
        ids = [sample.sample_id for sample in shard.samples]
        made[shard.shard_id] = make_shard(teacher, ids, LENGTHS, seed)
        one = made[shard.shard_id]
        assert publish_shard(store, teacher.name, shard.shard_id, one.shard, one.statistics)
    return store, made


def bytes_of(root: Path) -> dict[str, bytes]:
    """Every file of a store but what its machine alone needs."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    names = {path.relative_to(root).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in names.items() if "/tmp/" not in name}


def assert_equal_stores(ours: KVStore, theirs: KVStore) -> None:
    assert ours.teachers() == theirs.teachers()
    for name in ours.teachers():
        assert ours.committed(name) == theirs.committed(name)
        for shard_id in ours.committed(name):
            mine, other = ours.read_shard(name, shard_id), theirs.read_shard(name, shard_id)
            assert mine.texts == other.texts
            for key, array in mine.arrays.items():
                np.testing.assert_array_equal(array, other.arrays[key])
        for kind, found in ours.statistics(name).items():
            np.testing.assert_array_equal(
                found.to_array(), theirs.statistics(name)[kind].to_array()
            )
