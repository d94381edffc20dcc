"""``kvdistill ablate``: arms times seeds from one store, here or on Slurm, compared fairly."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import click

from kvdistill.commands.options import end_with_report, json_option, overrides_option
from kvdistill.errors import ConfigError
from kvdistill.studies import controls, design, runs
from kvdistill.studies.design import StudyDesign, StudyRun


@click.command("ablate")
@click.argument("study", type=click.Path(path_type=Path))
@overrides_option
@json_option
@click.option("--arm", "arms", multiple=True, help="Only this arm; repeat for more.")
@click.option("--extract", is_flag=True, help="First extract what the store lacks, here.")
@click.option("--workers", type=click.IntRange(min=1), help="Concurrent runs, a process each.")
@click.option("--slurm", is_flag=True, help="Submit to Slurm, as one array of runs.")
@click.option("--profile", help="A profile of the experiment's slurm.profiles.")
@click.option("--dry-run", is_flag=True, help="Check everything and print what would run.")
def ablate_command(
    study: Path,
    overrides: tuple[str, ...],
    as_json: bool,
    arms: tuple[str, ...],
    extract: bool,
    workers: int | None,
    slurm: bool,
    profile: str | None,
    dry_run: bool,
) -> None:
    """Train every arm of STUDY under every seed, from one store.

    Finished runs are never computed again and interrupted ones resume, so the same command
    continues. Arms that differ in more than they state are refused before anything starts.
    """
    if profile is not None and not slurm:
        raise ConfigError("--profile needs --slurm")
    loaded = design.load_study(study, overrides)
    controls.check_settings(loaded)
    controls.check_folders(loaded)
    todo = loaded.missing_of(arms)
    if dry_run:
        _print_design(loaded, todo, as_json)
        return
    if extract:
        runs.extract_teachers(loaded)
    runs.require_teachers(loaded, study)
    design.write_record(loaded)
    if slurm:
        if runs.submit_runs(loaded, todo, profile, click.echo):
            click.echo(f"next, once they have ended: kvdistill ablate {study}, kvdistill report")
        return
    runs.train_runs(loaded, todo, workers or 1, functools.partial(click.echo, err=True))
    controls.check_records(loaded)
    _print_outcome(loaded, as_json)


def _print_design(study: StudyDesign, todo: Sequence[StudyRun], as_json: bool) -> None:
    if as_json:
        body = {
            "folder": str(study.folder),
            "arms": {name: arm.model_dump(mode="json") for name, arm in study.arms.items()},
            "missing": [run.name for run in todo],
        }
        click.echo(json.dumps(body))
        return
    for name, arm in study.arms.items():
        settings = ", ".join(f"{k}={v}" for k, v in arm.settings.items()) or "as the experiment"
        teachers = "" if arm.teachers is None else f" · teachers: {', '.join(arm.teachers) or '-'}"
        click.echo(f"{name}: {arm.description or settings}{teachers}")
    seeds = ", ".join(map(str, study.config.seeds))
    click.echo(f"{len(study.arms)} arms × seeds {seeds}: {len(study.runs)} runs, {len(todo)} to do")


def _print_outcome(study: StudyDesign, as_json: bool) -> None:
    finished = [run for run in study.runs if run.is_finished]
    if as_json:
        body = {run.name: run.folder.read_record()["metrics"] for run in finished}
        click.echo(json.dumps({"folder": str(study.folder), "metrics": body}))
        return
    click.echo(f"{len(finished)} of {len(study.runs)} runs are finished, and comparable")
    if finished:
        end_with_report([study.folder], study.folder / "report.html")
