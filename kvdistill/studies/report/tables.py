"""The report's tables, as words: the page and the Markdown show the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvdistill.config.load import flatten
from kvdistill.studies.report import wording as words
from kvdistill.studies.report.comparison import Comparison
from kvdistill.studies.report.costs import ArmCost, TeacherCost
from kvdistill.studies.report.reading import Run, Study, shown
from kvdistill.studies.report.rows import Row
from kvdistill.text import format_duration


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first column names its row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    anchors: tuple[str, ...] = ()
    """What a row is linked to by, if anything."""


def results(table: Sequence[Row], baseline: str) -> Table:
    """What was measured, and the verdict."""
    columns = {
        "arm": [shown(row.arm) for row in table],
        "seeds": [str(len(row.arm.runs)) for row in table],
        "perplexity": [words.format_number(row.perplexity, 2) for row in table],
        f"against {baseline}": [words.percent(row.perplexity_change) for row in table],
        "95 % interval": [words.percent_span(row.perplexity_interval) for row in table],
        "p, corrected": [words.p_value(row.p) for row in table],
        "verdict": [row.verdict for row in table],
        "bits per character": [words.format_number(row.bits, 4) for row in table],
        "its 95 % interval": [words.span(row.bits_interval, 4) for row in table],
        "calibration error": [words.format_number(row.calibration) for row in table],
        "exact match": [words.percent(row.exact_match, signed=False) for row in table],
    }
    return _make_table("Arms: means over their seeds", columns)


def certainty(table: Sequence[Row]) -> Table | None:
    """Every test and effect size; None where nothing was compared."""
    compared = [(row, row.comparison) for row in table if row.comparison is not None]
    if not compared:
        return None
    columns = {
        "arm": [shown(row.arm) for row, _ in compared],
        "paired seeds": [str(found.num_seeds) for _, found in compared],
        "texts": [str(found.num_texts or words.NONE) for _, found in compared],
        "change, bits per character": [
            words.format_number(found.change, 4) for _, found in compared
        ],
        "95 % interval": [words.span(found.interval, 4) for _, found in compared],
    }
    for test in words.test_names([found for _, found in compared]):
        name = "seeds and texts" if test == "both" else test
        columns[f"p over {name} (corrected)"] = [_p(found, test) for _, found in compared]
    columns |= {
        "g over seeds": [words.format_number(found.effect_seeds, 1) for _, found in compared],
        "g over texts": [words.format_number(found.effect_texts, 2) for _, found in compared],
        "better on": [words.percent(f.better_texts, 0, signed=False) for _, f in compared],
    }
    return _make_table("How sure: differences in bits per character", columns)


def answers(table: Sequence[Row]) -> Table | None:
    """Exact match against the baseline; None where no run answered."""
    compared = [
        (row, row.exact_match_comparison)
        for row in table
        if row.exact_match_comparison is not None and row.exact_match is not None
    ]
    if not compared:
        return None
    tests = [found.main_test or "texts" for _, found in compared]
    columns = {
        "arm": [shown(row.arm) for row, _ in compared],
        "right answers": [words.percent(row.exact_match, signed=False) for row, _ in compared],
        "change, points": [words.points(found.change) for _, found in compared],
        "95 % interval": [words.points_span(found.interval) for _, found in compared],
        "p, corrected": [
            words.p_value(found.corrected.get(test))
            for (_, found), test in zip(compared, tests, strict=True)
        ],
        "p is over": [
            "seeds and texts" if test == "both" and found.corrected else test
            for (_, found), test in zip(compared, tests, strict=True)
        ],
    }
    return _make_table("Exact match, paired by seed and problem", columns)


def cost_table(found: Sequence[ArmCost]) -> Table:
    """Per arm: time, memory, disk."""
    columns = {
        "arm": [cost.arm for cost in found],
        "time": [format_duration(cost.seconds) for cost in found],
        "memory": [words.optional_bytes(cost.memory_bytes) for cost in found],
        "accelerator memory": [words.optional_bytes(cost.device_bytes) for cost in found],
        "disk": [words.optional_bytes(cost.disk_bytes) for cost in found],
    }
    return _make_table("Cost of one run: means over an arm's seeds", columns)


def savings(found: Sequence[TeacherCost]) -> Table | None:
    """Per teacher: what the store cost, and what it saved."""
    if not found:
        return None
    columns = {
        "teacher": [cost.teacher for cost in found],
        "read once in": [format_duration(cost.seconds) for cost in found],
        "stored": [words.optional_bytes(cost.disk_bytes) for cost in found],
        "epochs that used it": [words.format_number(cost.passes, 1) for cost in found],
        "reading saved": [format_duration(cost.saved_seconds) for cost in found],
    }
    return _make_table("What the store saved", columns)


def settings(study: Study) -> Table | None:
    """Settings that are not the same in every arm: what the comparison is about.

    A teacher's settings are compared among the arms that have it; who has it is one line.
    """
    flat = {arm.name: flatten(arm.config) for arm in study.arms}
    for arm in study.arms:
        flat[arm.name]["teachers"] = ", ".join(arm.config["teachers"]) or words.NONE
    skipped = ("name", "seed", "output_dir", "slurm.")
    keys = sorted({key for found in flat.values() for key in found if not key.startswith(skipped)})
    differing = [key for key in keys if _differs(key, list(flat.values()))]
    if not differing:
        return None
    columns: dict[str, list[str]] = {"setting": differing}
    for arm in study.arms:
        columns[shown(arm)] = [_value(flat[arm.name], key) for key in differing]
    return _make_table("What differs between the arms", columns)


def _differs(key: str, flat: Sequence[Mapping[str, Any]]) -> bool:
    asked = [found for found in flat if key in found] if key.startswith("teachers.") else flat
    return len({json.dumps(found.get(key)) for found in asked}) > 1


def provenance(study: Study, numbers: Mapping[int, int]) -> Table:
    """Every run: where it came from."""
    runs = [(arm, run) for arm in study.arms for run in arm.runs]
    last = [run.record["attempts"][-1] for _, run in runs]
    columns = {
        "run": [f"{numbers[id(run)]}: {run.name}" for _, run in runs],
        "arm": [shown(arm) for arm, _ in runs],
        "seed": [str(run.seed) for _, run in runs],
        "steps": [str(run.record["steps"]) for _, run in runs],
        "commit": [commit(run) for _, run in runs],
        "config": [config_hash(run) for _, run in runs],
        "started": [attempt["started"] for attempt in last],
        "versions": [", ".join(f"{k} {v}" for k, v in a["versions"].items()) for a in last],
        "command": [attempt["command"] for attempt in last],
    }
    anchors = tuple(f"run-{numbers[id(run)]}" for _, run in runs)
    made = _make_table("Every run, and what made it", columns)
    return Table(made.caption, made.columns, made.rows, anchors)


def commit(run: Run) -> str:
    """Short commit of the last attempt; it says so where tracked files differed from it."""
    found = run.record["attempts"][-1]["git_commit"] or "not a checkout"
    return str(found).replace(found[:40], found[:10]) if len(found) >= 40 else str(found)


def config_hash(run: Run) -> str:
    """Short SHA-256 of a run's whole configuration, seed and name included."""
    return hashlib.sha256(json.dumps(run.config, sort_keys=True).encode()).hexdigest()[:10]


def _p(found: Comparison, test: str) -> str:
    if test not in found.p:
        return words.NONE
    return f"{words.p_value(found.p[test])} ({words.p_value(found.corrected[test])})"


def _value(flat: Mapping[str, Any], key: str) -> str:
    return words.NONE if flat.get(key) is None else str(flat[key])


def _make_table(caption: str, columns: Mapping[str, Sequence[str]]) -> Table:
    """Columns that say nothing in any row are left out."""
    kept = {
        name: cells
        for position, (name, cells) in enumerate(columns.items())
        if position == 0 or any(cell not in {"", words.NONE} for cell in cells)
    }
    return Table(caption, tuple(kept), tuple(zip(*kept.values(), strict=True)))
