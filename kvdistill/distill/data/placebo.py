"""Placebos: targets with a teacher's statistics that carry no information about their text.

A gain that a placebo shares is regularisation, not knowledge. Both are made while streaming, from
the stored shards: no new extraction.

``shuffled``  another text's keys and values, of similar length and from the same shard: real in
              their distribution and in how they follow one another in time, but about another text.
              Every text keeps its partner for the whole run
``noise``     Gaussian with the stored mean and variance of every (layer, head, channel), drawn
              once per text. Channels are independent: the store keeps no covariance

The third, a teacher whose weights were never trained, is extracted: ``teachers.X.weights: random``.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvdistill.config.distill import PlaceboConfig
from kvdistill.distill.data.collate import Item
from kvdistill.distill.data.stream import LoadedShard, Source
from kvdistill.errors import ConfigError
from kvdistill.store.codecs import CODECS
from kvdistill.store.codecs.parts import part_name
from kvdistill.store.format import group_prefix
from kvdistill.store.reader import KVStore
from kvdistill.store.shard import EncodedShard
from kvdistill.types import CodecSpec, Kind

NEIGHBOURS: Final = 8
"""Texts of similar length among which partners are drawn."""

Distort = Callable[[int, LoadedShard], LoadedShard]
"""Makes a placebo of a shard, given its index in the plan."""


def with_placebo(
    source: Source, store: KVStore, layers: Mapping[str, Sequence[int]], config: PlaceboConfig
) -> Source:
    """A source of ``layers`` per teacher of ``store``, unchanged, or its configured placebo.

    Raises:
        ConfigError: it names a teacher that is not read, or shuffles a corpus of one text.
    """
    if config.method == "none" or not layers:
        return source
    unknown = sorted(set(config.teachers or ()) - set(layers))
    if unknown:
        raise ConfigError(
            f"placebo.teachers names {unknown}, but the teachers are {sorted(layers)}"
        )
    chosen = sorted(config.teachers or layers)
    if config.method == "shuffled":
        return PlaceboSource(source, _shuffler(source, chosen, config.seed))
    if transformed := [name for name in chosen if store.teacher(name).codec.transforms]:
        raise ConfigError(
            f"placebo.method noise: teacher {transformed[0]!r} is stored in codec klt, whose few "
            "components cannot represent independent noise; use shuffled, or codec int8"
        )
    moments = {name: _moments(store, name, layers[name]) for name in chosen}
    codecs = {name: store.teacher(name).codec for name in chosen}

    def noisy(_: int, shard: LoadedShard) -> LoadedShard:
        drawn = {
            name: noise(shard.teachers[name], moments[name], codecs[name], f"{config.seed}/{name}")
            for name in chosen
        }
        return replace(shard, teachers={**shard.teachers, **drawn})

    return PlaceboSource(source, noisy)


@dataclass(frozen=True, eq=False)
class PlaceboSource:
    """Shards of another source, distorted as they are read."""

    source: Source
    distort: Distort

    @property
    def sizes(self) -> list[int]:
        """Number of samples of every shard of the plan."""
        return self.source.sizes

    def load(self, shard_idx: int) -> LoadedShard:
        """One shard, distorted."""
        return self.distort(shard_idx, self.source.load(shard_idx))

    def load_all(
        self, shard_idx: Iterable[int], *, threads: int, num_ahead: int
    ) -> Generator[LoadedShard, None, None]:
        """Shards in order, prefetched by the underlying source."""
        wanted, requested = itertools.tee(shard_idx)
        reads = self.source.load_all(requested, threads=threads, num_ahead=num_ahead)
        with closing(reads) as loaded:
            # Not a zip: it would draw the next index, and with it start a read, too early.
            for shard in loaded:
                yield self.distort(next(wanted), shard)


@dataclass(frozen=True, eq=False)
class ShuffledShard(LoadedShard):
    """A shard whose samples come with the keys and values of their partners."""

    partners: Mapping[str, tuple[EncodedShard, NDArray[np.int64]]]
    """Per shuffled teacher, every sample's partner and the shard that holds it: this one, or the
    neighbour of a shard in which the teacher reads a single text."""

    def item(self, sample_idx: int) -> Item:
        """One sample, and where its partner's KV is."""
        own = {name: (shard, sample_idx) for name, shard in self.teachers.items()}
        lent = {n: (shard, int(found[sample_idx])) for n, (shard, found) in self.partners.items()}
        return Item(self.samples[sample_idx], own | lent)


def _shuffler(source: Source, shuffled: Sequence[str], seed: int) -> Distort:
    """Gives the texts that a teacher reads partners among them, from the same shard if it can."""
    if sum(source.sizes) < 2:
        raise ConfigError("placebo.method shuffled exchanges texts, but the corpus has only one")

    def lender(name: str, shard_idx: int) -> LoadedShard:
        others = sorted(range(len(source.sizes)), key=lambda i: (abs(i - shard_idx), i))[1:]
        for shard in map(source.load, others):
            if len(_texts_read(shard, name)):
                return shard
        raise ConfigError(
            f"placebo.method shuffled exchanges texts, but teacher {name!r} reads only one"
        )

    def partners_of(
        name: str, shard_idx: int, shard: LoadedShard
    ) -> tuple[EncodedShard, NDArray[np.int64]]:
        lengths, read = _lengths(shard), _texts_read(shard, name)
        found = np.arange(len(lengths))
        if len(read) == 1:
            lent = lender(name, shard_idx)
            there = _texts_read(lent, name)
            found[read] = there[np.argmin(np.abs(_lengths(lent)[there] - lengths[read]))]
            return lent.teachers[name], found
        drawn = _hash_to_int(f"{seed}/{shard.samples[0].sample_id}")
        found[read] = read[partners(lengths[read], drawn)]
        return shard.teachers[name], found

    def shuffle(shard_idx: int, shard: LoadedShard) -> LoadedShard:
        lent = {name: partners_of(name, shard_idx, shard) for name in shuffled}
        return ShuffledShard(shard.samples, shard.teachers, lent)

    return shuffle


def _lengths(shard: LoadedShard) -> NDArray[np.int64]:
    return np.array([len(sample.text) for sample in shard.samples])


def _texts_read(shard: LoadedShard, teacher: str) -> NDArray[np.int64]:
    """Indices of the samples with tokens of a teacher."""
    return np.flatnonzero(np.diff(shard.teachers[teacher].tokens.sample_ptr))


def partners(lengths: Sequence[int] | NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """For every text another one of similar length: a permutation without fixed points.

    Texts are sorted by length and cut into groups of ``NEIGHBOURS``; each group is one cycle.
    """
    count = len(lengths)
    rng = np.random.default_rng(seed)
    order = np.argsort(np.asarray(lengths), kind="stable")
    found = np.empty(count, np.int64)
    for group in np.array_split(order, max(1, count // NEIGHBOURS)):
        cycle = rng.permutation(group)
        found[cycle] = np.roll(cycle, 1)
    return found


def noise(
    shard: EncodedShard, moments: Mapping[str, tuple[Tensor, Tensor]], codec: CodecSpec, seed: str
) -> EncodedShard:
    """The same tokens with keys and values drawn at random.

    Args:
        shard: what is stored; its token table and side arrays stay.
        moments: mean and standard deviation ``[L, H, D]`` by name (``key``, ``g0/value``, …).
        codec: how the shard is encoded, and so the noise.
        seed: together with a sample's id it determines the sample's noise.
    """
    tokens = shard.tokens
    arrays = dict(shard.arrays)
    coders = {}
    moments = {name: x for name, x in moments.items() if name in arrays}
    for name in moments:
        kind: Kind = name.rpartition("/")[2]  # type: ignore[assignment]
        coders[name] = kind, CODECS[getattr(codec, kind)]
        for part in coders[name][1].parts(kind):
            array = part_name(name, part.suffix)
            arrays[array] = arrays[array].copy()
    for sample_idx, sample_id in enumerate(tokens.sample_ids):
        span = tokens.span(sample_idx)
        generator = torch.Generator().manual_seed(_hash_to_int(f"{seed}/{sample_id}"))
        for name, (mean_LHD, std_LHD) in moments.items():
            kind, coder = coders[name]
            shape = (*mean_LHD.shape[:2], span.stop - span.start, mean_LHD.shape[2])
            drawn = torch.randn(shape, generator=generator)
            encoded = coder.encode(drawn * std_LHD[:, :, None] + mean_LHD[:, :, None], kind)
            for part in coder.parts(kind):
                where = span if part.per == "token" else tokens.block_span(sample_idx)
                arrays[part_name(name, part.suffix)][:, :, where] = encoded[part.suffix].numpy()
    return replace(shard, arrays=arrays)


def _moments(
    store: KVStore, teacher: str, layers: Sequence[int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation ``[L, H, D]`` of the layers that are read, by array name."""
    manifest, stored = store.teacher(teacher), store.statistics(teacher)
    found = {}
    for group_idx, group in enumerate(manifest.groups):
        rows = [group.layers.index(layer) for layer in sorted(layers) if layer in group.layers]
        for kind in manifest.kinds if rows else ():
            name = f"{group_prefix(manifest, group_idx)}{kind}"
            mean, std = stored[name].mean[rows], stored[name].std[rows]
            found[name] = torch.from_numpy(mean).float(), torch.from_numpy(std).float()
    return found


def _hash_to_int(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
