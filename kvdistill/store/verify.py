"""Checking a store: presence, counts, checksums, shapes, finiteness, offsets.

``verify`` reports everything that it finds instead of stopping at the first; ``repair`` moves
bad shards aside, whole, so that extraction makes just those again and nothing is lost.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvdistill.corpus.samples import Sample
from kvdistill.errors import KVDistillError, StoreError
from kvdistill.store.commit import file_record
from kvdistill.store.format import COMMIT
from kvdistill.store.manifest import Commit
from kvdistill.store.open_shard import OpenedShard, open_shard
from kvdistill.store.reader import KVStore
from kvdistill.store.shard import TokenTable
from kvdistill.store.writer import check_finite
from kvdistill.types import SEGMENT_IDS, SEGMENT_SPECIAL

Progress = Callable[[str, str], None]


@dataclass(frozen=True)
class Finding:
    """Something wrong. ``shard_id`` is empty for a teacher, ``teacher`` for the corpus."""

    teacher: str
    shard_id: str
    problem: str


def verify_store(
    store: KVStore,
    teachers: Iterable[str] | None = None,
    shard_ids: Collection[str] | None = None,
    progress: Progress | None = None,
) -> list[Finding]:
    """Check the corpus and the committed shards, or those of these teachers and ids.

    Reads every byte. A missing shard is not a finding: extraction may simply not be done.
    ``progress`` is called with teacher and shard before each.
    """
    chosen = [name for name in store.shard_ids if shard_ids is None or name in shard_ids]
    findings = list(_corpus_findings(store, chosen))
    for teacher in store.teachers() if teachers is None else teachers:
        findings += _teacher_findings(store, teacher, chosen, progress)
    return findings


def repair_store(store: KVStore, findings: Iterable[Finding]) -> list[Path]:
    """Move the shards with findings aside; returns where they are now.

    Raises:
        StoreError: a folder cannot be moved.
    """
    moved = []
    for teacher, shard_id in sorted({(f.teacher, f.shard_id) for f in findings}):
        folder = store.paths.shards(teacher) / shard_id if teacher and shard_id else None
        if folder is None or not folder.exists():
            continue
        moved.append(_move_aside(folder, store.paths.aside(teacher)))
        store.forget(teacher, shard_id)
    return moved


def _move_aside(folder: Path, aside: Path) -> Path:
    aside.mkdir(exist_ok=True)
    attempt = 0
    while True:
        target = aside / f"{folder.name}.{attempt}"
        try:
            return folder.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise StoreError(f"cannot move {folder} to {target}: {error.strerror}") from error
            attempt += 1


def _corpus_findings(store: KVStore, shard_ids: list[str]) -> Iterator[Finding]:
    for shard_id in shard_ids:
        try:
            store.samples(shard_id)
        except KVDistillError as error:
            yield Finding("", shard_id, str(error))


def _teacher_findings(
    store: KVStore, teacher: str, shard_ids: list[str], progress: Progress | None
) -> Iterator[Finding]:
    try:
        store.teacher(teacher)
    except KVDistillError as error:
        yield Finding(teacher, "", str(error))
        return
    folder = store.paths.shards(teacher)
    found = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    strangers = found - set(store.shard_ids)
    for name in sorted(strangers):
        yield Finding(teacher, name, f"{folder / name}: the plan has no such shard")
    committed = store.committed(teacher)
    for shard_id in (name for name in shard_ids if name in committed):
        if progress is not None:
            progress(teacher, shard_id)
        for problem in _shard_problems(store, teacher, shard_id):
            yield Finding(teacher, shard_id, problem)


def _shard_problems(store: KVStore, teacher: str, shard_id: str) -> Iterator[str]:
    folder = store.paths.shard(teacher, shard_id)
    try:
        commit = store.commit(teacher, shard_id)
    except KVDistillError as error:
        yield str(error)
        return
    broken = list(_file_problems(folder, commit))
    yield from broken
    if broken:
        return
    try:
        opened = open_shard(folder, store.teacher(teacher), commit)
        tokens = opened.token_table()
        texts = opened.own_texts() or store.samples(shard_id)
        yield from _token_problems(tokens, texts, own_text=opened.manifest.own_text)
        _check_arrays(opened, tokens)
    except KVDistillError as error:
        yield str(error)


def _file_problems(folder: Path, commit: Commit) -> Iterator[str]:
    found = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() != COMMIT
    }
    for name in sorted(commit.files.keys() - found.keys()):
        yield f"{folder / name}: missing"
    for name, path in found.items():
        record = commit.files.get(name)
        if record is None:
            yield f"{path}: not listed in {COMMIT}"
        elif path.stat().st_size != record.size_bytes:
            yield f"{path}: {path.stat().st_size} bytes, but {record.size_bytes} were committed"
        elif file_record(path) != record:
            yield f"{path}: its checksum is not the committed one"


def _token_problems(
    tokens: TokenTable, texts: tuple[Sample, ...], *, own_text: bool
) -> Iterator[str]:
    asked = tuple(sample.sample_id for sample in texts)
    if not own_text and tokens.sample_ids != asked:
        yield f"its samples are {tokens.sample_ids[:3]} …, but the plan's are {asked[:3]} …"
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
    known = [SEGMENT_SPECIAL, *SEGMENT_IDS.values()]
    if not np.isin(tokens.segment, known).all():
        yield f"segment ids {sorted(set(tokens.segment.tolist()) - set(known))} are unknown"


def _check_arrays(opened: OpenedShard, tokens: TokenTable) -> None:
    where = f"teacher {opened.manifest.name!r}, shard {opened.commit.shard_id}"
    for name, spec in opened.specs.items():
        check_finite(opened.data.read(name), spec, tokens, where)
