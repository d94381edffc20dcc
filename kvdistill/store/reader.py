"""Reading a store: whole shards in order, or any sample × layer × head × kind × tokens.

Opening reads only ``kvstore.json``; teachers and committed shards are found by listing folders,
and a shard's commit is read together with the shard. Every cache of shards is bounded, so a
process can stream a store of any size.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Final
from weakref import WeakSet, finalize, proxy

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvdistill.corpus.samples import Sample
from kvdistill.errors import ShardCorrupt, ShardNotFound, StoreFormatError, StoreNotFound
from kvdistill.store.channel_statistics import ChannelStatistics, merged_statistics
from kvdistill.store.codecs import Transforms
from kvdistill.store.commit import REMEDY, read_regular
from kvdistill.store.derived import Arrays, derived_arrays, load_transforms
from kvdistill.store.format import COMMIT
from kvdistill.store.manifest import Commit, ShardPlan, StoreManifest, TeacherManifest
from kvdistill.store.open_place import open_place
from kvdistill.store.open_shard import OpenedShard, open_shard, read_samples
from kvdistill.store.place import Place
from kvdistill.store.shard import EncodedShard, TokenTable
from kvdistill.types import Kind

OPEN_SHARDS: Final = 16
"""Shards that stay open for random access."""


_HANDLES: Final[WeakSet[KVStore]] = WeakSet()


def _renew_locks() -> None:
    """In a forked child, none of the threads that may have held a lock exists."""
    for store in _HANDLES:
        store._lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)


def _reopened(location: Path | str, shard_ids: tuple[str, ...]) -> KVStore:
    store = KVStore.open(location)
    return store if store.shard_ids == shard_ids else store.only(shard_ids)


class KVStore:
    """A store, opened for reading. Safe to share between threads and, unless it is in a bucket,
    with forked children; pickled by its location. ``paths`` of a store in a bucket are those of its
    folder in the cache, which holds what has been read.
    """

    def __init__(self, place: Place, manifest: StoreManifest, part: str = "") -> None:
        self.place = place
        self.part = part
        self.paths = place.paths
        self.manifest = manifest
        self._plans = {plan.shard_id: plan for plan in manifest.shards}
        self._teachers: dict[str, TeacherManifest] = {}
        self._transforms: dict[str, Transforms] = {}
        self._open: OrderedDict[tuple[str, str], OpenedShard] = OrderedDict()
        self._index: dict[str, tuple[str, int]] | None = None
        self._lock = threading.Lock()
        _HANDLES.add(self)

    def __reduce__(self) -> tuple[Callable[..., KVStore], tuple[Path | str, tuple[str, ...]]]:
        return _reopened, (self.place.location, self.shard_ids)

    @staticmethod
    def open(path: Path | str) -> KVStore:
        """Open the store at ``path``, a folder or the URL of a bucket.

        Raises:
            StoreNotFound: there is no ``kvstore.json``.
            StoreFormatError: it is malformed, or of a newer format.
            StoreError: the bucket cannot be read.
        """
        place = open_place(path)
        plan = place.paths.manifest
        if (text := place.read(plan)) is None:
            raise StoreNotFound(
                f"no store at {path}: {plan.name} is missing; `kvdistill extract` creates one, "
                "`push` copies one there"
            )
        return KVStore(place, StoreManifest.from_json(text, place.shown(plan)))

    @property
    def where(self) -> str:
        """The store's path or URL, for messages."""
        return self.place.shown(self.paths.root)

    def only(self, shard_ids: Iterable[str]) -> KVStore:
        """The same store with these shards of the plan alone, in corpus order.

        What is derived from a part has files of its own: whole and part would replace each other's.
        """
        wanted = set(shard_ids)
        kept = tuple(plan for plan in self.manifest.shards if plan.shard_id in wanted)
        names = "\n".join(plan.shard_id for plan in kept).encode()
        part = self.part if kept == self.manifest.shards else f".{xxhash.xxh3_64_hexdigest(names)}"
        return KVStore(self.place, self.manifest.model_copy(update={"shards": kept}), part)

    @property
    def shard_ids(self) -> tuple[str, ...]:
        """All shards of the plan, in corpus order."""
        return tuple(self._plans)

    def plan(self, shard_id: str) -> ShardPlan:
        """One shard of the plan.

        Raises:
            ShardNotFound: the plan has no such shard.
        """
        if shard_id not in self._plans:
            raise ShardNotFound(
                f"{self.where}: the plan has no shard {shard_id!r}; it has "
                f"{len(self._plans)}, from {self.shard_ids[0]} to {self.shard_ids[-1]}"
            )
        return self._plans[shard_id]

    def teachers(self) -> list[str]:
        """Names of all teachers that have a manifest, sorted."""
        return sorted(filter(self.has_teacher, self.place.folders(self.paths.teachers)))

    def has_teacher(self, name: str) -> bool:
        """Whether a teacher has a manifest."""
        return self.place.has(self.paths.teacher_manifest(name))

    def teacher(self, name: str) -> TeacherManifest:
        """One teacher's manifest.

        Raises:
            ShardNotFound: no such teacher; names those that exist.
            StoreFormatError: its manifest is malformed, newer, or of another teacher.
        """
        if name not in self._teachers:
            path = self.paths.teacher_manifest(name)
            text = self.place.read(path) if self.has_teacher(name) else None
            if text is None:
                raise ShardNotFound(
                    f"{self.where} has no teacher {name!r}; it has {self.teachers()}"
                )
            where = self.place.shown(path)
            manifest = TeacherManifest.from_json(text, where)
            if manifest.name != name:
                raise StoreFormatError(f"{where}: of teacher {manifest.name!r}, expected {name!r}")
            self._teachers[name] = manifest
        return self._teachers[name]

    def transforms(self, teacher: str) -> Transforms:
        """The fitted codecs of a teacher that is stored in ``klt``; empty for others.

        Raises:
            ShardCorrupt: their file is missing, or not the manifest's.
        """
        if teacher not in self._transforms:
            self._transforms[teacher] = load_transforms(self.place, self.teacher(teacher))
        return self._transforms[teacher]

    def committed(self, teacher: str) -> frozenset[str]:
        """Shards of the plan that this teacher has committed; see ``Place.committed``."""
        return self.place.committed(teacher, self._plans.keys())

    def is_committed(self, teacher: str, shard_id: str) -> bool:
        """Whether one shard is committed; cheaper than ``committed``."""
        return self.place.commit(teacher, self.plan(shard_id).shard_id) is not None

    def committed_in_order(self, teacher: str) -> list[str]:
        """Committed shards in the order of the plan.

        Raises:
            ShardNotFound: there is none.
        """
        committed = self.committed(teacher)
        if not committed:
            raise ShardNotFound(f"{self.where}: teacher {teacher!r} has no shard yet")
        return [shard_id for shard_id in self._plans if shard_id in committed]

    def missing(self, teacher: str) -> list[str]:
        """Shards of the plan that this teacher lacks, in order."""
        committed = self.committed(teacher)
        return [shard_id for shard_id in self._plans if shard_id not in committed]

    def samples(self, shard_id: str) -> tuple[Sample, ...]:
        """The corpus samples of a shard.

        Raises:
            ShardCorrupt: the file is missing, or does not have the plan's checksum.
        """
        return read_samples(self.sample_text(shard_id).decode("utf-8"))

    def sample_text(self, shard_id: str) -> bytes:
        """The file of a shard's samples, which the cache keeps.

        Raises:
            ShardCorrupt: as ``samples``.
        """
        plan = self.plan(shard_id)
        path = self.paths.samples(shard_id)
        limit = 2**16 * plan.num_samples + 16 * plan.num_chars  # JSON escapes, ids, tags
        text = read_regular(path, limit) if path.is_file() else b""
        if sha256(text).hexdigest() != plan.sha256 and self.place.refresh(path):
            text = read_regular(path, limit)
        if sha256(text).hexdigest() != plan.sha256:
            state = "does not match the plan's checksum" if text else "missing or empty"
            raise ShardCorrupt(
                f"{self.place.shown(path)}: {state}; restore it from a copy of the store"
            )
        return text

    def commit(self, teacher: str, shard_id: str) -> Commit:
        """Counts and checksums of a committed shard.

        Raises:
            ShardNotFound: it is not committed.
            StoreFormatError: it is malformed or newer.
            ShardCorrupt: it belongs to another shard or another extraction, or is missing in a
                folder of files.
        """
        manifest, plan = self.teacher(teacher), self.plan(shard_id)
        where = self.place.shown(self.paths.shard(teacher, shard_id) / COMMIT)
        commit = Commit.from_json(self._commit_text(teacher, shard_id), where)
        found = (commit.teacher, commit.shard_id, commit.num_samples, commit.extraction_fingerprint)
        expected = (manifest.name, shard_id, plan.num_samples, manifest.extraction_fingerprint)
        if found != expected:
            raise ShardCorrupt(
                f"{where}: (teacher, shard, samples, extraction) is {found}, expected {expected}; "
                f"{REMEDY}"
            )
        return commit

    def _commit_text(self, teacher: str, shard_id: str) -> bytes:
        if (text := self.place.commit(teacher, shard_id)) is not None:
            return text
        if shard_id in self.committed(teacher):  # a folder that has lost its commit
            path = self.paths.shard(teacher, shard_id) / COMMIT
            raise ShardCorrupt(f"{path}: missing; {REMEDY}")
        raise ShardNotFound(
            f"{self.where}: teacher {teacher!r} has not committed shard "
            f"{shard_id}; run `kvdistill extract`"
        )

    def origin(self, teacher: str) -> str:
        """A digest of the committed shards and their commits, for what is derived from them.

        Raises:
            ShardNotFound, ShardCorrupt: as ``commit``.
        """
        digest = xxhash.xxh3_64()
        for shard_id in self.committed_in_order(teacher):
            digest.update(shard_id.encode() + self._commit_text(teacher, shard_id))
        return digest.hexdigest()

    def read_shard(
        self,
        teacher: str,
        shard_id: str,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        kinds: Sequence[Kind] | None = None,
    ) -> EncodedShard:
        """A shard, or some layers, heads and kinds of it, as stored codes.

        ``layers`` are the teacher's own layer indices, ``heads`` key/value head indices; None
        selects all. The layer and head axes hold the selected ones, ascending; arrays of groups
        without any selected layer are left out.

        Raises:
            ShardNotFound: it is not committed.
            ShardCorrupt: bytes are missing, truncated or flipped.
            GeometryError: the teacher has no such layer or head.
        """
        opened = self._opened(teacher, shard_id)
        chosen = opened.manifest.kinds if kinds is None else kinds
        arrays = opened.read(layers, heads, chosen)
        return EncodedShard(opened.token_table(), arrays, opened.own_texts())

    def read(
        self,
        teacher: str,
        sample_id: str,
        layer: int,
        head: int,
        kind: Kind,
        *,
        tokens: slice = slice(None),
    ) -> NDArray[np.float32]:
        """Decoded keys or values of one sample, layer and head: float32 ``[tokens, D]``.

        ``read_sample`` reads several layers and heads in one call, many times faster.

        Raises:
            ShardNotFound, ShardCorrupt, GeometryError: as ``read_sample``.
        """
        found = self.read_sample(teacher, sample_id, kind, [layer], [head], tokens=tokens)
        token_TD: NDArray[np.float32] = found[0, 0]
        return token_TD

    def read_sample(
        self,
        teacher: str,
        sample_id: str,
        kind: Kind,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        *,
        tokens: slice = slice(None),
    ) -> NDArray[np.float32]:
        """Decoded keys or values of one sample: float32 ``[L, H, tokens, D]``, keys not rotated.

        Layers and heads ascend, all of them when None. The first call builds an index of all
        sample ids; for a whole corpus, read shards.

        Raises:
            ShardNotFound: no such sample, or its shard is not committed.
            ShardCorrupt: bytes are missing, truncated or flipped.
            GeometryError: no such layer or head, layers of different geometries, or a slice
                with a step.
        """
        shard_id, sample_idx = self.find(sample_id)
        return self._opened(teacher, shard_id).decode(sample_idx, kind, layers, heads, tokens)

    def token_table(self, teacher: str, shard_id: str) -> TokenTable:
        """The token table of a shard, without its keys and values."""
        return self._opened(teacher, shard_id).token_table()

    def token_array(self, teacher: str, shard_id: str, name: str) -> NDArray[Any]:
        """One array of a shard by token, as stored: ``[T]`` or ``[T, …]``, such as ``nll``."""
        return self._opened(teacher, shard_id).data.read(name)

    def read_decoded(
        self,
        teacher: str,
        shard_id: str,
        kind: Kind,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> NDArray[np.float32]:
        """Decoded keys or values of a whole shard: float32 ``[L, H, T, D]``, keys not rotated.

        Raises:
            GeometryError: the layers are of different geometries.
            ShardNotFound, ShardCorrupt: as ``read_shard``.
        """
        return self._opened(teacher, shard_id).decode_shard(kind, layers, heads)

    def find(self, sample_id: str) -> tuple[str, int]:
        """The shard of a sample, and its position in it.

        Raises:
            ShardNotFound: the corpus has no such sample.
        """
        with self._lock:
            if self._index is None:
                self._index = {
                    sample.sample_id: (shard_id, i)
                    for shard_id in self._plans
                    for i, sample in enumerate(self.samples(shard_id))
                }
        if sample_id not in self._index:
            raise ShardNotFound(f"{self.where}: the corpus has no sample {sample_id!r}")
        return self._index[sample_id]

    def statistics(self, teacher: str) -> dict[str, ChannelStatistics]:
        """Statistics of all committed shards, by ``"key"``, ``"value"`` (``"g0/key"`` …).

        Raises:
            ShardNotFound: nothing is committed.
        """
        shard_ids = self.committed_in_order(teacher)

        def derive() -> Arrays:
            merged = merged_statistics(shard_ids, lambda i: self.shard_statistics(teacher, i))
            return {name: part.to_array() for name, part in merged.items()}

        path = self.paths.statistics(teacher, self.part)
        arrays = derived_arrays(self.place, path, self.origin(teacher), derive)
        return {name: ChannelStatistics.from_array(array) for name, array in arrays.items()}

    def shard_statistics(self, teacher: str, shard_id: str) -> dict[str, ChannelStatistics]:
        """Statistics of one shard, by ``"key"``, ``"value"`` (``"g0/key"`` …)."""
        return self._opened(teacher, shard_id).statistics()

    def forget(self, teacher: str, shard_id: str | None = None) -> None:
        """Close a teacher's shards, or one of them, whose files have moved."""
        with self._lock:
            for key in [key for key in self._open if key == (teacher, shard_id or key[1])]:
                del self._open[key]
            if shard_id is None:
                self._teachers.pop(teacher, None)
                self._transforms.pop(teacher, None)
        self.place.forget(teacher, shard_id)

    def _opened(self, teacher: str, shard_id: str) -> OpenedShard:
        key = (teacher, shard_id)
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
                return self._open[key]
        commit = self.commit(teacher, shard_id)
        # A proxy: in a cycle with its store, a shard would keep its lock until a collection.
        transforms = partial(KVStore.transforms, proxy(self), teacher)
        folder, release = self.place.open_shard(teacher, shard_id)
        try:
            opened = open_shard(folder, self.teacher(teacher), commit, transforms)
        except BaseException:
            release()
            raise
        finalize(opened, release)
        with self._lock:
            self._open[key] = opened
            while len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return opened
