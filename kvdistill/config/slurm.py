"""What to ask of Slurm, as settings."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from kvdistill.config.base import Positive, Section


class SlurmProfile(Section):
    """What to ask of Slurm for one kind of job."""

    partition: str | None = None
    """Partition (`--partition`)."""
    account: str | None = None
    """Account (`--account`)."""
    qos: str | None = None
    """Quality of service (`--qos`)."""
    constraint: str | None = None
    """Node features (`--constraint`)."""
    nodes: Positive = 1
    """Nodes per job; extraction tasks use one."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """GPUs per node (`--gpus-per-node`)."""
    cpus_per_task: Positive = 4
    """CPU cores per task."""
    memory_gb: Positive = 32
    """Memory per node, GB."""
    time_min: Positive = 240
    """Time limit, minutes."""
    array_parallelism: Positive = 64
    """Array elements that run at once."""
    tasks: Positive | None = None
    """Array elements per teacher; `array_parallelism` if not given."""
    setup: tuple[str, ...] = ()
    """Shell lines before the command: module loads, environment activation, HF_HUB_OFFLINE=1."""
    workers: Positive = 1
    """Worker processes per array element, for sites that give out whole nodes; they share its
    GPUs evenly."""
    signal_delay_s: Positive = 120
    """Seconds before the time limit (or a preemption) at which a job is warned, stops cleanly
    and puts itself back into the queue."""
    max_restarts: Annotated[int, Field(ge=0)] = 20
    """How often one array element, or the training job, may put itself back into the queue."""
    python: str | None = None
    """Python that jobs run, such as the one inside a container; this one if not given."""
    container: str | None = None
    """Container image, for sites with Pyxis (`--container-image`)."""
    container_mounts: tuple[str, ...] = ()
    """Folders to show inside the container (`--container-mounts`)."""
    extra: dict[str, str] = {}
    """Any other sbatch option, by its long name; an empty value makes it a flag."""

    @model_validator(mode="after")
    def _warned_in_time(self) -> Self:
        if self.signal_delay_s >= 60 * self.time_min:
            raise ValueError(
                f"signal_delay_s ({self.signal_delay_s}) must be shorter than time_min "
                f"({self.time_min} min)"
            )
        return self


class SlurmConfig(Section):
    """Profiles by name; the command line picks one with `--profile`."""

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
                raise ValueError(f"no profile {role!r}; there are: {sorted(self.profiles)}")
        return self
