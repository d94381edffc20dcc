"""A store in a bucket (S3, GCS, Azure, a folder by ``file://``), and its cache on this machine.

Objects have the layout of a local store, so a copied folder is a valid bucket store and vice versa.
A shard is committed when its ``COMMIT.json`` exists: it is put last, under the condition that there
is none, so of two uploads the first wins. What a killed upload left is overwritten by the next.

Small documents are read from the bucket whenever they are needed. A shard is downloaded whole,
compared with its commit, and published in the cache by one rename:

    CACHE/<store>/teachers/<teacher>/shards/<shard>.<checksum of its commit>/
    CACHE/<store>/teachers/<teacher>/locks/         two empty files per shard

One lock is shared from before a shard is looked for until it is closed, so no process evicts what
another reads; the other is exclusive while it is downloaded, so the ranks of a node do so once.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeVar

import xxhash

from kvdistill.errors import ConfigError, MissingExtra, ShardCorrupt, StoreError, StoreNotFound
from kvdistill.store.commit import (
    MAX_DOCUMENT_BYTES,
    discard,
    file_faults,
    publish_folder,
    replace_file,
    staging_folder,
    sweep,
)
from kvdistill.store.format import COMMIT, NAME
from kvdistill.store.manifest import Commit, StoreManifest
from kvdistill.store.place import Place
from kvdistill.text import shorten

T = TypeVar("T")

CACHE_GB: Final = "100"

_PART_BYTES: Final = 1 << 23

_THREADS: Final = 16

_RETRIES: Final = {"max_retries": 6, "retry_timeout": timedelta(seconds=120)}


def is_url(location: Path | str) -> bool:
    """Whether a store's location is in a bucket: ``s3://bucket/prefix``; no path has ``://``."""
    return "://" in str(location)


def cache_folder() -> Path:
    """``KVDISTILL_CACHE``, or ``kvdistill`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("KVDISTILL_CACHE") or Path(base, "kvdistill")).absolute()


def cache_bytes() -> float:
    """The cache's bound, ``KVDISTILL_CACHE_GB``; ConfigError unless it is a positive number."""
    given = os.environ.get("KVDISTILL_CACHE_GB") or CACHE_GB
    try:
        bound = float(given)
    except ValueError:
        bound = 0.0
    if not bound > 0:
        raise ConfigError(f"KVDISTILL_CACHE_GB is {given!r}; set it to gigabytes above 0")
    return bound * 1e9


def local_folder(location: Path | str) -> Path:
    """The folder of a local store; of one in a bucket, its folder in the cache."""
    if not is_url(location):
        return Path(location)
    url = str(location).rstrip("/")
    name = re.sub(r"[^A-Za-z0-9.]+", "-", url)[-80:].strip("-.")
    return cache_folder() / f"{name}-{xxhash.xxh3_64_hexdigest(url.encode())[:8]}"


class Bucket(Place):
    """The objects of one store, by the paths that they would have in its folder in the cache.

    Safe to share between threads, not with forked children. Every method raises a ``StoreError``
    of one line where access is refused or the network fails.
    """

    def __init__(self, url: str, *, new: bool = False) -> None:
        super().__init__(local_folder(url))
        self.location = self.url = url.rstrip("/")
        self._commits: dict[tuple[str, str], bytes] = {}
        self._pid = os.getpid()
        self._api, self._objects = self._connect(new)

    def _connect(self, new: bool) -> tuple[Any, Any]:
        """The client, and what it takes as the place of all objects."""
        return _client(self.url, mkdir=new)

    def shown(self, path: Path) -> str:
        """The URL of what has this path in the cache."""
        return f"{self.url}/{self._key(path)}".removesuffix("/.")

    def read(self, path: Path) -> bytes | None:
        """From the bucket, whatever the cache has."""

        def get() -> bytes:
            found = self._api.get(self._objects, self._key(path))
            if found.meta["size"] > MAX_DOCUMENT_BYTES:
                raise StoreError(f"{self.shown(path)}: {found.meta['size']:,} bytes, no document")
            return bytes(found.bytes())

        return self._call(get, None)

    def has(self, path: Path) -> bool:
        """Reads it."""
        return self.read(path) is not None

    def folders(self, path: Path) -> set[str]:
        """Names of what would be folders."""
        found = self._call(lambda: self._api.list_with_delimiter(self._objects, self._key(path)))
        names = {key.rpartition("/")[2] for key in found["common_prefixes"]}
        return set(filter(NAME.fullmatch, names))

    def refresh(self, path: Path) -> bool:
        """Copies a document to the cache, if there is one."""
        if (content := self.read(path)) is not None:
            replace_file(path, content)
        return content is not None

    def keep(self, path: Path, content: bytes) -> None:
        """In the bucket and in the cache."""
        replace_file(path, content)
        self.put(path, content)

    def committed(self, teacher: str, shard_ids: Collection[str]) -> frozenset[str]:
        """Reads the commits that are not known yet: a folder may be half uploaded."""
        return frozenset(self._commits_of(teacher, super().committed(teacher, shard_ids)))

    def commit(self, teacher: str, shard_id: str) -> bytes | None:
        """Is read once."""
        return self._commits_of(teacher, [shard_id]).get(shard_id)

    def _commits_of(self, teacher: str, shard_ids: Collection[str]) -> dict[str, bytes]:
        """The commits of those shards that have one; each is read once."""
        unknown = [i for i in shard_ids if (teacher, i) not in self._commits]
        paths = [self.paths.shard(teacher, shard_id) / COMMIT for shard_id in unknown]
        for shard_id, content in zip(unknown, self._each(self.read, paths), strict=True):
            if content is not None:
                self._commits[teacher, shard_id] = content
        known = ((shard_id, self._commits.get((teacher, shard_id))) for shard_id in shard_ids)
        return {shard_id: content for shard_id, content in known if content is not None}

    def forget(self, teacher: str, shard_id: str | None = None) -> None:
        """Commits, and shards in the cache that no process has open."""
        for key in list(self._commits):
            if key == (teacher, shard_id or key[1]):
                self._commits.pop(key, None)
        for copy in self.paths.shards(teacher).glob(f"{shard_id or '*'}.*"):
            discard_unused(copy)

    def put(self, path: Path, content: bytes | Path) -> Any:
        """Create or replace an object, from a file if ``content`` is one; returns its tag."""
        return self._call(lambda: self._api.put(self._objects, self._key(path), content)["e_tag"])

    def remove_teacher(self, teacher: str) -> None:
        """Its manifest first, without which it is no teacher."""
        self._remove(self.paths.teacher_manifest(teacher))
        self._remove(self.paths.teacher(teacher))

    def set_aside(self, teacher: str, path: Path, *, is_shard: bool) -> Path:
        """Removes a shard's commit, or all of what is none."""
        path = path / COMMIT if is_shard else path
        self._remove(path)
        return path

    def _remove(self, path: Path) -> None:
        """Delete a document, or everything below a folder."""
        keys = [self._key(found) for found in self._listed(path) or [path]]
        self._call(lambda: self._api.delete(self._objects, keys), None)

    def create(self, path: Path, content: bytes) -> bool:
        """Refuses a bucket without conditional writes."""

        def put() -> bool:
            try:
                self._api.put(self._objects, self._key(path), content, mode="create")
            except self._api.exceptions.AlreadyExistsError:
                return False
            return True

        if not self._call(put):
            return False
        if self._call(put):
            raise StoreError(
                f"{self.url}: the bucket ignores the condition If-None-Match, so two uploads could "
                "mix; use an object store with conditional writes"
            )
        return True

    def publish_plan(self, plan: StoreManifest, texts: Iterable[tuple[str, bytes]]) -> None:
        """The first of two wins."""
        files = {self.paths.samples(shard_id): text for shard_id, text in texts}
        self._publish(files, self.paths.manifest, plan.to_json().encode())

    def _publish(self, files: Mapping[Path, Path | bytes], last: Path, content: bytes) -> bool:
        """Put files, then create ``last``, which commits them; False if another upload was faster.

        A slower upload may have overwritten files meanwhile, so they are put again where they are
        not ours; its last file may still do so afterwards, which every reader's checksums expose.
        """
        put = self._each(lambda path: self.put(path, files[path]), files)
        tags = dict(zip(files, put, strict=True))
        if not self.create(last, content):
            return False
        now = self._listed(last.parent)
        for path in (path for path in files if now.get(path, {}).get("e_tag") != tags[path]):
            self.put(path, files[path])
        return True

    def staging(self, teacher: str) -> None:
        """Files are uploaded from where they are."""

    def publish_shard(self, folder: Path, commit: Commit) -> bool:
        """Raises ShardCorrupt if a file is not what its commit says; nothing is uploaded then."""
        final = self.paths.shard(commit.teacher, commit.shard_id)
        if self.commit(commit.teacher, commit.shard_id) is not None:
            return False
        _refuse_faults(folder, commit, str(folder))
        files = {final / name: folder / name for name in commit.files}
        return self._publish(files, final / COMMIT, commit.to_json().encode())

    @contextmanager
    def stored_shard(
        self, teacher: str, shard_id: str, parent: Path | None = None
    ) -> Iterator[Path]:
        """Always a new copy, compared with its commit, never the cache's own."""
        with staging_folder(parent or self.paths.temporary(teacher), shard_id) as folder:
            self._download(teacher, shard_id, folder)
            yield folder

    def _download(self, teacher: str, shard_id: str, folder: Path) -> None:
        """Copy a committed shard into an empty folder, and compare it with its commit.

        Raises:
            ShardCorrupt: an object is missing, truncated or another one.
        """
        origin = self.paths.shard(teacher, shard_id)
        content = self._commits_of(teacher, [shard_id])[shard_id]
        commit = Commit.from_json(content, self.shown(origin / COMMIT))
        listed = self._listed(origin)
        for name, record in commit.files.items():
            found = listed.get(origin / name, {"size": "no"})["size"]
            if found != record.size_bytes or {"..", "/"} & {*PurePosixPath(name).parts}:
                raise ShardCorrupt(
                    f"{self.shown(origin / name)}: {found} bytes, expected the committed "
                    f"{record.size_bytes}; `kvdistill verify --repair` lets it be pushed again"
                )
        self._get_files(origin, {n: file.size_bytes for n, file in commit.files.items()}, folder)
        _refuse_faults(folder, commit, self.shown(origin))
        (folder / COMMIT).write_bytes(content)

    def _get_files(self, origin: Path, sizes: Mapping[str, int], folder: Path) -> None:
        """Copy files below ``origin`` to a folder."""
        parts = []
        for name, size in sizes.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
            starts = range(0, size, _PART_BYTES)
            parts += [(name, start, min(_PART_BYTES, size - start)) for start in starts]

        def get(part: tuple[str, int, int]) -> None:
            name, start, length = part
            span = {"start": start, "length": length}
            key = self._key(origin / name)
            read = self._call(lambda: self._api.get_range(self._objects, key, **span), b"")
            with (folder / name).open("r+b") as file:
                os.pwrite(file.fileno(), read, start)

        self._each(get, parts)

    def open_shard(self, teacher: str, shard_id: str) -> tuple[Path, Callable[[], None]]:
        """In the cache: downloads what is missing, and evicts what exceeds the bound.

        Raises:
            ShardCorrupt: as ``_download``.
        """
        version = xxhash.xxh3_64_hexdigest(self._commits_of(teacher, [shard_id])[shard_id])
        folder = self.paths.shard(teacher, f"{shard_id}.{version}")
        lock = _open_lock(folder)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if not folder.is_dir():
                self._download_once(teacher, shard_id, folder)
            os.utime(folder)
        except BaseException:
            os.close(lock)
            raise
        return folder, partial(os.close, lock)

    def _download_once(self, teacher: str, shard_id: str, folder: Path) -> None:
        """Download a shard into the cache unless another process or thread is faster."""
        # Not the lock that is kept: two that share it would wait for each other to close the shard.
        lock = _open_lock(folder.with_name(f"{folder.name}.download"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.is_dir():
                return
            sweep(self.paths.temporary(teacher))
            with self.stored_shard(teacher, shard_id) as staged:
                publish_folder(staged, folder)
            trim_cache()
        finally:
            os.close(lock)

    def _key(self, path: Path) -> str:
        return path.relative_to(self.paths.root).as_posix()

    def _listed(self, folder: Path) -> dict[Path, Any]:
        """Size and tag of every object below ``folder``."""
        prefix = None if folder == self.paths.root else self._key(folder)
        pages = self._call(lambda: list(self._api.list(self._objects, prefix)))
        return {self.paths.root / meta["path"]: meta for page in pages for meta in page}

    def _each(self, work: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
        """``work`` of every item in threads, in order; the first error is raised."""
        pool = ThreadPoolExecutor(_THREADS, "kvdistill-bucket")
        try:
            return list(pool.map(work, items))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _call(self, request: Callable[[], T], *missing: Any) -> T:
        """What a request returns, or ``missing`` where there is no such object or range."""
        if os.getpid() != self._pid:
            raise StoreError(f"{self.url}: a forked process cannot read a bucket; spawn it instead")
        try:
            return request()
        except (FileNotFoundError, self._api.exceptions.BaseError) as error:
            absent = isinstance(error, FileNotFoundError) or "InvalidRange" in str(error)
            if missing and absent and not _NO_BUCKET.search(str(error)):
                return missing[0]  # type: ignore[no-any-return]
            raise StoreError(f"{self.url}: {_cause(error)}") from error


_NO_BUCKET: Final = re.compile(r"NoSuchBucket|ContainerNotFound|(bucket|container) does not exist")


def _cause(error: Exception) -> str:
    """A library's error and its remedy, in one line."""
    text = shorten(str(error).partition("Debug source")[0], 200)
    if _NO_BUCKET.search(str(error)):
        return "there is no such bucket; create it, or correct the URL or the endpoint"
    if re.search("Permission|Unauthenticated", type(error).__name__) or "status code: 40" in text:
        return (
            f"access refused ({text}); check the credentials in the environment "
            "(AWS_ACCESS_KEY_ID, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_NAME …) and rights"
        )
    if "NotSupported" in type(error).__name__ or "NotImplemented" in str(error):
        return f"the bucket refuses conditional writes ({text}); use one that has them"
    return f"{text}; check URL, endpoint and network, then run it again to continue"


def _client(url: str, *, mkdir: bool) -> tuple[Any, Any]:
    try:
        import obstore.store
    except ImportError as error:
        raise MissingExtra(f"{url} needs obstore: pip install 'kvdistill[buckets]'") from error
    options: dict[str, Any] = {"retry_config": _RETRIES}
    if url.startswith("file://"):
        options = {"mkdir": mkdir}
    try:
        return obstore, obstore.store.from_url(url, **options)
    except (obstore.exceptions.BaseError, ValueError, TypeError, OSError) as error:
        if "kind: NotFound" in str(error):
            raise StoreNotFound(f"no store at {url}: there is no such folder") from None
        text = shorten(str(error).partition("Debug source")[0], 200)
        raise StoreError(
            f"{url}: {text}; expected s3://BUCKET/PREFIX, gs://…, az://…, file:///FOLDER or "
            "hf://datasets/USER/NAME"
        ) from error


def _refuse_faults(folder: Path, commit: Commit, where: str) -> None:
    for fault in file_faults(folder, commit.files):
        raise ShardCorrupt(
            f"{where}/{fault}; `kvdistill verify --repair` lets it be pushed or extracted again"
        )


def _open_lock(folder: Path) -> int:
    """The lock of a shard in the cache, which is never deleted."""
    path = folder.parent.parent / "locks" / folder.name
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def trim_cache() -> None:
    """Evict the least recently used shards until the cache is within its bound; open ones stay."""
    found = list[tuple[float, int, Path]]()
    for folder in cache_folder().glob("*/teachers/*/shards/*"):
        try:
            state = folder.stat()
            found.append((state.st_mtime, _folder_bytes(folder, state.st_ino), folder))
        except FileNotFoundError:  # evicted by another process
            continue
    excess = sum(size for _, size, _ in found) - cache_bytes()
    for _, size, folder in sorted(found):
        if excess <= 0:
            return
        excess -= size if discard_unused(folder) else 0


def discard_unused(folder: Path) -> bool:
    """Delete a shard in the cache; False if a process has it open."""
    lock = _open_lock(folder)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        discard(folder)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


@lru_cache(maxsize=1 << 16)
def _folder_bytes(folder: Path, _inode: int) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
