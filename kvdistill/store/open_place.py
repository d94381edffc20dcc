"""Which place a store's location means."""

from __future__ import annotations

from pathlib import Path

from kvdistill.store.bucket import Bucket, is_url
from kvdistill.store.hub import Hub
from kvdistill.store.place import Place


def open_place(location: Path | str, *, new: bool = False) -> Place:
    """The place of a store, whether or not it is there; only a ``new`` one may be created."""
    if not is_url(location):
        return Place(Path(location))
    url = str(location)
    return Hub(url, new=new) if url.startswith("hf://") else Bucket(url, new=new)
