"""All errors that kvdistill raises on purpose.

They share one base class, so that the command line can turn each into one line and an exit code;
each also inherits the builtin that a Python caller would expect to catch. A message states what was
expected, what was found, where, and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType


class KVDistillError(Exception):
    """Base class of all errors below."""

    exit_code = 1


class ConfigError(KVDistillError, ValueError):
    """An experiment file, an override or a setting is invalid."""


class ControlError(KVDistillError, ValueError):
    """Arms of a study differ in something that a fair comparison keeps equal."""


class CorpusError(KVDistillError, ValueError):
    """A corpus is missing, empty, malformed, or not the one that a store was made from."""

    columns: Mapping[str, Sequence[str]] = MappingProxyType({})
    """Settings of ``corpus.columns`` that would read the row, where they can be guessed."""


class TeacherError(KVDistillError, ValueError):
    """A teacher cannot be loaded, read or verified."""


class StudentError(KVDistillError, ValueError):
    """A student or its tokenizer cannot be built, loaded or read."""


class AdapterError(KVDistillError, ValueError):
    """No adapter gives the queries, keys and values that a model's attention computes with."""


class GeometryError(KVDistillError, ValueError):
    """A tensor does not have the declared shape."""


class NonFiniteError(KVDistillError, ArithmeticError):
    """NaN or infinity where values must be finite; names layer, head and sample."""


class StoreError(KVDistillError, OSError):
    """A store cannot be opened, read or written."""


class StoreNotFound(StoreError, FileNotFoundError):
    """There is no store at this path."""


class StoreFormatError(StoreError):
    """A manifest is malformed, or of a newer format version."""


class ShardNotFound(StoreError, FileNotFoundError):
    """A shard has not been committed."""


class ShardCorrupt(StoreError):
    """The content of a shard does not match its checksums, counts or shapes."""


class StoreMismatch(StoreError):
    """The fingerprints of a store do not match the config."""


class IncompleteStore(StoreError):
    """Training needs shards that are missing. Exit code 3: run `kvdistill extract` first."""

    exit_code = 3


class RunFolderError(KVDistillError, OSError):
    """The folder of a run cannot be written."""


class FolderInUse(RunFolderError):
    """Another live process writes into a folder."""


class Interrupted(KVDistillError):
    """Stopped cleanly by a signal. Exit code 75: run the same command again to continue."""

    exit_code = 75


class MissingExtra(KVDistillError, ImportError):
    """An optional dependency is missing; the message names the extra that installs it."""


class SlurmError(KVDistillError, RuntimeError):
    """Slurm is unavailable, or rejected a request."""
