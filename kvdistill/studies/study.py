"""A study: arms times seeds over one store, each a run of its own, and what holds them together.

    study file → arms → experiments → runs (any order, anywhere) → ablation.json → report

``OUTPUT/STUDY/ablation.json``   the arms, what they state, and where their runs are
``OUTPUT/STUDY/<arm>-s<seed>/``  a run folder, as ``kvdistill train`` makes it

The truth is the run folders: a finished run is never computed again, an interrupted one goes on
from its checkpoint, and one whose settings have changed is refused by name.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from kvdistill.config.experiment import Experiment
from kvdistill.config.load import override, parse_experiment, put, read_yaml
from kvdistill.config.study import AblationConfig, ArmConfig
from kvdistill.errors import ConfigError
from kvdistill.pipelines.run_folder import RunFolder
from kvdistill.studies.arms import arms_of, extra_teachers

RECORD: Final = "ablation.json"


@dataclass(frozen=True)
class StudyRun:
    """One arm under one seed."""

    arm: str
    seed: int
    experiment: Experiment

    @property
    def name(self) -> str:
        """The run's folder inside the study's."""
        return self.experiment.name

    @property
    def folder(self) -> RunFolder:
        """Where it runs."""
        return RunFolder(self.experiment.output_dir / self.name)

    @property
    def is_finished(self) -> bool:
        """Whether it needs nothing more."""
        return bool(self.folder.read_record().get("finished"))


@dataclass(frozen=True)
class StudyPlan:
    """A whole study, checked setting by setting."""

    config: AblationConfig
    body: dict[str, Any]
    """The experiment that arms differ from, as its file has it."""
    folder: Path
    arms: dict[str, ArmConfig]
    """By name, the baseline first."""
    runs: tuple[StudyRun, ...]
    """Seed by seed, so that a study that is stopped has all arms under the seeds it got to."""

    @property
    def baseline(self) -> str:
        """The arm that others are compared with."""
        return next(iter(self.arms))

    @property
    def missing(self) -> list[StudyRun]:
        """Runs that have not finished."""
        return [run for run in self.runs if not run.is_finished]

    def of_arm(self, arm: str) -> list[StudyRun]:
        """An arm's runs, seed by seed."""
        return [run for run in self.runs if run.arm == arm]

    def experiment_of_all_teachers(self) -> Experiment:
        """What stage 1 needs, with every teacher that any arm learns from."""
        teachers = {
            name: teacher.model_dump(mode="json", exclude_defaults=True)
            for run in self.runs
            for name, teacher in run.experiment.teachers.items()
            if run.experiment.losses.uses_teachers
        }
        of_stage_one = ("store", "corpus", "student", "extraction", "slurm")
        body = {key: self.body[key] for key in of_stage_one if key in self.body}
        losses = {} if teachers else {"key": 0, "value": 0}
        name = self.config.name
        return parse_experiment({**body, "name": name, "teachers": teachers, "losses": losses})


def load_study(path: Path, overrides: Iterable[str] = ()) -> StudyPlan:
    """Read a study file and make the experiment of every run.

    Args:
        path: the study, YAML.
        overrides: ``a.b=value`` settings of the *experiment*, for all arms.

    Raises:
        ConfigError: a file is missing or malformed, or an arm's settings do not fit.
    """
    given = read_yaml(path)
    try:
        config = AblationConfig.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "study"
        raise ConfigError(f"{path}: {place}: {problem['msg']}") from None
    if isinstance(config.experiment, Path):
        body = read_yaml(path.parent / config.experiment)
    else:
        body = copy.deepcopy(config.experiment)
    for assignment in overrides:
        override(body, assignment)
    return make_study(config, body)


def make_study(config: AblationConfig, body: dict[str, Any]) -> StudyPlan:
    """Arms times seeds as experiments.

    Raises:
        ConfigError: an arm's settings are unknown, or do not fit each other.
    """
    arms = arms_of(config, body)
    known = extra_teachers(config, body)
    runs = []
    for seed in config.seeds:
        for name, arm in arms.items():
            settings = _arm_settings(config, body, known, name, arm)
            experiment = parse_experiment(
                {**settings, "name": f"{name}-s{seed}", "seed": seed},
                f"study {config.name}, arm {name}",
            )
            folder = experiment.output_dir / config.name
            experiment = experiment.model_copy(update={"output_dir": folder})
            runs.append(StudyRun(name, seed, experiment))
    return StudyPlan(config, body, runs[0].experiment.output_dir, arms, tuple(runs))


def write_record(plan: StudyPlan) -> Path:
    """Write ``ablation.json``, which says what the arms are; the report reads it."""
    arms = [
        {
            "name": name,
            "description": arm.description,
            "placebo": arm.placebo,
            "settings": arm.settings,
            "teachers": None if arm.teachers is None else list(arm.teachers),
            "runs": [{"seed": run.seed, "path": run.name} for run in plan.of_arm(name)],
        }
        for name, arm in plan.arms.items()
    ]
    record = {
        "name": plan.config.name,
        "baseline": plan.baseline,
        "seeds": list(plan.config.seeds),
        "may_differ": list(plan.config.may_differ),
        "experiment": plan.body,
        "arms": arms,
    }
    plan.folder.mkdir(parents=True, exist_ok=True)
    path = plan.folder / RECORD
    staged = path.with_suffix(".tmp")
    staged.write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
    staged.replace(path)
    return path


def select_runs(plan: StudyPlan, arms: Sequence[str]) -> Sequence[StudyRun]:
    """The runs of some arms, or all.

    Raises:
        ConfigError: there is no such arm.
    """
    strangers = sorted(set(arms) - set(plan.arms))
    if strangers:
        raise ConfigError(
            f"study {plan.config.name} has no arm {strangers[0]!r}; there are: "
            f"{', '.join(plan.arms)}"
        )
    return [run for run in plan.runs if not arms or run.arm in arms]


def _arm_settings(
    config: AblationConfig,
    body: dict[str, Any],
    known: dict[str, Any],
    name: str,
    arm: ArmConfig,
) -> dict[str, Any]:
    """The experiment's settings with an arm's own on top."""
    where = f"study {config.name}, arm {name}"
    settings = copy.deepcopy(body)
    if arm.teachers is not None:
        there = {**(settings.get("teachers") or {}), **known}
        strangers = sorted(set(arm.teachers) - set(there))
        if strangers:
            raise ConfigError(f"{where}: no teacher {strangers[0]!r}; there are: {sorted(there)}")
        settings["teachers"] = {teacher: there[teacher] for teacher in arm.teachers}
    for dotted, value in arm.settings.items():
        put(settings, dotted, copy.deepcopy(value), where)
    return settings
