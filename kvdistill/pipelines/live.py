"""Live teachers behind the interface of a store (``kv_source: live``).

For trials without a disk, and to measure what caching saves: every teacher reads every text each
time that it is due, and encodes it as it would be stored, so that both ways give equal losses. The
store gives the corpus, the plan and the manifests (geometry and statistics), and no shard.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from kvdistill.config.experiment import Experiment
from kvdistill.distill.data.stream import LoadedShard
from kvdistill.distill.train.set_up import SourceOf
from kvdistill.extract.teacher import Teacher
from kvdistill.pipelines.extract import open_teacher, read_shard
from kvdistill.store.format import Counts, shard_arrays
from kvdistill.store.manifest import TeacherManifest
from kvdistill.store.open_shard import axis_positions
from kvdistill.store.reader import KVStore
from kvdistill.store.shard import EncodedShard


@dataclass(frozen=True, eq=False)
class LiveSource:
    """Shards of a plan, made by running the teachers over its samples."""

    experiment: Experiment
    teachers: Mapping[str, Teacher]
    store: KVStore
    layers: Mapping[str, Sequence[int]]
    """Per teacher, the layers that the student's layer map needs."""

    @property
    def sizes(self) -> list[int]:
        """Number of samples of every shard of the plan."""
        return [plan.num_samples for plan in self.store.manifest.shards]

    def load(self, shard_idx: int) -> LoadedShard:
        """Run every teacher over one shard."""
        shard_id = self.store.shard_ids[shard_idx]
        found = {}
        for name, layers in self.layers.items():
            teacher = self.teachers[name]
            shard = read_shard(self.store, self.experiment, teacher, shard_id).shard
            found[name] = only_layers(shard, teacher.manifest, layers)
        return LoadedShard(self.store.samples(shard_id), found)

    def load_all(
        self, shard_idx: Iterable[int], *, threads: int, num_ahead: int
    ) -> Generator[LoadedShard, None, None]:
        """Shards in order, without prefetching: a teacher's forward pass fills the machine."""
        del threads, num_ahead
        for i in shard_idx:
            yield self.load(i)


def live_source(experiment: Experiment, store: KVStore) -> SourceOf:
    """Load every teacher of an experiment; returns ``assemble``'s ``source_of``.

    Args:
        experiment: the run.
        store: the whole store; that given to ``source_of`` may be its first shards.

    Raises:
        TeacherError: one of them cannot be loaded or verified.
        StoreMismatch: the store holds another extraction of it.
    """
    teachers = {name: open_teacher(store, experiment, name) for name in experiment.teachers}

    def source_of(_: KVStore, layers: Mapping[str, Sequence[int]]) -> LiveSource:
        return LiveSource(experiment, teachers, store, layers)

    return source_of


def only_layers(
    shard: EncodedShard, manifest: TeacherManifest, layers: Sequence[int]
) -> EncodedShard:
    """Select layers of a shard that has all of them, as ``KVStore.read_shard`` would."""
    tokens = shard.tokens
    counts = Counts(tokens.num_samples, tokens.num_tokens, tokens.num_blocks)
    arrays = dict(shard.arrays)
    for name, spec in shard_arrays(manifest, counts).items():
        if spec.group is None or name not in arrays:
            continue
        positions = axis_positions(spec, layers, None)
        if positions is None:
            del arrays[name]
        else:
            arrays[name] = arrays[name][positions[0]]
    return replace(shard, arrays=arrays)
