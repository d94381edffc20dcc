"""The report's tables, identical on the page and in the Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvdistill.config.load import flatten
from kvdistill.errors import StoreError
from kvdistill.store.bucket import is_url
from kvdistill.store.reader import KVStore
from kvdistill.studies.report.comparison import TESTS
from kvdistill.studies.report.reading import Arm, Run, Study
from kvdistill.studies.report.results import (
    NONE,
    OVER,
    UNKNOWN,
    Row,
    format_interval,
    format_number,
    format_p,
    mean_of,
    percent,
)
from kvdistill.text import format_bytes, format_duration


@dataclass(frozen=True)
class Table:
    """Formatted cells, of one line or two; the first column names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    anchors: tuple[str, ...] = ()
    """HTML id of each row, if any."""


def headline_table(rows: Sequence[Row], baseline: str) -> Table | None:
    """The first table, best arm first; a cell's second line is what its first rests on."""
    cells = []
    for row in sorted(rows, key=lambda row: -row.gain):
        made_of = f"teachers: {', '.join(row.arm.teachers)}" if row.arm.teachers else "no teacher"
        p = "" if row.p is None else f"\np {format_p(row.p)}"
        line = {
            "arm": f"{row.arm.label}\n{row.arm.description or made_of}",
            "perplexity": format_number(row.perplexity, 1 if (row.perplexity or 0) >= 10 else 2),
            "exact match": percent(
                row.exact_match if row.perplexity is None else None, signed=False
            ),
            "change": "\n".join(row.shown_change),
            "verdict": row.verdict.replace("no significant difference", "not significant") + p,
        }
        cells.append(line)
    several = "mean over seeds; " if len(rows[0].arm.runs) > 1 else ""
    return _table(f"{several}change against {baseline} and its 95 % confidence interval", cells)


def result_table(rows: Sequence[Row], study: Study) -> Table | None:
    """Scores of each arm, its change against the baseline and the verdict."""
    cells = []
    for row in rows:
        change, bits = row.perplexity_change or UNKNOWN, row.bits or UNKNOWN
        line = {
            "arm": row.arm.label,
            "seeds": str(len(row.arm.runs)),
            "perplexity": format_number(row.perplexity, 2),
            f"vs. {study.baseline}": percent(change.value),
            "95 % CI": format_interval(change.interval, scale=100, unit=" %"),
            "p (Holm)": format_p(row.p),
            "verdict": row.verdict if len(rows) > 1 else "",
            "bits per character": format_number(bits.value, 4),
            "its 95 % CI": format_interval(bits.interval, 4),
            "calibration error": format_number(row.calibration),
            "exact match": percent(row.exact_match, signed=False),
        }
        cells.append(line)
    return _table("Arms: mean over seeds", cells)


def significance_table(rows: Sequence[Row]) -> Table | None:
    """Every test and effect size; None where nothing was compared."""
    compared = [(row.arm.label, row.comparison) for row in rows if row.comparison is not None]
    cells = []
    for label, found in compared:
        line = {
            "arm": label,
            "paired seeds": str(found.num_seeds),
            "texts": str(found.num_texts or NONE),
            "change in bits per character": format_number(found.change.value, 4),
            "95 % CI": format_interval(found.change.interval, 4),
        }
        for test in TESTS:
            p, corrected = format_p(found.p.get(test)), format_p(found.corrected.get(test))
            line[f"p {OVER[test]} (Holm)"] = f"{p} ({corrected})" if test in found.p else NONE
        line |= {
            "g over seeds": format_number(found.effect_seeds, 1),
            "g over texts": format_number(found.effect_texts, 2),
            "better on": percent(found.better_texts, 0, signed=False),
        }
        cells.append(line)
    return _table("Significance: differences in bits per character", cells)


def answer_table(rows: Sequence[Row]) -> Table | None:
    """Exact match against the baseline; None where no run answered."""
    cells = []
    for row in rows:
        found = row.exact_match_comparison
        if found is None or row.exact_match is None:
            continue
        test = found.main_test or "texts"
        line = {
            "arm": row.arm.label,
            "exact match": percent(row.exact_match, signed=False),
            "change, points": format_number(found.change.value, 1, signed=True, scale=100),
            "95 % CI": format_interval(found.change.interval, scale=100),
            "p (Holm)": format_p(found.corrected.get(test)),
            "test": OVER[test],
        }
        cells.append(line)
    return _table("Exact match, paired by seed and problem", cells)


def cost_table(study: Study) -> Table | None:
    """Time, peak memory and disk of each arm, mean over its runs."""
    cells = []
    for arm in study.arms:
        records = [run.record for run in arm.runs]
        disk = [sum(f.stat().st_size for f in r.path.rglob("*") if f.is_file()) for r in arm.runs]
        line = {
            "arm": arm.label,
            "time": format_duration(mean_of([float(r["seconds"]) for r in records]) or 0.0),
            "peak memory": _mean_bytes([r.get("peak_memory_bytes") for r in records]),
            "peak accelerator memory": _mean_bytes([r.get("peak_device_bytes") for r in records]),
            "disk": _mean_bytes(disk),
        }
        cells.append(line)
    return _table("Cost of one run: mean over seeds", cells)


def _mean_bytes(sizes: Sequence[float | None]) -> str:
    mean = mean_of([size for size in sizes if size])
    return NONE if mean is None else format_bytes(mean)


def savings_table(study: Study) -> tuple[Table | None, list[str]]:
    """Extraction cost of each teacher, the time it saved, and notes on stores that are gone.

    A teacher is read once into the store; without one it would be read again in every epoch over
    the corpus of every run that learned from it.
    """
    passes: dict[Path | str, dict[str, float]] = {}
    for arm in study.arms:
        for run in arm.runs:
            of_store = passes.setdefault(_store_path(run), {})
            epochs = max((row["epoch"] for row in run.logs if row.get("epoch")), default=1.0)
            for teacher in arm.teachers:
                of_store[teacher] = of_store.get(teacher, 0.0) + float(epochs)
    cells, notes = [], []
    for path, of_store in sorted(passes.items(), key=str):
        try:
            store = KVStore.open(path)
        except StoreError:
            notes.append(f"no store at {path}: the cost of its extraction is unknown")
            continue
        for name in (name for name in store.teachers() if name in of_store):
            commits = [store.commit(name, shard_id) for shard_id in store.committed(name)]
            seconds = sum(commit.seconds for commit in commits)
            size = sum(file.size_bytes for commit in commits for file in commit.files.values())
            line = {
                "teacher": name,
                "extraction time": format_duration(seconds),
                "store size": format_bytes(size),
                "epochs trained from it": format_number(of_store[name], 1),
                "teacher time saved": format_duration(max(of_store[name] - 1, 0.0) * seconds),
            }
            cells.append(line)
    return _table("Teachers: cost of extraction and time saved", cells), notes


def _store_path(run: Run) -> Path | str:
    """The run's store; a relative path starts at the folder that training was started in."""
    if is_url(run.config["store"]):
        return str(run.config["store"])
    store, own = Path(run.config["store"]), Path(run.config["output_dir"], run.config["name"])
    parts = run.path.resolve().parts
    start = Path(*parts[: -len(own.parts)])
    is_there = parts[-len(own.parts) :] == own.parts and (start / store).is_dir()
    return start / store if is_there else store


def settings_table(study: Study) -> Table | None:
    """Settings in which arms differ.

    A teacher's settings are compared among the arms that have it; which arms do is one line.
    """
    flat = {arm.label: _flat_settings(arm) for arm in study.arms}
    cells = []
    for key in sorted({key for settings in flat.values() for key in settings}):
        of_teacher = key.startswith("teachers.")
        compared = [s.get(key) for s in flat.values() if key in s or not of_teacher]
        if len({json.dumps(value) for value in compared}) > 1:
            values = {label: settings.get(key) for label, settings in flat.items()}
            shown = {label: NONE if v is None else str(v) for label, v in values.items()}
            cells.append({"setting": key, **shown})
    return _table("Settings that differ between arms", cells)


def _flat_settings(arm: Arm) -> dict[str, Any]:
    flat = flatten(arm.config) | {"teachers": ", ".join(arm.config["teachers"]) or NONE}
    skipped = ("name", "seed", "output_dir", "slurm.")
    return {key: value for key, value in flat.items() if not key.startswith(skipped)}


def provenance_table(study: Study, numbers: Mapping[int, int]) -> Table | None:
    """Every run and how it was made; ``numbers`` are the runs' own, by ``id``."""
    cells = []
    for arm in study.arms:
        for run in arm.runs:
            attempt = run.record["attempts"][-1]
            line = {
                "run": f"{numbers[id(run)]}: {run.name}",
                "arm": arm.label,
                "seed": str(run.seed),
                "steps": str(run.record["steps"]),
                "commit": run.commit,
                "config": run.config_hash,
                "started": attempt["started"],
                "versions": ", ".join(f"{k} {v}" for k, v in attempt["versions"].items()),
                "command": attempt["command"],
            }
            cells.append(line)
    anchors = tuple(f"run-{line['run'].partition(':')[0]}" for line in cells)
    return _table("Provenance of every run", cells, anchors)


def _table(
    caption: str, lines: Sequence[Mapping[str, str]], anchors: tuple[str, ...] = ()
) -> Table | None:
    """A table of lines that share their keys, without columns that are empty in every row."""
    if not lines:
        return None
    first, *others = lines[0]
    empty = {"", NONE, f"{NONE}\n"}
    filled = [name for name in others if any(line[name] not in empty for line in lines)]
    columns = (first, *filled)
    rows = tuple(tuple(line[name] for name in columns) for line in lines)
    return Table(caption, columns, rows, anchors)
