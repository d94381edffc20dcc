"""Placebos: targets that look like a teacher's and know nothing of the text they are shown with.

A gain that a placebo shares is regularisation, not knowledge, so a study that claims knowledge
needs them as arms. Both are made while streaming, from the stored shards: no new extraction.

``shuffled``  another text's keys and values, of like length and from the same shard. What the
              teacher's numbers look like, how they follow one another in time: all real, all
              about another text. Every text keeps its partner for the whole run
``noise``     Gaussian with the stored mean and variance of every (layer, head, channel), drawn
              once per text. Channels are independent: the store keeps no covariance

The third, a teacher whose weights were never trained, is extracted: ``teachers.X.weights: random``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvdistill.config_distill import PlaceboConfig
from kvdistill.distill.data.collate import Item
from kvdistill.distill.data.source import LoadedShard, Source
from kvdistill.errors import ConfigError
from kvdistill.store.codecs import CODECS, part_name
from kvdistill.store.reader import KVStore
from kvdistill.store.schema import group_prefix
from kvdistill.store.shard import EncodedShard
from kvdistill.types import KINDS, CodecSpec

NEIGHBOURS: Final = 8
"""Texts of like length among which partners are drawn."""

Distort = Callable[[LoadedShard], LoadedShard]


@dataclass(frozen=True, eq=False)
class PlaceboSource:
    """Shards of another source, distorted as they come."""

    source: Source
    distort: Distort

    @property
    def sizes(self) -> list[int]:
        """Number of samples of every shard of the plan."""
        return self.source.sizes

    def load(self, shard_idx: int) -> LoadedShard:
        """One shard, distorted."""
        return self.distort(self.source.load(shard_idx))

    def load_all(
        self, shard_idx: Iterable[int], *, threads: int, num_ahead: int
    ) -> Generator[LoadedShard, None, None]:
        """Shards in order, read ahead by the source beneath."""
        reads = self.source.load_all(shard_idx, threads=threads, num_ahead=num_ahead)
        with closing(reads) as loaded:
            yield from map(self.distort, loaded)


@dataclass(frozen=True, eq=False)
class ShuffledShard(LoadedShard):
    """A shard whose samples come with the keys and values of their partners."""

    partners: NDArray[np.int64]
    swapped: frozenset[str]
    """Teachers whose keys and values are swapped; the others' are the sample's own."""

    def item(self, sample_idx: int) -> Item:
        """One sample, and where its partner's KV lies."""
        partner = int(self.partners[sample_idx])
        shards = {
            name: (shard, partner if name in self.swapped else sample_idx)
            for name, shard in self.teachers.items()
        }
        return Item(self.samples[sample_idx], shards)


def with_placebo(
    source: Source, store: KVStore, layers: Mapping[str, Sequence[int]], config: PlaceboConfig
) -> Source:
    """The source as it is, or the placebo that the config asks for.

    Args:
        source: shards of ``store``, with ``layers`` of each teacher.
        store: whose statistics noise is drawn from.
        layers: per teacher, the layers that are read.
        config: which placebo, for which teachers.

    Raises:
        ConfigError: it names a teacher that is not read.
    """
    if config.method == "none" or not layers:
        return source
    strangers = sorted(set(config.teachers or ()) - set(layers))
    if strangers:
        raise ConfigError(
            f"placebo.teachers names {strangers}, but the teachers are {sorted(layers)}"
        )
    chosen = frozenset(config.teachers or layers)
    if config.method == "shuffled":
        return PlaceboSource(source, lambda shard: _shuffled(shard, chosen, config.seed))
    moments = {name: _moments(store, name, layers[name]) for name in sorted(chosen)}
    codecs = {name: store.teacher(name).codec for name in moments}

    def noisy(shard: LoadedShard) -> LoadedShard:
        drawn = {
            name: noise(shard.teachers[name], moments[name], codecs[name], f"{config.seed}/{name}")
            for name in moments
        }
        return replace(shard, teachers={**shard.teachers, **drawn})

    return PlaceboSource(source, noisy)


def partners(lengths: Sequence[int], seed: int) -> NDArray[np.int64]:
    """For every text another one of like length; nobody gets itself, everybody is got once.

    Texts are sorted by length and cut into groups of ``NEIGHBOURS``; each group is one cycle.

    Raises:
        ConfigError: there is only one text.
    """
    count = len(lengths)
    if count < 2:
        raise ConfigError(
            "placebo.method shuffled swaps texts inside a shard, and there is a shard of one text; "
            "raise corpus.shard_chars and extract anew"
        )
    rng = np.random.default_rng(seed)
    order = np.argsort(np.asarray(lengths), kind="stable")
    found = np.empty(count, np.int64)
    for group in np.array_split(order, max(1, count // NEIGHBOURS)):
        cycle = rng.permutation(group)
        found[cycle] = np.roll(cycle, 1)
    return found


def noise(
    shard: EncodedShard,
    moments: Mapping[str, tuple[Tensor, Tensor]],
    codec: CodecSpec,
    seed: str,
) -> EncodedShard:
    """The same tokens with keys and values that are drawn, not read.

    Args:
        shard: what is stored; its token table and side arrays stay.
        moments: mean and standard deviation ``[L, H, D]`` by name (``key``, ``g0/value``, …).
        codec: how the shard is encoded, and so the noise.
        seed: with a sample's id it decides the sample's noise.
    """
    tokens = shard.tokens
    arrays = {name: array.copy() for name, array in shard.arrays.items() if _is_kv(name, moments)}
    for sample_idx, sample_id in enumerate(tokens.sample_ids):
        span = tokens.span(sample_idx)
        generator = torch.Generator().manual_seed(_number(f"{seed}/{sample_id}"))
        for name, (mean_LHD, std_LHD) in moments.items():
            kind = KINDS[name.endswith("value")]
            shape = (*mean_LHD.shape[:2], span.stop - span.start, mean_LHD.shape[2])
            drawn = torch.randn(shape, generator=generator)
            coder = CODECS[codec.key if kind == "key" else codec.value]
            encoded = coder.encode(drawn * std_LHD[:, :, None] + mean_LHD[:, :, None], kind)
            for part in coder.parts(kind):
                where = span if part.per == "token" else tokens.block_span(sample_idx)
                array = arrays[part_name(name, part.suffix)]
                array[:, :, where] = encoded[part.suffix].numpy()
    return replace(shard, arrays={**shard.arrays, **arrays})


def _shuffled(shard: LoadedShard, swapped: frozenset[str], seed: int) -> ShuffledShard:
    lengths = [len(sample.text) for sample in shard.samples]
    own = _number(f"{seed}/{shard.samples[0].sample_id}")
    return ShuffledShard(shard.samples, shard.teachers, partners(lengths, own), swapped)


def _moments(
    store: KVStore, teacher: str, layers: Sequence[int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation ``[L, H, D]`` of the layers that are read, by array name."""
    manifest, stored = store.teacher(teacher), store.statistics(teacher)
    found = {}
    for group_idx, group in enumerate(manifest.groups):
        rows = [group.layers.index(layer) for layer in sorted(layers) if layer in group.layers]
        for kind in KINDS if rows else ():
            name = f"{group_prefix(manifest, group_idx)}{kind}"
            of = stored[name]
            sides = (torch.from_numpy(side[rows]).float() for side in (of.mean, of.std))
            mean, std = sides
            found[name] = (mean, std)
    return found


def _is_kv(name: str, moments: Iterable[str]) -> bool:
    parts = ("", "scale", "zero")
    return any(name == part_name(stem, part) for stem in moments for part in parts)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
