"""How something ended that may refuse, crash or hang: run in a forked child, told in a word."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import importlib
import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from kvdistill.errors import KVDistillError

MAX_MESSAGE = 500
"""Characters of a message, but for the path that it names."""


def require_lines(messages: Sequence[str], path: Path) -> None:
    """Every message is one line of bounded length."""
    assert not any("\n" in message for message in messages)
    assert max(map(len, messages)) <= MAX_MESSAGE + len(str(path))


def rounds(few: int, *, many: int, pieces: int = 1) -> list[Any]:
    """Counts and seeds of a round: a small one by default, ``many`` in pieces where slow."""
    slow = [pytest.param(many // pieces, i, marks=pytest.mark.slow) for i in range(1, pieces + 1)]
    return [(few, 0), *slow] if few else slow


Commands = Mapping[str, Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended, and the digest of its result, its message or its traceback."""

    how: Literal["done", "refused", "traceback", "lost"]
    said: str


HANGS_AFTER_S = 900.0
"""No work takes as long, even where it gets a twentieth of a core."""


def outcomes(commands: Commands) -> dict[str, Outcome]:
    """Run commands one after another in one forked child; "lost" are those it never answered."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        prepare_child()
        os.close(reading)
        with open(writing, "wb") as pipe:  # noqa: PTH123
            for name, command in commands.items():
                pickle.dump((name, _outcome(command)), pipe)
                pipe.flush()
            pickle.dump(("", [*sys.modules]), pipe)
        os._exit(0)
    os.close(writing)
    found = _received(reading)
    os.kill(pid, signal.SIGKILL)  # a zombie at worst
    status = os.waitpid(pid, 0)[1]
    import_modules(found.pop("", ()))
    lost = Outcome("lost", f"hung or crashed: {os.waitstatus_to_exitcode(status)}")
    return {name: found.get(name, lost) for name in commands}


def import_modules(names: Iterable[str]) -> None:
    """Import what a child has imported, so that the next one need not."""
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    gc.freeze()


def _received(reading: int) -> dict[str, Any]:
    content, end = b"", time.monotonic() + HANGS_AFTER_S
    with open(reading, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            if not (piece := pipe.read(1 << 16)):
                break
            content += piece
    return dict(_unpickled(content))


def _unpickled(content: bytes) -> Iterator[tuple[str, Any]]:
    import io

    stream = io.BytesIO(content)
    while stream.tell() < len(content):
        try:
            yield pickle.load(stream)
        except EOFError:
            return


def _outcome(command: Callable[[], Any]) -> Outcome:
    try:
        return Outcome("done", digest(command()))
    except KVDistillError as error:
        return Outcome("refused", str(error))
    except BaseException:
        return Outcome("traceback", traceback.format_exc())


def prepare_child() -> None:
    """Make a forked child cheap and safe."""
    torch.set_num_threads(1)  # the threads of the parent do not exist here
    gc.freeze()  # a collection would copy every page of the parent


def digest(value: Any) -> str:
    """A hash of nested results: equal if and only if every number is."""
    found = hashlib.sha256()
    for part in _parts(value):
        found.update(part)
    return found.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode() + value.tobytes()
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield f"{key}:".encode()
            yield from _parts(value[key])
    elif isinstance(value, (list, tuple)):
        yield b"["
        for item in value:
            yield from _parts(item)
        yield b"]"
    else:
        yield repr(value).encode()


def faults_of(
    found: Mapping[str, Outcome], wanted: Mapping[str, Outcome], where: str, *, path_length: int
) -> list[str]:
    """What is wrong with how commands ended: anything but the wanted result or one clear line."""
    faults = []
    for name, outcome in found.items():
        said = outcome.said.strip()
        if outcome.how == "done":
            wrong = "other numbers" if outcome != wanted[name] else ""
        elif outcome.how == "refused":
            lengthy = "\n" in said or len(said) > MAX_MESSAGE + path_length
            wrong = f"not one short line: {said[:700]!r}" if lengthy else ""
        else:
            wrong = f"{outcome.how}: {said[-700:]}"
        if wrong:
            faults.append(f"{where}: {name}: {wrong}")
    return faults


def same_folder(path: Path, other: Path) -> bool:
    """Whether two folders hold the same files."""
    mine, theirs = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (path, other)
    )
    return mine == theirs
