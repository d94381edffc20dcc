"""A real Slurm on one machine, for tests: two nodes, three partitions, preemption, fake GPUs.

Debian's packages, run as root without systemd, everything below one fresh folder. Two ``slurmd``
play two nodes of one host. Daemons are started and stopped by pid and by nothing else, so a
Slurm that the machine may already run is left alone. ``.ci/slurm-packages`` installs what it needs.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("n1", "n2")
CREDENTIAL_SECONDS = 2.0
"""A job that starts again within a second of its requeue is refused: its credential is revoked."""
SBIN = "/usr/sbin:/usr/bin:/sbin:/bin"

SLURM_CONF = """\
ClusterName=kvdistill
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdSpoolDir={root}/spool.%n
SlurmdPidFile={root}/slurmd.%n.pid
SlurmdLogFile={root}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal,idle_on_node_suspend
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=2,sched_interval=2
MaxArraySize={max_array_size}
MinJobAge=300
KillWait=5
InactiveLimit=0
SlurmdTimeout=300
ReturnToService=2
JobRequeue=1
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_n1} CPUs=4 RealMemory=8000 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_n2} CPUs=4 RealMemory=8000 Gres=gpu:2
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF
"""
GRES_CONF = "".join(
    f"NodeName={node} Name=gpu File=/dev/tty{index}\n"
    for node, index in (("n1", "[1-2]"), ("n2", "[3-4]"))
)


class ClusterError(RuntimeError):
    """The test Slurm did not come up, or did not do in time what a test waited for."""


def missing_daemons() -> list[str]:
    """Programs that the test Slurm needs and this machine lacks."""
    return [name for name in DAEMONS if shutil.which(name, path=SBIN) is None]


@dataclass
class Cluster:
    """A running test Slurm. ``environment`` is what a client needs to talk to it."""

    root: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """``os.environ`` of a login node of this cluster."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        return {**inherited, "SLURM_CONF": str(self.root / "slurm.conf")}

    def client(self, *command: str, check: bool = True) -> str:
        """Run a Slurm client; its output."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        if check and done.returncode:
            raise ClusterError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def states(self, job_id: str) -> dict[str, str]:
        """State of every element of an array (or of a job), by element id."""
        lines = self.client("squeue", "-h", "-r", "-t", "all", "-j", job_id, "-o", "%i %T")
        return dict(line.split() for line in lines.splitlines())

    def start_now(self, element: str) -> None:
        """Skip the two minutes that a requeued job waits."""
        self.client("scontrol", "update", f"jobid={element}", "StartTime=now")

    def set_node(self, node: str, state: str) -> None:
        """Take a node down, or bring it back (``resume``)."""
        reason = ["reason=test"] if state == "down" else []
        self.client("scontrol", "update", f"nodename={node}", f"state={state}", *reason)

    def freeze(self, node: str) -> None:
        """Stop the node's daemon: Slurm loses sight of it while its jobs still run."""
        self.processes[f"slurmd.{node}"].send_signal(signal.SIGSTOP)

    def thaw(self, node: str) -> None:
        """Undo ``freeze``."""
        self.processes[f"slurmd.{node}"].send_signal(signal.SIGCONT)

    def logs(self) -> str:
        """The last lines of every daemon's log, for a failed test's message."""
        tails = [f"{p.name}: {p.read_text()[-1500:]}" for p in sorted(self.root.glob("*.log"))]
        return "\n".join(tails)


def wait_for(what: str, condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Poll until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise ClusterError(f"waited {seconds:.0f} s in vain for: {what}")
        time.sleep(0.2)


@contextlib.contextmanager
def slurm(root: Path, max_array_size: int = 2001) -> Iterator[Cluster]:
    """Bring up a Slurm below ``root`` and take it down again, jobs included."""
    cluster = Cluster(root)
    _configure(root, max_array_size)
    try:
        _start(cluster)
        yield cluster
    finally:
        _stop(cluster)


def _configure(root: Path, max_array_size: int) -> None:
    (root / "state").mkdir(parents=True)
    for node in NODES:
        (root / f"spool.{node}").mkdir()
    ports = _free_ports(3)
    (root / "slurm.conf").write_text(
        SLURM_CONF.format(
            host=socket.gethostname().split(".")[0],
            root=root,
            controller_port=ports[0],
            port_n1=ports[1],
            port_n2=ports[2],
            max_array_size=max_array_size,
        )
    )
    (root / "gres.conf").write_text(GRES_CONF)
    # slurmstepd looks for cgroup.conf even where no cgroup plugin is used.
    (root / "cgroup.conf").write_text("CgroupAutomount=no\n")
    key = root / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def _start(cluster: Cluster) -> None:
    root = cluster.root
    _daemon(
        cluster, "munged",
        ["munged", "--force", "--foreground", f"--key-file={root}/munge.key",
         f"--socket={root}/munge.socket", f"--pid-file={root}/munged.pid",
         f"--log-file={root}/munged.log", f"--seed-file={root}/munge.seed"],
    )  # fmt: skip
    wait_for("munge's socket", (root / "munge.socket").exists, 10)
    _daemon(cluster, "slurmctld", ["slurmctld", "-D", "-f", f"{root}/slurm.conf"])
    for node in NODES:
        _daemon(cluster, f"slurmd.{node}", ["slurmd", "-D", "-N", node, "-f", f"{root}/slurm.conf"])
    try:
        wait_for("two idle nodes", lambda: _idle(cluster), 45)
    except ClusterError as failure:
        raise ClusterError(f"{failure}\n{cluster.logs()}") from None


def _idle(cluster: Cluster) -> bool:
    states = cluster.client("sinfo", "-h", "-N", "-p", "low", "-o", "%T", check=False)
    return states.split() == ["idle", "idle"]


def _daemon(cluster: Cluster, name: str, command: list[str]) -> None:
    output = (cluster.root / f"{name}.out.log").open("wb")
    environment = {**cluster.environment, "PATH": f"{os.environ.get('PATH', '')}:{SBIN}"}
    with output:
        cluster.processes[name] = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        )


def _stop(cluster: Cluster) -> None:
    for process in cluster.processes.values():
        process.send_signal(signal.SIGCONT)
    if "slurmctld" in cluster.processes:
        cluster.client("scancel", "--full", "--user=root", check=False)
        with contextlib.suppress(ClusterError):
            wait_for("jobs to end", lambda: not cluster.client("squeue", "-h", check=False), 20)
    for process in reversed(cluster.processes.values()):
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_until_idle(cluster: Cluster, job_id: str, seconds: float = 90) -> None:
    """Let a job's elements end, without the two minutes that Slurm puts before a requeued one."""
    waiting = Waiting(cluster)
    wait_for(f"job {job_id} to end", lambda: not waiting.start(job_id), seconds)


class Waiting:
    """Requeued jobs, which Slurm lets wait for two minutes."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.seen: dict[str, float] = {}

    def start(self, jobs: str) -> dict[str, str]:
        """Start those that wait long enough for their credential; reasons of all living jobs."""
        rows = self.cluster.client("squeue", "-h", "-r", "-j", jobs, "-o", "%i|%r", check=False)
        living = dict(row.split("|") for row in rows.splitlines() if "|" in row)
        for job, reason in living.items():
            now = time.monotonic()
            if "held" in reason:  # where a launch met a daemon that was just going down
                self.cluster.client("scontrol", "release", job, check=False)
            if reason != "BeginTime":
                self.seen.pop(job, None)
            elif now - self.seen.setdefault(job, now) > CREDENTIAL_SECONDS:
                del self.seen[job]
                self.cluster.client(
                    "scontrol", "update", f"jobid={job}", "StartTime=now", check=False
                )
        return living
