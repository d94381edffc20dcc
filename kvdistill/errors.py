"""Every error a user can meet.

One base class, so that the command line can turn any of them into one line and an exit code;
each child also inherits the builtin that a Python caller would expect to catch.
A message says what was found, what was expected, where, and what to do about it.
"""

from __future__ import annotations


class KVDistillError(Exception):
    """Base of all errors that kvdistill raises on purpose."""

    exit_code = 1


class ConfigError(KVDistillError, ValueError):
    """The experiment file, or an override of it, is not usable."""


class ControlError(KVDistillError, ValueError):
    """Arms of a study differ in something that a fair comparison holds equal."""


class CorpusError(KVDistillError, ValueError):
    """A corpus is missing, empty, malformed, or not the one a store was made from."""


class TeacherError(KVDistillError, ValueError):
    """A teacher cannot be loaded, read or verified."""


class StudentError(KVDistillError, ValueError):
    """A student or its tokenizer cannot be built, loaded or read."""


class GeometryError(KVDistillError, ValueError):
    """A tensor's shape does not fit what was declared for it."""


class NonFiniteError(KVDistillError, ArithmeticError):
    """NaN or infinity where only finite values make sense; names layer, head and sample."""


class StoreError(KVDistillError, OSError):
    """A store cannot be opened, read or written."""


class StoreNotFound(StoreError, FileNotFoundError):
    """There is no store at the given path."""


class StoreFormatError(StoreError):
    """A manifest is malformed, or written by a newer format version."""


class ShardNotFound(StoreError, FileNotFoundError):
    """A shard has not been committed."""


class ShardCorrupt(StoreError):
    """A shard's bytes do not match its checksums, counts or shapes."""


class StoreMismatch(StoreError):
    """A store's fingerprints do not match what the config asks for."""


class IncompleteStore(StoreError):
    """Training was asked for, but shards are missing. Exit code 3: extract, then come again."""

    exit_code = 3


class Interrupted(KVDistillError):
    """Stopped by a signal at a clean point. Exit code 75: run the same command again."""

    exit_code = 75


class MissingExtra(KVDistillError, ImportError):
    """An optional dependency is needed; the message names the extra that installs it."""


class SlurmError(KVDistillError, RuntimeError):
    """Slurm is missing, or refused what was asked of it."""
