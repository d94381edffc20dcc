"""A teacher that knows nothing: noise with another stored teacher's means and variances."""

from __future__ import annotations

from typing import Any

import torch

from kvdistill.store.channel_statistics import ChannelStatistics
from kvdistill.store.codecs import CODECS
from kvdistill.store.codecs.parts import part_name
from kvdistill.store.format import Counts, group_prefix, shard_arrays
from kvdistill.store.reader import KVStore
from kvdistill.store.shard import EncodedShard
from kvdistill.store.writer import add_teacher, publish_shard
from kvdistill.types import KINDS
from tests.store.made import statistics_of


def add_noise_teacher(store: KVStore, like: str, name: str, seed: int = 0) -> None:
    """Publish teacher ``name``: ``like``'s tokens, Gaussian keys and values of equal moments."""
    manifest = store.teacher(like).model_copy(update={"name": name, "weights_fingerprint": "noise"})
    add_teacher(store, manifest)
    moments = store.statistics(like)
    generator = torch.Generator().manual_seed(seed)
    for shard_id in store.missing(name):
        tokens = store.token_table(like, shard_id)
        counts = Counts(tokens.num_samples, tokens.num_tokens, tokens.num_blocks)
        arrays: dict[str, Any] = {
            spec.name: torch.zeros(spec.shape).numpy().astype(spec.dtype)
            for spec in shard_arrays(manifest, counts).values()
            if spec.group is not None
        }
        statistics: dict[str, ChannelStatistics] = {}
        for group_idx in range(len(manifest.groups)):
            prefix = group_prefix(manifest, group_idx)
            for kind in KINDS:
                of = moments[f"{prefix}{kind}"]
                codec = CODECS[manifest.codec.key if kind == "key" else manifest.codec.value]
                mean, std = torch.from_numpy(of.mean).float(), torch.from_numpy(of.std).float()
                drawn = []
                for i in range(tokens.num_samples):
                    span = tokens.span(i)
                    shape = (*mean.shape[:2], span.stop - span.start, mean.shape[2])
                    x = torch.randn(shape, generator=generator) * std[:, :, None] + mean[:, :, None]
                    drawn.append(x)
                    encoded = codec.encode(x, kind)
                    for part in codec.parts(kind):
                        where = tokens.span_of(part.per, i)
                        array = arrays[part_name(f"{prefix}{kind}", part.suffix)]
                        array[:, :, where] = encoded[part.suffix].numpy()
                statistics[f"{prefix}{kind}"] = statistics_of(drawn)
        publish_shard(store, name, shard_id, EncodedShard(tokens, arrays), statistics)
