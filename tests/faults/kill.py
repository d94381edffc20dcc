"""Processes killed at a random write or after a random time, by SIGKILL, in forked children."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.verdict import HANGS_AFTER_S, import_modules, prepare_child

WRITES = {"os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR


def count_writes(root: Path, on_write: Callable[[int], None]) -> None:
    """Call ``on_write`` before every operation that changes a file below ``root``, for good."""
    prefix, count = str(root), 0

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in WRITES or (event == "open" and (arguments[2] or 0) & WRITING):
            if isinstance(arguments[0], int) or not os.fsdecode(arguments[0]).startswith(prefix):
                return
            count += 1
            on_write(count)

    sys.addaudithook(audit)


def _child(work: Callable[[], Any], log: Path) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            prepare_child()
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


class Killer:
    """Forks work and kills it; ``writes`` and ``seconds`` are those of undisturbed work."""

    def __init__(self, root: Path, seed: int, undisturbed: Callable[[], Any]) -> None:
        self.root, self.rng = root, random.Random(seed)
        root.parent.mkdir(parents=True, exist_ok=True)
        self.log = root.parent / f"{root.name}.log"
        note = root.parent / f"{root.name}.writes"

        def counted() -> None:
            total = [0]
            count_writes(root, lambda count: total.__setitem__(0, count))
            undisturbed()
            note.write_text(json.dumps([total[0], [*sys.modules]]))

        start = time.monotonic()
        assert os.waitpid(_child(counted, self.log), 0)[1] == 0, self.log.read_text()[-2000:]
        self.seconds = time.monotonic() - start
        self.writes, modules = json.loads(note.read_text())
        import_modules(modules)

    def kill(self, work: Callable[[], Any], share: float = 1.0) -> bool:
        """Run ``work`` in a child until a random moment of its first ``share``.

        Returns:
            False if it had ended before. It may not fail by itself.
        """
        if self.rng.random() < 0.6:
            number = self.rng.randint(1, max(1, int(self.writes * share)))

            def strike(count: int) -> None:
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            def watched() -> None:
                count_writes(self.root, strike)
                work()

            pid = _child(watched, self.log)
        else:
            pid = _child(work, self.log)
            time.sleep(self.rng.uniform(0, self.seconds * share))
            os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + HANGS_AFTER_S
        while (status := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            assert time.monotonic() < end, "it hangs"
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(status[1])
        assert code in (0, -signal.SIGKILL), self.log.read_text()[-2000:]
        return code != 0
