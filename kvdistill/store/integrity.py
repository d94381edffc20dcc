"""Sizes and checksums of a shard's files (XXH3-64: faster than the disk, not cryptographic)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import xxhash

from kvdistill.errors import ShardCorrupt
from kvdistill.store.layout import COMMIT
from kvdistill.store.manifest import Commit, FileRecord

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
