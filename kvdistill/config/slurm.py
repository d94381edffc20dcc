"""Section ``slurm``: resource requests by profile."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from kvdistill.config.base import NonNegative, OneLine, Positive, Section


class SlurmProfile(Section):
    """Resources requested from Slurm for one kind of job."""

    partition: OneLine | None = None
    """Partition (`--partition`)."""
    account: OneLine | None = None
    """Account (`--account`)."""
    qos: OneLine | None = None
    """Quality of service (`--qos`)."""
    constraint: OneLine | None = None
    """Node features (`--constraint`)."""
    nodes: Positive = 1
    """Nodes of the training job; extraction tasks always use one."""
    gpus_per_node: NonNegative = 0
    """GPUs per node (`--gpus-per-node`)."""
    cpus_per_task: Positive = 4
    """CPU cores per task (`--cpus-per-task`)."""
    memory_gb: Positive | None = 32
    """Memory per node, GB (`--mem`); null leaves it out, for `extra: {mem-per-cpu: 4G}`."""
    time_min: Positive = 240
    """Time limit, minutes (`--time`)."""
    array_parallelism: Positive = 64
    """Array elements that may run at the same time."""
    tasks: Positive | None = None
    """Array elements per teacher; `array_parallelism` if not given."""
    setup: tuple[str, ...] = ()
    """Shell lines before the command: `module load`, environment activation, HF_HUB_OFFLINE=1."""
    workers: Positive = 1
    """Worker processes per array element, for sites that allocate whole nodes; they share its GPUs
    evenly."""
    signal_delay_s: Positive = 120
    """Seconds before the time limit at which Slurm signals the job, which then stops cleanly and
    requeues itself."""
    max_restarts: NonNegative = 20
    """How many times an array element, or the training job, may requeue itself."""
    python: OneLine | None = None
    """Python interpreter of the jobs, such as a container's; the submitting one if not given."""
    container: OneLine | None = None
    """Container image, for sites with Pyxis (`--container-image`)."""
    container_mounts: tuple[OneLine, ...] = ()
    """Bind mounts of the container (`--container-mounts`)."""
    extra: dict[OneLine, OneLine] = {}
    """Any other sbatch option by its long name; an empty value makes it a flag."""

    @model_validator(mode="after")
    def _warned_in_time(self) -> Self:
        if self.signal_delay_s >= 60 * self.time_min:
            raise ValueError(
                f"signal_delay_s ({self.signal_delay_s}) must be shorter than time_min "
                f"({self.time_min} min)"
            )
        return self


class SlurmConfig(Section):
    """Slurm profiles by name; the command line picks one with `--profile`."""

    profiles: dict[str, SlurmProfile] = {}
    """Named sets of sbatch options."""
    extract: str | None = None
    """Profile of extraction arrays."""
    train: str | None = None
    """Profile of the training job."""

    @model_validator(mode="after")
    def _known_profiles(self) -> Self:
        for role in (self.extract, self.train):
            if role is not None and role not in self.profiles:
                raise ValueError(f"no profile {role!r}; defined profiles: {sorted(self.profiles)}")
        return self
