"""A store in a data set repository of the Hugging Face hub: ``hf://datasets/USER/NAME/PREFIX``.

A repository is a bucket whose writes are commits. A shard is one of them, so it appears whole. A
commit states its parent and is refused if another one was faster, which stands for a bucket's
condition that there is no such object yet.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from kvdistill.errors import StoreError, StoreNotFound
from kvdistill.store.bucket import Bucket
from kvdistill.store.commit import MAX_DOCUMENT_BYTES
from kvdistill.store.format import NAME
from kvdistill.text import shorten

T = TypeVar("T")

_URL: Final = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)")

_TRIES: Final = 20
"""Of a commit that others are faster than."""


class Hub(Bucket):
    """The files of one store in a data set repository. A new repository is private.

    Token and endpoint are those of ``huggingface_hub``: ``hf auth login``, ``HF_TOKEN``,
    ``HF_ENDPOINT``. Raises as ``Bucket``.
    """

    def _connect(self, new: bool) -> tuple[Any, Any]:
        from huggingface_hub import HfApi

        if (found := _URL.fullmatch(self.url)) is None:
            raise StoreError(f"{self.url}: expected hf://datasets/USER/NAME or …/NAME/PREFIX")
        self._prefix = found[2].strip("/")
        where: dict[str, Any] = {"repo_id": found[1], "repo_type": "dataset"}
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        if new:
            self._call(partial(api.create_repo, **where, private=True, exist_ok=True))
        return api, where

    def _key(self, path: Path) -> str:
        return "/".join(part for part in (self._prefix, super()._key(path)) if part.strip("."))

    def read(self, path: Path) -> bytes | None:
        """From the hub, whatever the cache has."""
        found = self._call(lambda: self._api.get_paths_info(paths=self._key(path), **self._objects))
        sizes = [entry.size for entry in found if hasattr(entry, "size")]
        if not sizes:
            return None
        if sizes[0] > MAX_DOCUMENT_BYTES:
            raise StoreError(f"{self.shown(path)}: {sizes[0]:,} bytes, no document")
        with tempfile.TemporaryDirectory() as folder:
            return self._get(path, Path(folder)).read_bytes()

    def folders(self, path: Path) -> set[str]:
        """Names of the folders in ``path`` that may be ours."""
        names = (each.path.rpartition("/")[2] for each in self._tree(path) if not _is_file(each))
        return set(filter(NAME.fullmatch, names))

    def put(self, path: Path, content: bytes | Path) -> None:
        """Create or replace a file, from one on this machine if ``content`` is one."""
        self._commit({path: content})

    def create(self, path: Path, content: bytes) -> bool:
        """False if there is such a file."""
        return self._commit({path: content}, last=path)

    def _publish(self, files: Mapping[Path, Path | bytes], last: Path, content: bytes) -> bool:
        """All files in one commit; False if ``last`` is there."""
        return self._commit({**files, last: content}, last=last)

    def _commit(self, files: Mapping[Path, Path | bytes], last: Path | None = None) -> bool:
        from huggingface_hub import CommitOperationAdd

        def operations() -> list[Any]:  # a commit marks those that it has uploaded
            named = ((self._key(path), content) for path, content in files.items())
            return [CommitOperationAdd(key, content) for key, content in named]

        return self._change(operations, f"Add {self._key(next(iter(files)))}", last)

    def _remove(self, path: Path) -> None:
        """Delete a file, or everything below a folder."""
        from huggingface_hub import CommitOperationDelete

        found = [*self._listed(path)]
        if not found and self.read(path) is not None:
            found = [path]
        if keys := [self._key(each) for each in found]:
            self._change(lambda: [CommitOperationDelete(key) for key in keys], f"Remove {keys[0]}")

    def _change(
        self, operations: Callable[[], list[Any]], message: str, last: Path | None = None
    ) -> bool:
        """One commit; False if there is a file ``last``. Repeated while others are faster."""
        from huggingface_hub.errors import HfHubHTTPError

        for _ in range(_TRIES):
            head = self._call(lambda: self._api.repo_info(**self._objects).sha)
            if last is not None and self.read(last) is not None:
                return False

            def commit(parent: str = head) -> bool:
                try:
                    self._api.create_commit(
                        operations=operations(),
                        commit_message=message,
                        parent_commit=parent,
                        **self._objects,
                    )
                except HfHubHTTPError as error:
                    if error.response.status_code != 412:
                        raise
                    return False
                return True

            if self._call(commit):
                return True
        raise StoreError(f"{self.url}: others commit all the time; run it again to continue")

    def _listed(self, folder: Path) -> dict[Path, Any]:
        entries = [each for each in self._tree(folder, recursive=True) if _is_file(each)]
        start = len(self._prefix) + 1 if self._prefix else 0
        found = (
            (each.path[start:], {"size": each.size, "e_tag": each.blob_id}) for each in entries
        )
        return {self.paths.root / key: meta for key, meta in found}

    def _tree(self, folder: Path, *, recursive: bool = False) -> list[Any]:
        kwargs = {
            **self._objects,
            "recursive": recursive,
            "path_in_repo": self._key(folder) or None,
        }
        return self._call(lambda: list(self._api.list_repo_tree(**kwargs)), [])

    def _get_files(self, origin: Path, sizes: Mapping[str, int], folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as received:

            def get(name: str) -> None:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                self._get(origin / name, Path(received)).rename(folder / name)

            self._each(get, sizes)

    def _get(self, path: Path, folder: Path) -> Path:
        """Download a file to somewhere below a folder."""
        kwargs = {**self._objects, "filename": self._key(path), "local_dir": folder}
        return Path(self._call(lambda: self._api.hf_hub_download(**kwargs)))

    def _call(self, request: Callable[[], T], *missing: Any) -> T:
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

        try:
            return request()
        except hub_errors() as error:
            if missing and isinstance(error, EntryNotFoundError):
                return missing[0]  # type: ignore[no-any-return]
            kind = StoreNotFound if isinstance(error, RepositoryNotFoundError) else StoreError
            raise kind(f"{self.url}: {hub_remedy(error, 'data set')}") from error


def _is_file(entry: Any) -> bool:
    return hasattr(entry, "size")


def hub_errors() -> tuple[type[Exception], ...]:
    """What ``huggingface_hub`` raises where the hub refuses or cannot be reached."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    network: Any = HfHubHTTPError.__mro__[1]  # of the HTTP library that this version uses
    return network, OSError, HFValidationError


def hub_remedy(error: Exception, kind: str) -> str:
    """An error about a repository of a ``kind``, and its remedy, in one line."""
    text = shorten(str(error), 200)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return f"no such {kind}, or no right to it ({text}); log in by `hf auth login`"
    return f"{text}; check HF_ENDPOINT and the network, then run it again to continue"
