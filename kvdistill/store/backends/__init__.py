"""The contract of a backend: write a shard's arrays into a folder, and read parts of them back.

Teachers, codecs and publication lie above it. The same contract tests run for every backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from kvdistill.store.format import ArraySpec
from kvdistill.store.manifest import Commit

Specs = Mapping[str, ArraySpec]


class ArrayReader(Protocol):
    """A committed shard, open for reading. Safe to share between threads and after a fork."""

    @property
    def attributes(self) -> Mapping[str, object]:
        """What was passed to ``write``."""
        ...

    def read(
        self,
        name: str,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        span: slice | None = None,
    ) -> np.ndarray:
        """One array, or ascending positions on its first and second axis and a span of its third.

        The result may be a strided view of a private memory map, and is writable.

        Raises:
            ShardCorrupt: bytes are missing, truncated or flipped.
        """
        ...


class Backend(Protocol):
    """How arrays become files."""

    def write(
        self,
        folder: Path,
        arrays: Mapping[str, np.ndarray],
        specs: Specs,
        attributes: Mapping[str, object],
    ) -> dict[str, str]:
        """Write all arrays into ``folder``; return a checksum per tensor if the format needs one.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        ...

    def open(self, folder: Path, commit: Commit, specs: Specs) -> ArrayReader:
        """Open a committed shard after checking its metadata against ``commit`` and ``specs``.

        Raises:
            ShardCorrupt: a file is missing, or shapes or dtypes are not the declared ones.
        """
        ...
