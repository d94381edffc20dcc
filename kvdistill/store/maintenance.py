"""Maintenance of a store: verify and repair, merge, convert, remove a teacher.

None of it needs a teacher's model. ``verify_store`` reports every problem instead of stopping at
the first; ``repair_store`` moves bad shards aside whole, so nothing is lost and extraction makes
just those again. ``merge_stores`` copies files; ``convert_store`` rewrites stored codes and scales
in another backend without decoding them. Every copy is published like a new shard, so an
interrupted command continues when it is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvdistill.corpus.samples import Sample, Shard
from kvdistill.errors import KVDistillError, ShardCorrupt, StoreError, StoreMismatch
from kvdistill.store.bucket import local_folder
from kvdistill.store.commit import file_faults
from kvdistill.store.derived import is_sound
from kvdistill.store.format import COMMIT
from kvdistill.store.manifest import Commit
from kvdistill.store.open_shard import open_shard
from kvdistill.store.reader import KVStore
from kvdistill.store.shard import TokenTable
from kvdistill.store.writer import (
    add_teacher,
    check_finite,
    create,
    planned,
    publish_shard,
)
from kvdistill.text import shorten
from kvdistill.types import SEGMENT_IDS, SEGMENT_SPECIAL, Backend

OnShard = Callable[[str, str], None]
"""Called with teacher and shard id before each shard."""


@dataclass(frozen=True)
class Finding:
    """A problem. ``shard_id`` is empty for a teacher, ``teacher`` for the corpus."""

    teacher: str
    shard_id: str
    problem: str


def verify_store(
    store: KVStore,
    teachers: Iterable[str] | None = None,
    shard_ids: Collection[str] | None = None,
    progress: OnShard = lambda *_: None,
) -> list[Finding]:
    """Check the corpus and the committed shards, or those of these teachers and ids.

    Reads every byte: presence, sizes, checksums, shapes, finiteness, offsets into the text. A
    missing shard is no finding, as extraction may be unfinished.
    """
    chosen = [name for name in store.shard_ids if shard_ids is None or name in shard_ids]
    findings = []
    for shard_id in chosen:
        try:
            store.samples(shard_id)
        except KVDistillError as error:
            findings.append(Finding("", shard_id, str(error)))
    if teachers is None:
        teachers = store.teachers()
        for name in sorted(store.place.folders(store.paths.teachers) - set(teachers)):
            if store.place.folders(store.paths.shards(name)):
                path = store.place.shown(store.paths.teacher_manifest(name))
                findings.append(Finding(name, "", f"{path}: missing, or no file; shards need it"))
    for teacher in teachers:
        findings += _teacher_findings(store, teacher, chosen, progress)
    return findings


def _teacher_findings(
    store: KVStore, teacher: str, shard_ids: list[str], progress: OnShard
) -> Iterator[Finding]:
    try:
        store.transforms(teacher)
    except KVDistillError as error:
        yield Finding(teacher, "", str(error))
        return
    folder = store.paths.shards(teacher)
    for name in sorted(store.place.folders(folder) - set(store.shard_ids)):
        where = store.place.shown(folder / name)
        yield Finding(teacher, name, f"{where}: the plan has no such shard")
    for path in _derived_files(store, teacher):
        if not is_sound(path):
            yield Finding(teacher, path.name, f"{path}: damaged; it is made again when needed")
    committed = store.committed(teacher)
    for shard_id in (name for name in shard_ids if name in committed):
        progress(teacher, shard_id)
        try:
            store.place.forget(teacher, shard_id)
            with store.place.stored_shard(teacher, shard_id) as stored:
                for problem in _shard_problems(store, teacher, shard_id, stored):
                    yield Finding(teacher, shard_id, problem)
        except KVDistillError as error:
            yield Finding(teacher, shard_id, str(error))
        except Exception as error:  # a check reports whatever it meets, and goes on
            yield Finding(teacher, shard_id, f"cannot be read: {shorten(repr(error))}")


def _derived_files(store: KVStore, teacher: str) -> list[Path]:
    """Of the whole plan and of parts of it; of a bucket, what is cached."""
    paths = store.paths.statistics(teacher, "*"), store.paths.prototypes(teacher, "*")
    return [found for path in paths for found in sorted(path.parent.glob(path.name))]


def _shard_problems(store: KVStore, teacher: str, shard_id: str, folder: Path) -> Iterator[str]:
    commit = store.commit(teacher, shard_id)
    if faults := _shard_faults(folder, commit):
        yield from (f"{folder}/{fault}" for fault in faults)
        return
    opened = open_shard(folder, store.teacher(teacher), commit)
    tokens = opened.token_table()
    texts = opened.own_texts() or store.samples(shard_id)
    yield from _token_problems(tokens, texts, own_text=opened.manifest.own_text)
    where = f"teacher {teacher!r}, shard {shard_id}"
    for name, spec in opened.specs.items():
        check_finite(opened.data.read(name), spec, tokens, where)


def _shard_faults(folder: Path, commit: Commit) -> list[str]:
    """How a shard's files differ from its commit; a file that this does not list is one."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    unlisted = sorted(files - commit.files.keys() - {COMMIT})
    return [
        *file_faults(folder, commit.files),
        *(f"{name}: not listed in {COMMIT}" for name in unlisted),
    ]


def _token_problems(
    tokens: TokenTable, texts: tuple[Sample, ...], *, own_text: bool
) -> Iterator[str]:
    planned = tuple(sample.sample_id for sample in texts)
    if len(planned) != tokens.num_samples or (not own_text and tokens.sample_ids != planned):
        yield f"its samples are {tokens.sample_ids[:3]} …, but the plan's are {planned[:3]} …"
        return
    lengths = np.array([len(sample.text) for sample in texts], np.int64)
    limit = np.repeat(lengths, np.diff(tokens.sample_ptr))
    start, end = tokens.char_start, tokens.char_end
    bad = np.flatnonzero((start < 0) | (end < start) | (end > limit))
    if bad.size:
        sample_idx = int(np.searchsorted(tokens.sample_ptr, bad[0], side="right")) - 1
        yield (
            f"token {bad[0]} of sample {tokens.sample_ids[sample_idx]!r} covers characters "
            f"{start[bad[0]]} to {end[bad[0]]} of a text of {limit[bad[0]]}"
        )
    unknown = set(tokens.segment.tolist()) - {SEGMENT_SPECIAL, *SEGMENT_IDS.values()}
    if unknown:
        yield f"segment ids {sorted(unknown)} are unknown"


def repair_store(store: KVStore, findings: Iterable[Finding]) -> list[Path]:
    """Move shards and derived files with findings to the teacher's ``aside/``; their new paths.

    Raises:
        StoreError: a folder cannot be moved.
    """
    moved = []
    for teacher, name in sorted({(f.teacher, f.shard_id) for f in findings if f.shard_id}):
        if not teacher:
            continue  # the corpus
        derived = {path.name: path for path in _derived_files(store, teacher)}
        path = derived.get(name, store.paths.shards(teacher) / name)
        moved.append(store.place.set_aside(teacher, path, is_shard=name in store.shard_ids))
        store.forget(teacher, name)
    return [path for path in moved if path is not None]


def merge_stores(
    target: KVStore,
    sources: Sequence[KVStore],
    progress: OnShard = lambda *_: None,
    teachers: Collection[str] = (),
) -> int:
    """Copy every shard of the sources that ``target`` lacks, of all teachers or of those named;
    returns how many.

    Files are copied byte for byte and checked against their commit before publication. Plans and
    teachers are compared before the first copy. Statistics are sums over shards and so remain
    complete; what is derived from shards is derived anew. Records of attempts and failures, and
    shards moved aside, are not copied.

    Raises:
        StoreMismatch: another corpus, another plan, or a teacher of the same name extracted
            differently; names both sides.
        ShardCorrupt: a source's shard does not match its commit.
    """
    ours = target.manifest
    for source in sources:
        theirs = source.manifest
        if (ours.corpus_fingerprint, ours.shards) != (theirs.corpus_fingerprint, theirs.shards):
            raise StoreMismatch(
                f"{source.where} holds corpus {theirs.corpus_fingerprint[:12]} in "
                f"{len(theirs.shards)} shards, {target.where} holds "
                f"{ours.corpus_fingerprint[:12]} in {len(ours.shards)}; only stores over the same "
                "corpus, in the same shards, can be merged"
            )
    chosen = [(source, name) for source in sources for name in teachers or source.teachers()]
    for source, teacher in chosen:
        _copy_bases(source, target, teacher)
        add_teacher(target, source.teacher(teacher))
    copied = 0
    for source, teacher in chosen:
        add_teacher(target, source.teacher(teacher))  # with what is copied by now
        for shard_id in sorted(source.committed(teacher) - target.committed(teacher)):
            progress(teacher, shard_id)
            copied += _copy_files(source, target, teacher, shard_id)
    return copied


def copy_store(
    source: KVStore,
    path: Path | str,
    progress: OnShard = lambda *_: None,
    teachers: Collection[str] = (),
) -> tuple[KVStore, int]:
    """Copy a store, or some teachers of it, to another folder or bucket; continues what is there.

    Returns:
        The copy, and the number of shards that it lacked.

    Raises:
        StoreMismatch, ShardCorrupt: as ``merge_stores``.
        StoreError: the path holds something else, or cannot be read or written.
    """
    texts = ((shard_id, source.sample_text(shard_id)) for shard_id in source.shard_ids)
    target = planned(path, source.manifest, texts)
    copied = merge_stores(target, [source], progress, teachers)
    for name in teachers or source.teachers():
        _copy_derived(source, target, name)
    return target, copied


def _copy_derived(source: KVStore, target: KVStore, teacher: str) -> None:
    """Copy statistics and prototypes of a complete copy, lest its readers read every shard."""
    if not source.committed(teacher) or source.committed(teacher) != target.committed(teacher):
        return
    source.statistics(teacher)
    for there in _derived_files(source, teacher):
        target.place.keep(target.paths.teacher(teacher) / there.name, there.read_bytes())


def _copy_bases(source: KVStore, target: KVStore, teacher: str) -> None:
    """Copy what codec klt decodes with, before the manifest that states its checksum."""
    if source.transforms(teacher) and not target.has_teacher(teacher):
        content = source.paths.transform(teacher).read_bytes()
        target.place.create(target.paths.transform(teacher), content)


def _copy_files(source: KVStore, target: KVStore, teacher: str, shard_id: str) -> bool:
    commit = source.commit(teacher, shard_id)
    # The same under settings spelt otherwise:
    fingerprint = target.teacher(teacher).extraction_fingerprint
    copied = commit.model_copy(update={"extraction_fingerprint": fingerprint})
    parent = target.place.staging(teacher)
    with source.place.stored_shard(teacher, shard_id, parent) as folder:
        if faults := _shard_faults(folder, commit):
            origin = source.place.shown(source.paths.shard(teacher, shard_id))
            raise ShardCorrupt(f"{origin}/{faults[0]}; run `kvdistill verify {source.where}`")
        return target.place.publish_shard(folder, copied)


def convert_store(
    source: KVStore, path: Path | str, backend: Backend, progress: OnShard = lambda *_: None
) -> KVStore:
    """Copy a store with every teacher's shards in another backend; returns the new store.

    Raises:
        StoreError: source and target are the same folder, or the target cannot be written.
        StoreMismatch: the target holds another corpus or another extraction.
        ShardCorrupt: a source shard is damaged; those before it are in the target.
    """
    if local_folder(path).resolve() == source.paths.root.resolve():
        raise StoreError(f"{path}: a store cannot be converted onto itself; name another path")
    plan = source.manifest.shards
    target = create(
        path, [Shard(p.shard_id, p.first_sample, source.samples(p.shard_id)) for p in plan]
    )
    for teacher in source.teachers():
        manifest = source.teacher(teacher).model_copy(update={"backend": backend})
        _copy_bases(source, target, teacher)
        add_teacher(target, manifest)
        lacking = source.committed(teacher) - target.committed(teacher)
        for shard_id in (shard_id for shard_id in source.shard_ids if shard_id in lacking):
            progress(teacher, shard_id)
            commit = source.commit(teacher, shard_id)
            publish_shard(
                target,
                teacher,
                shard_id,
                source.read_shard(teacher, shard_id),
                source.shard_statistics(teacher, shard_id),
                seconds=commit.seconds,
                attempt=commit.attempt,
            )
    return target


def remove_teacher(store: KVStore, teacher: str) -> None:
    """Delete everything of one teacher; see ``Place.remove_teacher``.

    Raises:
        ShardNotFound: no such teacher; names those that exist.
        StoreError: the store is read-only.
    """
    store.teacher(teacher)
    store.place.remove_teacher(teacher)
    store.forget(teacher)
