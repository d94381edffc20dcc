"""Where a store is kept, behind one interface: ``Place`` is a folder, ``Bucket`` a bucket.

All paths are those of ``StorePaths``: in the store's own folder, or in the cache of a bucket.
``open_place`` chooses once; nothing above asks which it is.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvdistill.errors import StoreError
from kvdistill.store.commit import (
    MAX_DOCUMENT_BYTES,
    publish_file,
    publish_folder,
    read_regular,
    replace_file,
    staging_folder,
)
from kvdistill.store.format import COMMIT, StorePaths, folder_names
from kvdistill.store.manifest import Commit, StoreManifest


class Place:
    """A store's folder, and what ``Bucket`` overrides. ``location`` is what ``open_place`` takes in
    any process of this machine. What cannot be read or written is a ``StoreError`` of one line.
    """

    def __init__(self, root: Path) -> None:
        self.paths = StorePaths(root)
        self.location: Path | str = root.absolute()

    def shown(self, path: Path) -> str:
        """A path, or the URL of its object, for messages."""
        return str(path)

    def read(self, path: Path) -> bytes | None:
        """A document; None if there is none."""
        try:
            return read_regular(path, MAX_DOCUMENT_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def has(self, path: Path) -> bool:
        """Whether there is such a document."""
        return path.is_file()

    def folders(self, path: Path) -> set[str]:
        """Names of the folders in ``path`` that may be ours."""
        return folder_names(path)

    def refresh(self, path: Path) -> bool:
        """Whether ``path`` was only a copy of a document, and now is a new one."""
        return False

    def create(self, path: Path, content: bytes) -> bool:
        """Create a document, whole; False if there is one."""
        # A file and not a folder is published: array tasks may already have created the teacher's
        # folder for their heartbeats.
        with staging_folder(self.paths.root / "tmp", path.name) as folder:
            (folder / path.name).write_bytes(content)
            return publish_file(folder / path.name, path)

    def keep(self, path: Path, content: bytes) -> None:
        """Create or replace a document, whole."""
        replace_file(path, content)

    def publish_plan(self, plan: StoreManifest, texts: Iterable[tuple[str, bytes]]) -> None:
        """Publish a store without teachers where there is nothing: plan, and samples by shard."""
        root = self.paths.root
        if root.exists() and not (root.is_dir() and not any(root.iterdir())):
            raise StoreError(f"{root} exists and is not a kvdistill store; choose another path")
        with staging_folder(root.absolute().parent, f".{root.name}") as folder:
            staged = StorePaths(folder)
            staged.corpus.mkdir()
            staged.teachers.mkdir()
            for shard_id, text in texts:
                staged.samples(shard_id).write_bytes(text)
            staged.manifest.write_text(plan.to_json(), encoding="utf-8")
            publish_folder(folder, root)

    def committed(self, teacher: str, shard_ids: Collection[str]) -> frozenset[str]:
        """Those of these shards that are committed. Lists one folder, reads no file."""
        return frozenset(self.folders(self.paths.shards(teacher)).intersection(shard_ids))

    def commit(self, teacher: str, shard_id: str) -> bytes | None:
        """A shard's ``COMMIT.json`` as it is stored; None if there is none."""
        return self.read(self.paths.shard(teacher, shard_id) / COMMIT)

    def open_shard(self, teacher: str, shard_id: str) -> tuple[Path, Callable[[], None]]:
        """A committed shard's folder, which stays until the second is called."""
        return self.paths.shard(teacher, shard_id), lambda: None

    @contextmanager
    def stored_shard(
        self, teacher: str, shard_id: str, parent: Path | None = None
    ) -> Iterator[Path]:
        """A committed shard's files as they are stored; copied to ``parent`` if it is given."""
        origin = self.paths.shard(teacher, shard_id)
        if parent is None:
            yield origin
            return
        with staging_folder(parent, shard_id) as folder:
            shutil.copytree(origin, folder, dirs_exist_ok=True)
            yield folder

    def staging(self, teacher: str) -> Path | None:
        """Where a folder has to be for ``publish_shard``; None if anywhere."""
        return self.paths.temporary(teacher)

    def publish_shard(self, folder: Path, commit: Commit) -> bool:
        """Commit the files in a folder, which becomes the shard; False if there is one."""
        (folder / COMMIT).write_text(commit.to_json(), encoding="utf-8")
        return publish_folder(folder, self.paths.shard(commit.teacher, commit.shard_id))

    def set_aside(self, teacher: str, path: Path, *, is_shard: bool) -> Path | None:
        """Take a shard or a derived file out of the store; where it is now, None if nowhere."""
        aside, attempt = self.paths.aside(teacher), 0
        while path.exists():
            aside.mkdir(exist_ok=True)
            target = aside / f"{path.name}.{attempt}"
            try:
                return path.rename(target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise StoreError(f"cannot move {path} to {target}: {error.strerror}") from error
                attempt += 1
        return None

    def remove_teacher(self, teacher: str) -> None:
        """Delete a teacher: renamed into ``tmp/`` first, so readers see all of it or none."""
        with staging_folder(self.paths.root / "tmp", teacher) as folder:
            self.paths.teacher(teacher).rename(folder / teacher)

    def forget(self, teacher: str, shard_id: str | None = None) -> None:
        """Drop what is cached of a teacher's shards, or of one of them."""
