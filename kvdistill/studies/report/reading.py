"""What a report is about: arms, each one configuration under several seeds, and a baseline."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import yaml

from kvdistill.config.base import current_names
from kvdistill.errors import ConfigError
from kvdistill.pipelines.run_folder import RunFolder


@dataclass(frozen=True)
class SampleScore:
    """How one held-out text was predicted."""

    nll: float
    """Negative log-likelihood of its tokens, nats."""
    num_tokens: int
    num_chars: int
    correct: bool | None = None
    """Whether the right answer was generated; None where none was asked for."""


@dataclass(frozen=True)
class Run:
    """A finished run, read back from its folder."""

    path: Path
    name: str
    config: dict[str, Any]
    record: dict[str, Any]
    logs: list[dict[str, Any]]
    diagnostics: dict[str, Any]
    samples: dict[str, SampleScore] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """The seed it was started with."""
        return int(self.record["seed"])

    @property
    def metrics(self) -> dict[str, float]:
        """Its final figures."""
        found: dict[str, float] = self.record["metrics"]
        return found

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one logged quantity; the last value of a step that was redone."""
        points = {row["step"]: row[key] for row in self.logs if key in row}
        return [float(step) for step in sorted(points)], [points[step] for step in sorted(points)]


@dataclass(frozen=True)
class Arm:
    """One configuration under several seeds; a placebo's gain is not knowledge."""

    name: str
    runs: tuple[Run, ...]
    description: str = ""
    placebo: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The settings of its first run; the others differ in seed and name."""
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


@dataclass(frozen=True)
class Study:
    """Arms that are compared with one of them, the baseline."""

    name: str
    arms: tuple[Arm, ...]
    baseline: str
    notes: tuple[str, ...] = ()
    """What a reader must know: runs left out, and why."""

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


ABLATION: Final = "ablation.json"


NOT_OF_AN_ARM: Final = ("name", "seed", "output_dir", "slurm", "store")
"""Settings that two runs of one arm may differ in."""


def read_run(path: Path) -> Run:
    """Read a run's folder.

    Raises:
        ConfigError: not a run, or one that has not finished.
    """
    folder = RunFolder(path)
    record = folder.read_record()
    if not record:
        raise ConfigError(f"{path} is not a run's folder (it has no run.json)")
    if not record["finished"]:
        raise ConfigError(f"{path} has not finished; run `kvdistill train` with its config again")
    return Run(
        path,
        record["name"],
        current_names(yaml.safe_load(folder.config.read_text(encoding="utf-8")), warn=False),
        record,
        _json_lines(folder.log),
        json.loads(folder.diagnostics.read_text(encoding="utf-8")),
        {
            row["sample_id"]: SampleScore(
                row["nll"], row["num_tokens"], row["num_chars"], row.get("correct")
            )
            for row in _json_lines(folder.eval_samples)
        },
    )


def read_study(
    paths: Sequence[Path], baseline: str | None = None, title: str | None = None
) -> Study:
    """Read an ablation folder, a folder of runs, or run folders, in any mixture.

    Args:
        paths: folders; of several ablations the arms stand side by side.
        baseline: the arm that others are compared with; by default the ablation's own, else the
            only arm without teachers, else the last.
        title: what the study is called; by default as its ablations are.

    Raises:
        ConfigError: no finished run anywhere, or no arm of that name.
    """
    notes: list[str] = []
    arms: list[Arm] = []
    chosen, loose, names = baseline, [], []
    for path in paths:
        if (path / ABLATION).is_file():
            body = _read_ablation(path / ABLATION)
            names.append(body.get("name", path.name))
            chosen = chosen or body.get("baseline")
            if body.get("may_differ"):
                listed = ", ".join(body["may_differ"])
                notes.append(f"arms of {names[-1]} differ on purpose in {listed}")
            arms += _arms_of_ablation(path, body, notes)
        else:
            loose += _run_folders(path)
    arms = _told_apart([*arms, *_grouped(_finished(loose, notes), notes)])
    if not arms:
        raise ConfigError(
            "; ".join(notes) or "no arm has a finished run; give folders of `kvdistill train`"
        )
    name = title or " and ".join(names) or _title(arms)
    return Study(name, tuple(arms), _baseline(arms, chosen), tuple(notes))


def _read_ablation(path: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for entry in body.get("arms", [{}]):
        for key in ("name", "runs"):
            if key not in entry:
                raise ConfigError(f"{path}: an arm has no {key!r}; `kvdistill ablate` writes it")
    return body


def _run_folders(path: Path) -> list[Path]:
    """The folder itself if it is a run, else the runs up to two levels below it."""
    if (path / "run.json").is_file() or not path.is_dir():
        return [path]
    return sorted(p.parent for depth in ("*", "*/*") for p in path.glob(f"{depth}/run.json")) or [
        path
    ]


def _finished(paths: Sequence[Path], notes: list[str]) -> list[Run]:
    found = []
    for path in paths:
        run = _read_or_why_not(path)
        if isinstance(run, str):
            notes.append(f"{path} {run}")
        else:
            found.append(run)
    return found


def _read_or_why_not(path: Path) -> Run | str:
    """A run, or in words why it cannot be compared."""
    record = RunFolder(path).read_record()
    if not record:
        return "has not begun (no run.json)"
    if not record["finished"]:
        return "has not finished; run `kvdistill train` or `ablate` with its config again"
    run = read_run(path)
    bad = [key for key, value in run.metrics.items() if not math.isfinite(value)]
    return f"ended with {', '.join(bad)} that is no number" if bad else run


def _arms_of_ablation(path: Path, body: dict[str, Any], notes: list[str]) -> list[Arm]:
    arms = []
    for entry in body["arms"]:
        found = {run["seed"]: _read_or_why_not(path / run["path"]) for run in entry["runs"]}
        runs = tuple(run for _, run in sorted(found.items()) if isinstance(run, Run))
        missing: dict[str, list[str]] = {}
        for seed, run in found.items():
            if isinstance(run, str):
                missing.setdefault(run, []).append(str(seed))
        notes += [
            f"arm {entry['name']!r}, seed {', '.join(seeds)}: {why}"
            for why, seeds in missing.items()
        ]
        if runs:
            about = (entry.get("description", ""), entry.get("placebo", False))
            arms.append(Arm(entry["name"], runs, *about))
    return arms


def _one_per_seed(name: str, runs: Sequence[Run], notes: list[str]) -> tuple[Run, ...]:
    """In the order of their seeds; a second run of a seed would count its luck twice."""
    found: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        if run.seed in found:
            notes.append(f"arm {name!r} has seed {run.seed} twice; {run.path} is left out")
        else:
            found[run.seed] = run
    return tuple(found.values())


def _grouped(runs: Sequence[Run], notes: list[str]) -> list[Arm]:
    """Runs whose settings differ in nothing but seed and name are one arm."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: run.config[key] for key in run.config if key not in NOT_OF_AN_ARM}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    arms: list[Arm] = []
    for members in groups.values():
        name = _without_seed(members[0]) if len(members) > 1 else members[0].name
        placebo = _is_placebo(members[0].config)
        arms.append(Arm(name, _one_per_seed(name, members, notes), placebo=placebo))
    return arms


def _told_apart(arms: Sequence[Arm]) -> list[Arm]:
    """Arms of one name, from different folders, get their folder's name as well."""
    found: list[Arm] = []
    for arm in arms:
        name = arm.name
        if name in {other.name for other in found}:
            name = f"{arm.runs[0].path.parent.name}/{name}"
        while name in {other.name for other in found}:
            name += "+"
        found.append(replace(arm, name=name))
    return found


def _is_placebo(config: dict[str, Any]) -> bool:
    """Whether the targets of every teacher know nothing of their text."""
    placebo = config.get("placebo") or {}
    blind = placebo.get("teachers") or list(config["teachers"])
    if placebo.get("method", "none") == "none":
        blind = []
    return bool(config["teachers"]) and all(
        name in blind or teacher.get("weights") == "random"
        for name, teacher in config["teachers"].items()
    )


def _without_seed(run: Run) -> str:
    """A run's name without a trailing ``-s3`` or ``_seed3`` that names its seed."""
    return re.sub(rf"[-_.]?(s|seed)[-_]?{run.seed}$", "", run.name) or run.name


def _baseline(arms: Sequence[Arm], asked: str | None) -> str:
    names = [arm.name for arm in arms]
    if asked is not None:
        if asked not in names:
            raise ConfigError(f"no arm {asked!r} to compare with; there are: {', '.join(names)}")
        return asked
    alone = [arm.name for arm in arms if not arm.teachers]
    return alone[0] if len(alone) == 1 else names[-1]


def _title(arms: Sequence[Arm]) -> str:
    return " against ".join(arm.name for arm in arms) if len(arms) < 4 else f"{len(arms)} arms"


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shown(arm: Arm) -> str:
    """An arm's name; a placebo is called one wherever it appears."""
    return f"{arm.name} (placebo)" if arm.placebo and "placebo" not in arm.name else arm.name


# MERGED-DOC pipelines.report.reading
# Reading a study: from an ablation folder, or from any runs.
#
# The folder's ``ablation.json`` says what the arms are::
#
#     {"name": "reference",
#      "baseline": "cross-entropy",
#      "arms": [{"name": "cross-entropy",
#                "description": "no teacher",          optional, one line for the report
#                "placebo": false,                     optional
#                "runs": [{"seed": 0, "path": "cross-entropy-s0"}, …]}, …]}
#
# Paths are relative to the folder. Run folders that no such file names are grouped by their
# configurations: runs that differ in nothing but the seed and the name are one arm.
#
# Beside its ``run.json`` a run may hold ``eval_samples.jsonl``, one held-out text a line
# (``sample_id``, ``nll`` in nats, ``num_tokens``, ``num_chars``, perhaps ``correct``): what pairing
# by text needs.
#
# A run that is missing, has not finished or ended in NaN is left out and named in the notes; a
# report of what there is beats no report.
