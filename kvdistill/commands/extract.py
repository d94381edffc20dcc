"""``kvdistill extract``: stage 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvdistill.commands.options import config_argument, json_option, overrides_option
from kvdistill.commands.spread import Spread, extract_task, spread_extraction, spread_options

if TYPE_CHECKING:
    from kvdistill.pipelines.extract import ExtractionReport


@click.command("extract")
@config_argument
@overrides_option
@json_option
@click.option("--teacher", "teachers", multiple=True, help="Only this teacher; repeat for more.")
@click.option("--task", type=int, help="Do only this share of the shards, counted from 0.")
@click.option("--num-tasks", default=1, show_default=True, help="How many shares there are.")
@spread_options
def extract_command(
    *,
    config: Path,
    overrides: tuple[str, ...],
    as_json: bool,
    teachers: tuple[str, ...],
    task: int | None,
    num_tasks: int,
    spread: Spread,
) -> None:
    """Stage 1: read every teacher once into the store.

    Committed shards are skipped, so running again continues, or does nothing.
    """
    from kvdistill.commands.options import extraction_bars
    from kvdistill.config.load import load_experiment

    experiment = load_experiment(config, overrides)
    if task is not None:
        share = {"task": task, "num_tasks": num_tasks, "workers": spread.workers or 1}
        extract_task(experiment, teachers, **share)
        return
    if spread.wanted:
        spread_extraction(experiment, config, teachers, spread)
        return
    # Not above: it brings torch, and submitting needs none.
    from kvdistill.pipelines.extract import extract as run

    with extraction_bars(quiet=as_json) as progress:
        report = run(experiment, teachers or None, progress=progress)
    if as_json:
        click.echo(json.dumps(_as_dict(report)))
        return
    print_report(report)
    if report.complete:
        click.echo(f"next: kvdistill train {config}")


def print_report(report: ExtractionReport) -> None:
    """Say what an extraction did, and what is still missing."""
    for teacher in report.teachers:
        click.echo(_report_line(teacher))
    if report.complete:
        click.echo(f"{report.store} is complete")
    else:
        left = ", ".join(f"{count} of {name}" for name, count in report.missing.items() if count)
        click.echo(f"{report.store}: shards still missing: {left}")


def _as_dict(report: Any) -> dict[str, Any]:
    return {
        "store": str(report.store),
        "complete": report.complete,
        "missing": report.missing,
        "teachers": [vars(teacher) for teacher in report.teachers],
    }


def _report_line(teacher: Any) -> str:
    if not teacher.shards:
        return f"{teacher.teacher}: nothing to do, {teacher.already_done} shards are there"
    rate = teacher.tokens / max(teacher.seconds, 1e-9)
    notes = [f"{teacher.already_done} were there"] if teacher.already_done else []
    notes += [f"{teacher.truncated} texts truncated"] if teacher.truncated else []
    notes += [f"{teacher.skipped} texts skipped"] if teacher.skipped else []
    extra = f" ({', '.join(notes)})" if notes else ""
    return (
        f"{teacher.teacher}: {teacher.shards} shards, {teacher.tokens:,} tokens in "
        f"{teacher.seconds:.1f} s, {rate:,.0f} tokens/s{extra}"
    )
