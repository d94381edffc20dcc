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

from kvdistill.errors import StoreError


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
