"""One live process at a time in a folder: a claim with a heartbeat in ``FOLDER/.lease``.

A killed holder is followed at once on its own machine or by its own requeued job, elsewhere when
its heartbeat is stale.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kvdistill.errors import FolderInUse
from kvdistill.slurm.heartbeat import HEARTBEAT_SECONDS, STALE_AFTER, Heartbeat, new_attempt
from kvdistill.slurm.ledger import Ledger
from kvdistill.slurm.retry import has_crashed
from kvdistill.slurm.signals import StopFlag

UNIT: Final = "folder"


@contextmanager
def lease(folder: Path) -> Iterator[Callable[[], None]]:
    """Hold a folder inside; yields a check that this process was not taken for a crashed one.

    Raises:
        FolderInUse: another live process holds it; by the check, too.
    """
    ledger = Ledger(folder / ".lease")
    me = new_attempt(0, 1, ledger, os.environ)

    def require() -> None:
        if (holder := ledger.holder(UNIT) or "") != me.attempt_id:
            found = ledger.attempt(holder)
            who = holder if found is None else f"process {found.pid} on {found.host}"
            raise FolderInUse(
                f"{folder}: another process trains this run ({who}); wait for it, stop it, or "
                "choose another name (--set name=…). A killed one is followed after "
                f"{STALE_AFTER * HEARTBEAT_SECONDS:.0f} s at most"
            )

    try:
        with Heartbeat(ledger, me, StopFlag(0.0)):
            if not ledger.claim(UNIT, me.attempt_id):
                holder = ledger.holder(UNIT) or ""
                if has_crashed(ledger, holder, me, HEARTBEAT_SECONDS):
                    ledger.reassign(UNIT, me.attempt_id)
                    ledger.forget(holder)
                    time.sleep(1.0)  # of several that follow at once, the last one holds it
            require()
            yield require
    finally:
        ledger.release(UNIT, me.attempt_id)
        ledger.forget(me.attempt_id)
        ledger.sweep()
