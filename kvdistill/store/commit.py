"""Crash-safe publication of files and folders, and the checksums that prove them complete.

Everything is written into a staging folder, flushed to disk, then renamed into place. Within one
file system a rename is atomic: readers see the whole or nothing, also after a crash, provided
that the content reaches the disk before the name does, hence the fsyncs.

Records of files are sizes and XXH3-64 checksums: faster than any disk, not cryptographic.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import xxhash

from kvdistill.errors import ShardCorrupt, StoreError
from kvdistill.provenance import machine_identity, process_start
from kvdistill.store.format import COMMIT
from kvdistill.store.manifest import Commit, FileRecord

REMEDY: Final = "run `kvdistill verify --repair`, then extract again"

MAX_DOCUMENT_BYTES: Final = 1 << 28
"""Of a JSON document or a text file of a store."""

_READ_BYTES: Final = 1 << 22

_STAGED: Final = re.compile(r"(?:(\.[0-9a-f]{8})-(\d+))?\.(?:[0-9a-f]{12}|[0-9a-f]{32})(?:\.tmp)?$")


def staged_name(final: str) -> str:
    """A unique name for what becomes ``final``; states the process that writes it."""
    machine = xxhash.xxh32_hexdigest(machine_identity().encode())
    return f"{final}.{machine}-{os.getpid()}.{uuid.uuid4().hex[:12]}"


def sweep(folder: Path, prefix: str = "") -> None:
    """Remove what killed writers left staged in a folder, and nothing of a living one.

    What another machine staged counts as abandoned once it has not been written to for a day.
    """
    here = staged_name("").split("-")[0]
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        found = _STAGED.search(path.name) if path.name.startswith(prefix) else None
        if found is None:
            continue
        if found[1] == here:
            abandoned = process_start(int(found[2])) is None
        else:
            times = [each.lstat().st_mtime for each in (path, *path.rglob("*"))]
            abandoned = time.time() - max(times) > 86_400
        if abandoned:
            discard(path)


def discard(path: Path) -> None:
    """Delete a staged file or folder, unless its writer is alive after all and publishes it first.

    Renamed before it is emptied: rmtree follows an open folder wherever it is renamed to, and
    would delete the files of a shard that its writer publishes meanwhile.
    """
    doomed = path.with_name(staged_name(path.name.partition(".")[0]))
    try:
        path.rename(doomed)
    except FileNotFoundError:
        return
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        doomed.unlink(missing_ok=True)


@contextmanager
def staging_folder(parent: Path, stem: str) -> Iterator[Path]:
    """A new folder under ``parent`` to build something in; removed on exit.

    Raises:
        StoreError: the folder cannot be created, or writing in it failed (disk full, read-only).
    """
    folder = parent / staged_name(stem)
    try:
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"{folder}: {error.strerror or error}; nothing was published and nothing existing was "
            "changed: free space or fix permissions, then run the same command again"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish_folder(folder: Path, final: Path) -> bool:
    """Flush ``folder`` and rename it to ``final``; False if something is already there."""
    _flush_tree(folder)
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    flush(final.parent)
    return True


def replace_folder(folder: Path, final: Path) -> None:
    """Flush ``folder`` and put it in the place of ``final``, whose open files stay readable."""
    _flush_tree(folder)
    earlier = final.with_name(staged_name(final.name))
    with suppress(FileNotFoundError):
        final.rename(earlier)
    folder.rename(final)
    flush(final.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def publish_file(file: Path, final: Path) -> bool:
    """Flush ``file`` and link it to ``final``; False if something is already there.

    For a target folder that may already hold other files, onto which no folder can be renamed.
    """
    flush(file)
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        final.hardlink_to(file)
    except FileExistsError:
        return False
    flush(final.parent)
    return True


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a small file in one step: readers see its old content or the new one, whole.

    Raises:
        StoreError: the disk is full, or the folder cannot be written.
    """
    staged = path.with_name(f"{staged_name(f'.{path.name}')}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(staged)
        staged.replace(path)
        flush(path.parent)
    except OSError as error:
        raise StoreError(
            f"{path}: {error.strerror or error}; nothing existing was changed: free space or fix "
            "permissions, then run the same command again"
        ) from error
    finally:
        with suppress(OSError):
            staged.unlink()


def _flush_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Fsync one file or folder; a file that a library made private gets the umask's mode."""
    if path.stat().st_mode & 0o7777 == 0o600:  # safetensors writes such
        os.umask(mask := os.umask(0o077))
        path.chmod(0o666 & ~mask)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_record(path: Path) -> FileRecord:
    """Size and checksum of one file."""
    digest = xxhash.xxh3_64()
    size_bytes = 0
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
            size_bytes += len(piece)
    return FileRecord(size_bytes=size_bytes, xxh3=digest.hexdigest())


def folder_records(folder: Path) -> dict[str, FileRecord]:
    """Records of every file under ``folder`` except the commit, by relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): file_record(path)
        for path in files
        if path.name != COMMIT
    }


def read_regular(path: Path, limit: int) -> bytes:
    """A file's content, if it is a regular file of at most ``limit`` bytes.

    A store may be somebody else's: its files can be pipes, devices or of any size.

    Raises:
        OSError: it cannot be opened; FileNotFoundError if there is none.
        StoreError: it is no regular file, or larger.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
            what = f"{found.st_size:,} bytes" if stat.S_ISREG(found.st_mode) else "no regular file"
            raise StoreError(f"{path}: {what}, expected a file of at most {limit:,} bytes")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def commit_folder(folder: Path) -> None:
    """Flush every file of a folder and list them in ``COMMIT.json``, which one rename publishes.

    Raises:
        StoreError: the list cannot be written.
    """
    _flush_tree(folder)
    files = {name: record.model_dump() for name, record in folder_records(folder).items()}
    replace_file(folder / COMMIT, json.dumps({"files": files}, indent=1))


def folder_fault(folder: Path) -> str | None:
    """How a folder differs from its ``COMMIT.json``, in one line; None if it does not."""
    if not (folder / COMMIT).is_file():
        return f"it has no {COMMIT}: saving it was interrupted, or an older version saved it"
    try:
        records = json.loads((folder / COMMIT).read_bytes())["files"]
        return next(file_faults(folder, records), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{COMMIT} is damaged, or a file that it lists vanished"


def file_faults(folder: Path, records: Mapping[str, FileRecord | dict[str, Any]]) -> Iterator[str]:
    """How files of a folder differ from their records: one line each, their names first."""
    for name, record in records.items():
        path, wanted = folder / name, FileRecord.model_validate(record)
        if not path.is_file():
            yield f"{name} is missing"
        elif (size_bytes := path.stat().st_size) != wanted.size_bytes:
            yield f"{name} has {size_bytes:,} bytes, but {wanted.size_bytes:,} were written"
        elif file_record(path) != wanted:
            yield f"{name} does not match its checksum"


def check_size(folder: Path, name: str, commit: Commit) -> None:
    """Refuse a file that is missing or does not have the committed size.

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
            f"{path}: {state}, expected the committed {record.size_bytes} bytes; {REMEDY}"
        )


def checked_bytes(folder: Path, name: str, commit: Commit) -> bytes:
    """A small file's content, verified against its committed size and checksum.

    Raises:
        ShardCorrupt: names the file and the remedy.
    """
    check_size(folder, name, commit)
    content = read_regular(folder / name, MAX_DOCUMENT_BYTES)
    if xxhash.xxh3_64_hexdigest(content) != commit.files[name].xxh3:
        raise ShardCorrupt(f"{folder / name}: does not match its committed checksum; {REMEDY}")
    return content
