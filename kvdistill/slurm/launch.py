"""One command as a Slurm job: on one process, or through torchrun over all GPUs of all nodes.

The command must be resumable: when Slurm warns or ends the job, the command gets SIGTERM and the
job requeues itself. Other exit codes pass through, so that a command which finds an incomplete
store (3) is not run again and again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kvdistill.slurm.retry import exit_task
from kvdistill.slurm.signals import stop_flag
from kvdistill.slurm.task import TRY_AGAIN, Ending

FIRST_PORT: Final = 20_000
POLL_SECONDS: Final = 0.5


@dataclass(frozen=True)
class Launch:
    """What the job runs, as plain data; call it inside the job, once per node."""

    command: tuple[str, ...]
    """Arguments after ``python``, beginning with ``-m module``."""
    gate: tuple[str, ...] = ()
    """Arguments of a quick check before it; if its exit code is not 0, the job exits with it.
    torchrun turns every failure into 1, so a check whose code matters runs outside it."""
    nodes: int = 1
    processes_per_node: int = 1
    max_restarts: int = 20
    patience_seconds: float = 60.0
    """How long the command may take to stop before it is killed."""

    def __call__(self) -> None:
        """Run the command and exit with its code."""
        if self.gate:
            code = subprocess.run([sys.executable, *self.gate], check=False).returncode
            if code:
                sys.exit(code)
        code, reason = self._run()
        if code == 0 or (code != TRY_AGAIN and reason is None):
            sys.exit(code)
        if os.environ.get("SLURM_NODEID", "0") != "0":
            sys.exit(TRY_AGAIN)  # node 0 requeues the job; every node would requeue it again
        exit_task(Ending("interrupted", f"stopped by {reason}", again=True), self.max_restarts)

    def _run(self) -> tuple[int, str | None]:
        """The command's exit code, and the signal that stopped it, if any."""
        with stop_flag(0.0) as stop:
            process = subprocess.Popen(launch_command(self, os.environ))
            while process.poll() is None and not stop.requested:
                time.sleep(POLL_SECONDS)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(self.patience_seconds)
                except subprocess.TimeoutExpired:
                    process.kill()
            return process.wait(), stop.reason

    def to_shell(self) -> str:
        """Quoted argument of ``python -m kvdistill.slurm.launch``."""
        return shlex.quote(json.dumps(dataclasses.asdict(self)))


def launch_command(launch: Launch, environment: Mapping[str, str]) -> list[str]:
    """The command line of this node, under torchrun where there are several processes."""
    if launch.nodes * launch.processes_per_node == 1:
        return [sys.executable, *launch.command]
    job = int(environment.get("SLURM_JOB_ID", "0"))
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={launch.nodes}",
        f"--nproc-per-node={launch.processes_per_node}",
        f"--node-rank={environment.get('SLURM_NODEID', '0')}",
        # The batch script runs on the job's first node, which is rank 0.
        f"--master-addr={environment.get('SLURM_LAUNCH_NODE_IPADDR', '127.0.0.1')}",
        f"--master-port={FIRST_PORT + job % 20_000}",
        *launch.command,
    ]


if __name__ == "__main__":  # written scripts: the first argument is a launch as JSON
    body = json.loads(sys.argv[1])
    lists = {"command": tuple(body["command"]), "gate": tuple(body["gate"])}
    Launch(**{**body, **lists})()
