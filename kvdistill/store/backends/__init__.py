"""What a backend must do: write a shard's arrays into a folder, and read pieces of them back.

A backend knows nothing of teachers, codecs or publication. The same contract tests run for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from kvdistill.store.format import ArraySpec
from kvdistill.store.manifest import Commit

Specs = Mapping[str, ArraySpec]


class OpenShard(Protocol):
    """A committed shard, open for reading. Safe to use from several threads."""

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
        """One array, or the given positions on its first, second and third axis.

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
        """Write all arrays into ``folder``; return checksums per tensor, where it keeps them."""
        ...

    def open(self, folder: Path, commit: Commit, specs: Specs) -> OpenShard:
        """Open a committed shard after checking its metadata against ``commit`` and ``specs``.

        Raises:
            ShardCorrupt: a file is missing, or shapes or dtypes are not the expected ones.
        """
        ...
