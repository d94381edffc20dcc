"""A study: arms times seeds over one store, each a training run of its own.

    study file → arms → experiments → runs (any order, anywhere) → ablation.json → report

``OUTPUT/STUDY/ablation.json``   the arms, what they state, and where their runs are
``OUTPUT/STUDY/<arm>-s<seed>/``  a run folder, as ``kvdistill train`` makes it

The run folders are the only state: a finished run is never computed again, an interrupted one
resumes from its checkpoint, and one whose settings have changed is refused by name. Arms come from
a preset, the study file and its grid; ``docs/ablations.md`` explains what each preset controls for.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from kvdistill.config.distill import TEACHER_LOSSES
from kvdistill.config.experiment import Experiment
from kvdistill.config.load import override, parse_experiment, put, read_yaml
from kvdistill.config.study import AblationConfig, AblationPreset, ArmConfig
from kvdistill.errors import ConfigError
from kvdistill.pipelines.run_folder import RunFolder
from kvdistill.store.commit import replace_file
from kvdistill.store.manifest import sealed_json

Body = Mapping[str, Any]
"""An experiment's settings, as its file has them."""
Arms = dict[str, ArmConfig]

UNTRAINED: Final = "-untrained"
"""Suffix of the untrained twin of a teacher: the same architecture, random weights."""
NO_TEACHER_LOSSES: Final[dict[str, Any]] = {
    f"losses.{name}": 0.0 for name in (*TEACHER_LOSSES, "entropy")
}
SETTINGS_BY_TEACHER: Final = (("fusion", "weights"), ("alignment", "explicit_layers"))
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
        "question": design.config.question,
        "baseline": design.baseline,
        "seeds": list(design.config.seeds),
        "may_differ": list(design.config.may_differ),
        "experiment": design.body,
        "arms": arms,
    }
    path = design.folder / ABLATION_FILE
    replace_file(path, sealed_json(json.loads(json.dumps(record, default=str))))
    return path


def arms_of(config: AblationConfig, body: Body) -> Arms:
    """All arms of a study by name, the baseline first.

    Raises:
        ConfigError: a preset does not fit the experiment, two arms have one name, or the
            baseline is not among them.
    """
    arms: Arms = {}
    preset = PRESETS[config.preset](body) if config.preset else {}
    for name, arm in (*preset.items(), *config.arms.items(), *_grid_arms(config)):
        if name in arms:
            raise ConfigError(f"study {config.name}: two arms are named {name!r}; rename one")
        arms[name] = arm
    baseline = config.baseline or next(iter(arms))
    if baseline not in arms:
        raise ConfigError(
            f"study {config.name}: no arm {baseline!r} to use as the baseline; the arms are: "
            f"{', '.join(arms)}"
        )
    return {baseline: arms[baseline]} | arms


def extra_teachers(config: AblationConfig, body: Body) -> dict[str, Any]:
    """Teachers of single arms: those that the study file adds, and untrained twins."""
    twins = {}
    if config.preset == "eight-arms":
        for name in _teacher_names(body):
            own = {k: v for k, v in body["teachers"][name].items() if k != "gguf_file"}
            twins[f"{name}{UNTRAINED}"] = {**own, "weights": "random"}
    return twins | dict(config.teachers)


def baselines(body: Body) -> Arms:
    """The experiment, and what one would do instead with the same store.

    Raises:
        ConfigError: the store holds no predictions to learn from.
    """
    if not (body.get("extraction") or {}).get("logits"):
        raise ConfigError(
            "preset baselines has an arm that learns from the teachers' predictions, and the "
            "experiment stores none; set extraction.logits, such as to 32"
        )
    losses = body.get("losses") or {}
    weight, no_kv = losses.get("logits") or 1.0, {**NO_TEACHER_LOSSES, "projection": {}}
    arms = {
        "cross-entropy": _arm("no teacher", {**no_kv, "fusion": {}, "placebo": {}}, ()),
        "logits": _arm("predictions alone", {**no_kv, "losses.logits": weight}),
        "kv": _arm("keys and values alone", {"losses.logits": 0.0, "losses.hidden": 0.0}),
        "kv-and-logits": _arm(
            "keys and values, and predictions", {"losses.logits": weight, "losses.hidden": 0.0}
        ),
        "logits-shuffled": _arm(
            "predictions for another text of similar length",
            {**no_kv, "losses.logits": weight, "placebo.method": "shuffled"},
            placebo=True,
        ),
    }
    if body["extraction"].get("hidden"):
        regressed = {**NO_TEACHER_LOSSES, "losses.hidden": losses.get("hidden") or 1.0}
        arms["hidden"] = _arm("hidden states alone", regressed)
    return arms


def eight_arms(body: Body) -> Arms:
    """Cross-entropy, each teacher alone, three ways to fuse all of them, and three placebos."""
    names = _teacher_names(body)
    unset: dict[str, Any] = {
        section: {} for section in ("projection", "fusion", "placebo") if body.get(section)
    }
    arms = {"cross-entropy": _arm("no teacher", {**NO_TEACHER_LOSSES, **unset}, ())}
    arms |= {f"single-{name}": _arm(f"{name} alone", {"fusion": {}}, (name,)) for name in names}
    if len(names) > 1:
        weights = (body.get("fusion") or {}).get("weights")
        fixed = {"method": "fixed", **({"weights": weights} if weights else {})}
        similarity, router = {"method": "similarity"}, {"method": "mlp"}
        arms |= {
            "multi-fixed": _arm("all teachers, fixed weights", {"fusion": fixed}),
            "multi-similarity": _arm(
                "all teachers, weights by similarity to the text", {"fusion": similarity}
            ),
            "multi-learnable": _arm(
                "all teachers, weights from a trained router", {"fusion": router}
            ),
        }
    twins = {name: f"{name}{UNTRAINED}" for name in names}
    of_twins = {}
    for section, setting in SETTINGS_BY_TEACHER:
        if given := (body.get(section) or {}).get(setting):
            values = {twin: given[name] for name, twin in twins.items() if name in given}
            of_twins[f"{section}.{setting}"] = values
    return arms | {
        "placebo-shuffled": _arm(
            "keys and values of another text of similar length",
            {"placebo.method": "shuffled"},
            placebo=True,
        ),
        "placebo-untrained": _arm(
            "the teachers' architectures with random weights",
            of_twins,
            tuple(twins.values()),
            placebo=True,
        ),
        "placebo-noise": _arm(
            "noise with the teachers' means and variances",
            {"placebo.method": "noise"},
            placebo=True,
        ),
    }


def e1_to_e5(body: Body) -> Arms:
    """Which tokens of a rationale a latent student learns from, and whether they must be its own.

    Raises:
        ConfigError: the experiment has no ``latent`` section.
    """
    if not body.get("latent"):
        raise ConfigError(
            "preset E1-E5 compares eviction methods for a latent student, and the experiment has "
            "no `latent` section; start from `preset: kava` (docs/latent.md)"
        )
    eviction = "latent.eviction.method"
    return {
        "E1-cross-entropy": _arm("latents without KV targets", NO_TEACHER_LOSSES),
        "E2-whole-text": _arm(
            "tokens evenly spaced over the whole rationale", {eviction: "uniform"}
        ),
        "E3-right-crop": _arm("the rationale's first tokens", {eviction: "right_crop"}),
        "E4-r-kv": _arm("attended and non-redundant tokens (R-KV)", {eviction: "rkv"}),
        "E5-shuffled": _arm(
            "R-KV tokens of another text's rationale",
            {eviction: "rkv", "placebo.method": "shuffled"},
            placebo=True,
        ),
    }


def leave_one_out(body: Body) -> Arms:
    """All teachers, and all but each.

    Raises:
        ConfigError: fewer than two teachers.
    """
    names = _teacher_names(body)
    if len(names) < 2:
        raise ConfigError(
            f"preset leave-one-out needs at least 2 teachers, got {list(names)}; add a teacher"
        )
    weights = (body.get("fusion") or {}).get("weights") or {}
    arms = {"all": _arm("all teachers")}
    for left_out in names:
        rest = tuple(name for name in names if name != left_out)
        settings = {"fusion.weights": {name: weights[name] for name in rest}} if weights else {}
        arms[f"without-{left_out}"] = _arm(f"all teachers but {left_out}", settings, rest)
    return arms


def _arm(
    description: str,
    settings: Mapping[str, Any] | None = None,
    teachers: tuple[str, ...] | None = None,
    *,
    placebo: bool = False,
) -> ArmConfig:
    changed = dict(settings or {})
    return ArmConfig(description=description, settings=changed, teachers=teachers, placebo=placebo)


def _teacher_names(body: Body) -> tuple[str, ...]:
    return tuple(body.get("teachers") or ())


PRESETS: Final[dict[AblationPreset, Callable[[Body], Arms]]] = {
    "baselines": baselines,
    "eight-arms": eight_arms,
    "E1-E5": e1_to_e5,
    "leave-one-out": leave_one_out,
}


def _grid_arms(config: AblationConfig) -> list[tuple[str, ArmConfig]]:
    """Every combination of the grid's values, named like ``key-10_mode-frozen``."""
    arms = []
    for values in itertools.product(*config.grid.values()) if config.grid else ():
        settings = dict(zip(config.grid, values, strict=True))
        parts = (f"{key.rpartition('.')[2]}-{value}" for key, value in settings.items())
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(parts)).strip("-._")[:90]
        arms.append((name, ArmConfig(settings=settings)))
    return arms
