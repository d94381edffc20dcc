"""Where everything in a store lives. The only file that knows folder names.

    STORE/kvstore.json
    STORE/corpus/<shard>.jsonl
    STORE/teachers/<teacher>/teacher.json
    STORE/teachers/<teacher>/shards/<shard>/     committed shards, and nothing else
    STORE/teachers/<teacher>/tmp/                shards being written
    STORE/teachers/<teacher>/aside/              shards that ``verify --repair`` took out

Names reach a path only after ``checked_name``, so no manifest can point outside the store.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvdistill.errors import StoreFormatError

MANIFEST: Final = "kvstore.json"
TEACHER: Final = "teacher.json"
COMMIT: Final = "COMMIT.json"
TEXTS: Final = "texts.jsonl"

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class StorePaths:
    """Every path of the store under ``root``."""

    root: Path

    @property
    def manifest(self) -> Path:
        """The frozen plan."""
        return self.root / MANIFEST

    @property
    def teachers(self) -> Path:
        """One folder per teacher."""
        return self.root / "teachers"

    @property
    def corpus(self) -> Path:
        """The samples, one file per shard."""
        return self.root / "corpus"

    def samples(self, shard_id: str) -> Path:
        """The samples of one shard, one JSON line each."""
        return self.corpus / f"{checked_name(shard_id)}.jsonl"

    def teacher(self, teacher: str) -> Path:
        """Everything of one teacher."""
        return self.teachers / checked_name(teacher)

    def teacher_manifest(self, teacher: str) -> Path:
        """Provenance and geometry of one teacher."""
        return self.teacher(teacher) / TEACHER

    def prototypes(self, teacher: str) -> Path:
        """A few vectors that stand for one teacher, for routers."""
        return self.teacher(teacher) / "prototypes.safetensors"

    def shards(self, teacher: str) -> Path:
        """The committed shards of one teacher."""
        return self.teacher(teacher) / "shards"

    def shard(self, teacher: str, shard_id: str) -> Path:
        """One committed shard."""
        return self.shards(teacher) / checked_name(shard_id)

    def temporary(self, teacher: str) -> Path:
        """Where shards are written before they are published."""
        return self.teacher(teacher) / "tmp"

    def aside(self, teacher: str) -> Path:
        """Where a repair moves bad shards, so that nothing is ever deleted by a check."""
        return self.teacher(teacher) / "aside"


def checked_name(name: str) -> str:
    """Return ``name`` if it is usable as a folder inside the store.

    Raises:
        StoreFormatError: it has separators, a leading dot, or other characters than
            letters, digits, ``.``, ``_`` and ``-``, or more than 100 of them.
    """
    if not _NAME.fullmatch(name):
        raise StoreFormatError(
            f"{name!r} is not a usable name: up to 100 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )
    return name
