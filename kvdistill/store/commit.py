"""Files that survive a crash: written aside, flushed to disk, then renamed into place.

A reader must see a whole thing or none. ``rename`` gives that within one file system, provided
that the content reached the disk before the name did, hence the fsyncs.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import xxhash

from kvdistill.errors import ShardCorrupt, StoreError
from kvdistill.store.format import COMMIT
from kvdistill.store.manifest import Commit, FileRecord


@contextmanager
def staging_folder(parent: Path, stem: str) -> Iterator[Path]:
    """A fresh folder under ``parent`` to build something in; removed on the way out.

    Raises:
        StoreError: the folder cannot be created, or writing in it failed (disk full,
            read-only); says which, and that nothing was published.
    """
    folder = parent / f"{stem}.{uuid.uuid4().hex[:12]}"
    try:
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"{folder}: {error.strerror or error}; nothing was published, and what was there "
            "before is untouched. Free space or fix permissions, then run the same command again"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish_folder(folder: Path, final: Path) -> bool:
    """Flush ``folder`` and rename it to ``final``; False if something is already there."""
    for path in sorted(folder.rglob("*"), reverse=True):
        flush(path)
    flush(folder)
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    flush(final.parent)
    return True


def publish_file(file: Path, final: Path) -> bool:
    """Flush ``file`` and link it to ``final``; False if something is already there.

    For a folder that may already hold other things, where a rename of the folder would be refused.
    """
    flush(file)
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        final.hardlink_to(file)
    except FileExistsError:
        return False
    flush(final.parent)
    return True


def flush(path: Path) -> None:
    """Force one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_READ_BYTES: Final = 1 << 22


REMEDY: Final = "run `kvdistill verify --repair`, then extract again"


def file_record(path: Path) -> FileRecord:
    """Size and checksum of one file, read in pieces."""
    digest = xxhash.xxh3_64()
    size_bytes = 0
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
            size_bytes += len(piece)
    return FileRecord(size_bytes=size_bytes, xxh3=digest.hexdigest())


def folder_records(folder: Path) -> dict[str, FileRecord]:
    """Records of every file under ``folder`` but the commit itself, by relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): file_record(path)
        for path in files
        if path.name != COMMIT
    }


def check_size(folder: Path, name: str, commit: Commit) -> None:
    """Refuse a file that is missing or has another size than committed.

    Raises:
        ShardCorrupt: names the file, both sizes and the remedy.
    """
    record = commit.files.get(name)
    if record is None:
        raise ShardCorrupt(f"{folder / name}: not listed in {COMMIT}; {REMEDY}")
    path = folder / name
    found = path.stat().st_size if path.is_file() else None
    if found != record.size_bytes:
        state = "missing" if found is None else f"{found} bytes"
        raise ShardCorrupt(
            f"{path}: {state}, but {record.size_bytes} bytes were committed; {REMEDY}"
        )


def checked_bytes(folder: Path, name: str, commit: Commit) -> bytes:
    """A small file's content, after its size and checksum were compared with the committed ones.

    Raises:
        ShardCorrupt: names the file and the remedy.
    """
    check_size(folder, name, commit)
    content = (folder / name).read_bytes()
    if xxhash.xxh3_64_hexdigest(content) != commit.files[name].xxh3:
        raise ShardCorrupt(f"{folder / name}: its checksum is not the committed one; {REMEDY}")
    return content


# MERGED-DOC store.integrity
# Sizes and checksums of a shard's files (XXH3-64: faster than the disk, not cryptographic).
