"""What each arm cost, and what reading the teachers once has saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvdistill.errors import StoreError
from kvdistill.store.reader import KVStore
from kvdistill.studies.report.reading import Arm, Run, Study, shown


@dataclass(frozen=True)
class ArmCost:
    """Per run of an arm, the mean over its seeds."""

    arm: str
    seconds: float
    memory_bytes: float | None
    """Peak of the process, None where runs did not record it."""
    device_bytes: float | None
    """Peak on the accelerator; None without one."""
    disk_bytes: float
    """The run's folder: student, checkpoints, logs."""


@dataclass(frozen=True)
class TeacherCost:
    """One teacher: read once into the store, used by many epochs of many runs."""

    teacher: str
    seconds: float
    """Of the extraction, all shards."""
    disk_bytes: int
    passes: float
    """Epochs over the corpus, of all runs of the study that learned from it."""

    @property
    def saved_seconds(self) -> float:
        """Had the teacher read the corpus again in every epoch of every run."""
        return max(self.passes - 1, 0.0) * self.seconds


def arm_costs(study: Study) -> list[ArmCost]:
    """The cost of each arm, in their order."""
    return [
        ArmCost(
            shown(arm),
            _mean_of([float(run.record["seconds"]) for run in arm.runs]) or 0.0,
            _mean_of([m for run in arm.runs if (m := run.record.get("peak_memory_bytes"))]),
            _mean_of([m for run in arm.runs if (m := run.record.get("peak_device_bytes"))]),
            _mean_of([_folder_bytes(run.path) for run in arm.runs]) or 0.0,
        )
        for arm in study.arms
    ]


def teacher_costs(study: Study) -> tuple[list[TeacherCost], list[str]]:
    """The cost of each teacher in each store that still is there, and notes on those gone."""
    found, notes = [], []
    stores = sorted({_store(run) for arm in study.arms for run in arm.runs})
    for path in stores:
        try:
            store = KVStore.open(path)
        except StoreError:
            notes.append(f"the store {path} is not here, so what its extraction cost is not known")
            continue
        passes = _passes(study.arms, path)
        for name in store.teachers():
            if name in passes:
                found.append(_teacher_cost(store, name, passes[name]))
    return found, notes


def _teacher_cost(store: KVStore, name: str, passes: float) -> TeacherCost:
    commits = [store.commit(name, shard_id) for shard_id in store.committed(name)]
    size = sum(record.size_bytes for commit in commits for record in commit.files.values())
    return TeacherCost(name, sum(commit.seconds for commit in commits), size, passes)


def _store(run: Run) -> Path:
    """Where the run's store is: a relative path is from the folder that training was started in."""
    store, own = Path(run.config["store"]), Path(run.config["output_dir"], run.config["name"])
    full = run.path.resolve()
    began = Path(*full.parts[: -len(own.parts)])
    is_there = full.parts[-len(own.parts) :] == own.parts and (began / store).is_dir()
    return began / store if is_there else store


def _passes(arms: Sequence[Arm], store: Path) -> dict[str, float]:
    """Epochs by teacher."""
    found: dict[str, float] = {}
    for arm in arms:
        for run in arm.runs:
            for teacher in arm.teachers if _store(run) == store else ():
                found[teacher] = found.get(teacher, 0.0) + _epochs(run)
    return found


def _epochs(run: Run) -> float:
    logged = [row["epoch"] for row in run.logs if row.get("epoch")]
    return float(max(logged, default=1.0))


def _folder_bytes(path: Path) -> float:
    return float(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))


def _mean_of(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
