"""A study: arms times seeds over one store, each a training run of its own.

    study file → arms → experiments → runs (any order, anywhere) → ablation.json → report

``OUTPUT/STUDY/ablation.json``   the arms, what they state, and where their runs are
``OUTPUT/STUDY/<arm>-s<seed>/``  a run folder, as ``kvdistill train`` makes it

The run folders are the only state: a finished run is never computed again, an interrupted one
resumes from its checkpoint, and one whose settings have changed is refused by name.
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

ABLATION_FILE: Final = "ablation.json"
STAGE_ONE_SECTIONS: Final = ("store", "corpus", "student", "extraction", "slurm")


@dataclass(frozen=True)
class StudyRun:
    """One arm under one seed."""

    arm: str
    seed: int
    experiment: Experiment

    @property
    def name(self) -> str:
        """Name of the run's folder inside the study's."""
        return self.experiment.name

    @property
    def folder(self) -> RunFolder:
        """Paths of the run."""
        return RunFolder(self.experiment.output_dir / self.name)

    @property
    def is_finished(self) -> bool:
        """Whether training and the final evaluation are done."""
        return bool(self.folder.read_record().get("finished"))


@dataclass(frozen=True)
class StudyDesign:
    """A study whose every run is a valid experiment."""

    config: AblationConfig
    body: dict[str, Any]
    """The experiment that arms differ from, as its file has it."""
    folder: Path
    arms: dict[str, ArmConfig]
    """By name, the baseline first."""
    runs: tuple[StudyRun, ...]
    """Seed by seed, so that a study stopped early has all arms under the seeds it got to."""

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

    def missing_of(self, arms: Sequence[str]) -> list[StudyRun]:
        """Unfinished runs of some arms; of all arms if none is named.

        Raises:
            ConfigError: there is no such arm.
        """
        unknown = sorted(set(arms) - set(self.arms))
        if unknown:
            raise ConfigError(
                f"study {self.config.name}: no arm {unknown[0]!r}; the arms are: "
                f"{', '.join(self.arms)}"
            )
        return [run for run in self.missing if not arms or run.arm in arms]

    def experiment_of_all_teachers(self) -> Experiment:
        """The experiment that stage 1 extracts: every teacher that any arm learns from."""
        teachers = {
            name: teacher.model_dump(mode="json", exclude_defaults=True)
            for run in self.runs
            for name, teacher in run.experiment.teachers.items()
            if run.experiment.losses.uses_teachers
        }
        body = {key: value for key, value in self.body.items() if key in STAGE_ONE_SECTIONS}
        losses = {} if teachers else {"key": 0, "value": 0}
        name = self.config.name
        return parse_experiment({**body, "name": name, "teachers": teachers, "losses": losses})


def load_study(path: Path, overrides: Iterable[str] = ()) -> StudyDesign:
    """Read a study file and build the experiment of every run.

    Args:
        path: the study, YAML.
        overrides: ``a.b=value`` settings of the *experiment*, for all arms.

    Raises:
        ConfigError: a file is missing or malformed, or an arm's settings are unknown or do not
            fit each other.
    """
    try:
        config = AblationConfig.model_validate(read_yaml(path))
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
    arms = arms_of(config, body)
    teachers = {**(body.get("teachers") or {}), **extra_teachers(config, body)}
    runs = []
    for seed in config.seeds:
        for name, arm in arms.items():
            where = f"study {config.name}, arm {name}"
            settings = _arm_settings(body, teachers, arm, where)
            run_settings = {**settings, "name": f"{name}-s{seed}", "seed": seed}
            experiment = parse_experiment(run_settings, where)
            folder = experiment.output_dir / config.name
            experiment = experiment.model_copy(update={"output_dir": folder})
            runs.append(StudyRun(name, seed, experiment))
    return StudyDesign(config, body, runs[0].experiment.output_dir, arms, tuple(runs))


def _arm_settings(
    body: dict[str, Any], teachers: dict[str, Any], arm: ArmConfig, where: str
) -> dict[str, Any]:
    """The experiment's settings with an arm's own on top; ``teachers`` are all it may choose."""
    settings = copy.deepcopy(body)
    if arm.teachers is not None:
        unknown = sorted(set(arm.teachers) - set(teachers))
        if unknown:
            raise ConfigError(
                f"{where}: no teacher {unknown[0]!r}; the teachers are: {sorted(teachers)}"
            )
        settings["teachers"] = {name: teachers[name] for name in arm.teachers}
    for dotted, value in arm.settings.items():
        put(settings, dotted, copy.deepcopy(value), where)
    return settings


def write_record(design: StudyDesign) -> Path:
    """Write ``ablation.json``, from which the report reads the arms."""
    arms = [
        {
            "name": name,
            "description": arm.description,
            "placebo": arm.placebo,
            "settings": arm.settings,
            "teachers": None if arm.teachers is None else list(arm.teachers),
            "runs": [{"seed": run.seed, "path": run.name} for run in design.of_arm(name)],
        }
        for name, arm in design.arms.items()
    ]
    record = {
        "name": design.config.name,
        "baseline": design.baseline,
        "seeds": list(design.config.seeds),
        "may_differ": list(design.config.may_differ),
        "experiment": design.body,
        "arms": arms,
    }
    design.folder.mkdir(parents=True, exist_ok=True)
    path = design.folder / ABLATION_FILE
    staged = path.with_suffix(".tmp")
    staged.write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
    staged.replace(path)
    return path
