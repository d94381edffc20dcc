"""Read finished runs as a study: arms, each one configuration under several seeds, and a baseline.

The arms are those of an ablation folder's ``ablation.json`` (``design.write_record``), of which the
report needs ``name`` and ``runs`` (``seed`` and ``path``, relative to the folder); ``question``,
``baseline``, ``description`` and ``placebo`` are optional. Runs that no such file lists are grouped
by their configurations: those that differ only in seed and name are one arm.

Beside its ``run.json`` a run may hold ``eval_samples.jsonl``, one held-out text a line
(``sample_id``, ``nll`` in nats, ``num_tokens``, ``num_chars``, optionally ``correct``), which
pairing by text needs. A run that is missing, unfinished or non-finite is left out, and the study's
notes name it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from kvdistill.errors import ConfigError
from kvdistill.pipelines.run_folder import RunFolder
from kvdistill.store.commit import file_faults
from kvdistill.store.manifest import json_object, unsealed_json
from kvdistill.studies.design import ABLATION_FILE
from kvdistill.text import shorten

NOT_OF_AN_ARM: Final = ("name", "seed", "output_dir", "report_to", "slurm", "store")
"""Settings that two runs of one arm may differ in."""


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder."""

    path: Path
    name: str
    config: dict[str, Any]
    record: dict[str, Any]
    """Content of ``run.json``."""
    logs: list[dict[str, Any]]
    diagnostics: dict[str, Any]
    """Layer maps, errors and weights by layer; empty for a run without teachers."""
    samples: dict[str, dict[str, Any]]
    """Scores of each held-out text, by ``sample_id``; empty if the run recorded none."""

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.record["seed"])

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of its final evaluation."""
        found: dict[str, float] = self.record["metrics"]
        return found

    @property
    def commit(self) -> str:
        """Short git commit of the last attempt, marked where tracked files differed from it."""
        found = str(self.record["attempts"][-1]["git_commit"] or "not a checkout")
        return found.replace(found[:40], found[:10]) if len(found) >= 40 else found

    @property
    def config_hash(self) -> str:
        """Short SHA-256 of the whole configuration, seed and name included."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:10]

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one logged quantity; of a repeated step, the last value."""
        points = {row["step"]: row[key] for row in self.logs if key in row}
        return [float(step) for step in sorted(points)], [points[step] for step in sorted(points)]


@dataclass(frozen=True)
class Arm:
    """One configuration under several seeds."""

    name: str
    runs: tuple[Run, ...]
    description: str = ""
    placebo: bool = False
    """Whether its targets are unrelated to the texts, so that its gain is regularisation."""

    @property
    def label(self) -> str:
        """Its name in the report, which marks a placebo."""
        marked = self.placebo and "placebo" not in self.name
        return f"{self.name} (placebo)" if marked else self.name

    @property
    def config(self) -> dict[str, Any]:
        """Settings of its first run; the others differ in seed and name."""
        return self.runs[0].config

    @property
    def teachers(self) -> tuple[str, ...]:
        """Teachers that it learned from; none for cross-entropy alone."""
        if not self.runs[0].diagnostics and not self.config.get("latent"):
            return ()
        weights = self.config["fusion"].get("weights") or {}
        return tuple(name for name in self.config["teachers"] if weights.get(name, 1) > 0)

    def by_seed(self) -> dict[int, Run]:
        """Its runs by seed."""
        return {run.seed: run for run in self.runs}

    def values(self, figure: Callable[[Run], float | None]) -> list[float]:
        """A figure of each run that has it."""
        return [value for run in self.runs if (value := figure(run)) is not None]


@dataclass(frozen=True)
class Study:
    """Arms that are compared with one of them, the baseline."""

    name: str
    arms: tuple[Arm, ...]
    baseline: str
    question: str = ""
    """In its authors' words; empty if they gave none."""
    notes: tuple[str, ...] = ()
    """Runs left out, with the reason, and declared differences between arms."""

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


def read_study(
    paths: Sequence[Path], baseline: str | None = None, title: str | None = None
) -> Study:
    """Read ablation folders, folders of runs and run folders, in any mixture.

    Args:
        paths: the folders; arms of several ablations are put into one study.
        baseline: the arm that others are compared with; by default the ablation's own, else the
            only arm without teachers, else the last.
        title: the study's name; by default its ablations' names.

    Raises:
        ConfigError: no finished run anywhere, or no arm of that name.
    """
    notes: list[str] = []
    arms: list[Arm] = []
    loose, names, question = [], [], ""
    for path in paths:
        if not (path / ABLATION_FILE).is_file():
            loose += _run_folders(path)
            continue
        file = path / ABLATION_FILE
        try:
            body = unsealed_json(file.read_bytes())
            if not all({"name", "runs"} <= arm.keys() for arm in body.get("arms", [{}])):
                raise ValueError("an arm lacks its name or runs")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: {error}; run `kvdistill ablate` to rewrite it") from None
        names.append(body.get("name", path.name))
        baseline = baseline or body.get("baseline")
        question = question or body.get("question", "")
        if body.get("may_differ"):
            listed = ", ".join(body["may_differ"])
            notes.append(f"arms of {names[-1]} differ by design in {listed}")
        arms += _arms_of_ablation(path, body, notes)
    arms = _with_unique_names([*arms, *_group_by_settings(loose, notes)])
    if not arms:
        raise ConfigError(
            "; ".join(notes) or "no arm has a finished run; give folders of `kvdistill train`"
        )
    if not (name := title or " and ".join(names)):
        name = " vs. ".join(arm.name for arm in arms) if len(arms) < 4 else f"{len(arms)} arms"
    return Study(name, tuple(arms), _choose_baseline(arms, baseline), question, tuple(notes))


def read_run(path: Path) -> Run:
    """Read one run's folder.

    Raises:
        ConfigError: not a run, or one that has not finished.
    """
    run = _read_or_reason(path)
    if isinstance(run, str):
        raise ConfigError(f"{path} {run}")
    return run


def _read_or_reason(path: Path, *, comparable: bool = False) -> Run | str:
    """A run, or the reason why it cannot be read (or compared, if its metrics are not finite)."""
    folder = RunFolder(path)
    record = folder.read_record()
    if not record:
        return "has no run.json: not a run, or one that has not started"
    if not record["finished"]:
        return "has not finished; run `kvdistill train` or `kvdistill ablate` with its config again"
    if fault := next(file_faults(path, record.get("files", {})), None):
        return f"is damaged: {fault}; restore it from a copy, or train the run again"
    if comparable:
        bad = [key for key, value in record["metrics"].items() if not math.isfinite(value)]
        if bad:
            return f"ended with non-finite {', '.join(bad)}"
    try:
        logs, samples = _json_lines(folder.log), _json_lines(folder.eval_samples)
        diagnostics = json_object(folder.diagnostics.read_bytes())
        by_id = {row["sample_id"]: row for row in samples}
        return Run(path, record["name"], folder.read_config(), record, logs, diagnostics, by_id)
    except (OSError, ValueError, KeyError) as error:
        return f"cannot be read: {shorten(str(error))}"


def _run_folders(path: Path) -> list[Path]:
    """The folder itself if it is a run or holds none, else the runs up to two levels below it."""
    if (path / "run.json").is_file() or not path.is_dir():
        return [path]
    found = [*path.glob("*/run.json"), *path.glob("*/*/run.json")]
    return sorted(record.parent for record in found) or [path]


def _arms_of_ablation(path: Path, body: dict[str, Any], notes: list[str]) -> list[Arm]:
    arms = []
    for entry in body["arms"]:
        found = {
            run["seed"]: _read_or_reason(path / run["path"], comparable=True)
            for run in entry["runs"]
        }
        runs = tuple(run for _, run in sorted(found.items()) if isinstance(run, Run))
        missing: dict[str, list[str]] = {}
        for seed, run in found.items():
            if isinstance(run, str):
                missing.setdefault(run, []).append(str(seed))
        for reason, seeds in missing.items():
            notes.append(f"arm {entry['name']!r}, seed {', '.join(seeds)}: {reason}")
        if runs:
            description, placebo = entry.get("description", ""), entry.get("placebo", False)
            arms.append(Arm(entry["name"], runs, description, placebo))
    return arms


def _group_by_settings(paths: Sequence[Path], notes: list[str]) -> list[Arm]:
    """Arms of loose runs: runs whose settings differ only in ``NOT_OF_AN_ARM`` are one."""
    groups: dict[str, list[Run]] = {}
    for path in paths:
        run = _read_or_reason(path, comparable=True)
        if isinstance(run, str):
            notes.append(f"{path} {run}")
            continue
        settings = {key: run.config[key] for key in run.config if key not in NOT_OF_AN_ARM}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    arms: list[Arm] = []
    for members in groups.values():
        name = members[0].name
        if len(members) > 1:  # without a trailing -s3 or _seed3
            name = re.sub(rf"[-_.]?(s|seed)[-_]?{members[0].seed}$", "", name) or name
        by_seed: dict[int, Run] = {}
        for run in sorted(members, key=lambda run: run.seed):
            if run.seed in by_seed:  # would count one draw of the seed twice
                notes.append(f"arm {name!r} has seed {run.seed} twice; {run.path} is left out")
            by_seed.setdefault(run.seed, run)
        runs = tuple(by_seed.values())
        arms.append(Arm(name, runs, placebo=_is_placebo(members[0].config)))
    return arms


def _with_unique_names(arms: Sequence[Arm]) -> list[Arm]:
    """Of arms of one name, from different folders, the later ones get their folder's name too."""
    found: dict[str, Arm] = {}
    for arm in arms:
        name = arm.name
        if name in found:
            name = f"{arm.runs[0].path.parent.name}/{name}"
        while name in found:
            name += "+"
        found[name] = replace(arm, name=name)
    return list(found.values())


def _is_placebo(config: dict[str, Any]) -> bool:
    """Whether the targets of every teacher are unrelated to their text."""
    placebo = config.get("placebo") or {}
    replaced = placebo.get("teachers") or list(config["teachers"])
    if placebo.get("method", "none") == "none":
        replaced = []
    return bool(config["teachers"]) and all(
        name in replaced or teacher.get("weights") == "random"
        for name, teacher in config["teachers"].items()
    )


def _choose_baseline(arms: Sequence[Arm], requested: str | None) -> str:
    names = [arm.name for arm in arms]
    if requested is None:
        without_teachers = [arm.name for arm in arms if not arm.teachers]
        return without_teachers[0] if len(without_teachers) == 1 else names[-1]
    if requested not in names:
        raise ConfigError(
            f"no arm {requested!r} to use as the baseline; the arms are: {', '.join(names)}"
        )
    return requested


def _json_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json_object(line) for line in lines]
