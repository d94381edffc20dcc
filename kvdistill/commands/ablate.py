"""``kvdistill ablate``: arms times seeds from one store, here or on Slurm, compared fairly."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvdistill.commands.options import json_option, overrides_option
from kvdistill.errors import ConfigError, IncompleteStore, Interrupted, StoreNotFound

if TYPE_CHECKING:
    from kvdistill.studies.study import StudyPlan, StudyRun


@click.command("ablate")
@click.argument("study", type=click.Path(path_type=Path))
@overrides_option
@json_option
@click.option("--arm", "arms", multiple=True, help="Only this arm; repeat for more.")
@click.option("--extract", is_flag=True, help="First extract what the store lacks, here.")
@click.option("--workers", type=click.IntRange(min=1), help="Runs at a time, a process each.")
@click.option("--slurm", is_flag=True, help="Submit to Slurm, as one array of runs.")
@click.option("--profile", help="A profile of the experiment's slurm.profiles.")
@click.option("--dry-run", is_flag=True, help="Check everything, say what would run.")
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

    Finished runs are never computed again and interrupted ones go on, so the same command
    continues. Arms that differ in more than they state are refused before anything starts.
    """
    from kvdistill.studies.controls import check_folders, check_records, check_settings
    from kvdistill.studies.study import load_study, select_runs, write_record

    if profile is not None and not slurm:
        raise ConfigError("--profile needs --slurm")
    plan = load_study(study, overrides)
    check_settings(plan)
    check_folders(plan)
    todo = [run for run in select_runs(plan, arms) if not run.is_finished]
    if dry_run:
        _say_plan(plan, todo, as_json)
        return
    if extract:
        _extract(plan)
    _check_stores(plan, study)
    write_record(plan)
    if slurm:
        _submit_runs(plan, todo, profile, study)
        return
    _train(plan, todo, workers or 1)
    check_records(plan)
    _say_outcome(plan, as_json)


def _extract(plan: StudyPlan) -> None:
    from kvdistill.pipelines.extract import extract

    experiment = plan.experiment_of_all_teachers()
    if experiment.teachers:
        extract(experiment)


def _check_stores(plan: StudyPlan, study: Path) -> None:
    """Better said once here than by every run."""
    from kvdistill.store.reader import KVStore

    experiment = plan.experiment_of_all_teachers()
    remedy = f"run `kvdistill ablate {study} --extract`"
    try:
        store = KVStore.open(experiment.store)
    except StoreNotFound:
        raise StoreNotFound(
            f"{study}: there is no store at {experiment.store} yet; {remedy}"
        ) from None
    for name in experiment.teachers:
        if name not in store.teachers() or store.missing(name):
            raise IncompleteStore(
                f"{store.paths.root} lacks shards of teacher {name!r}, which arms of {study} learn "
                f"from; {remedy}"
            )


def _train(plan: StudyPlan, todo: Sequence[StudyRun], workers: int) -> None:
    from kvdistill.pipelines.train import train

    if workers > 1 and len(todo) > 1:
        _train_in_pool(plan, todo, workers)
        return
    for number, run in enumerate(todo, start=1):
        click.echo(f"run {number} of {len(todo)}: {run.arm}, seed {run.seed}", err=True)
        train(run.experiment)


def _train_in_pool(plan: StudyPlan, todo: Sequence[StudyRun], workers: int) -> None:
    from kvdistill.slurm.ledger import Ledger
    from kvdistill.slurm.local_pool import run_pool
    from kvdistill.studies.runs import ablation_tasks

    ending = run_pool(ablation_tasks(plan, todo, workers))
    if ending.outcome == "interrupted":
        raise Interrupted(f"{ending.message}; run the same command again to continue")
    left = [run.name for run in todo if not run.is_finished]
    for name in left:
        for failure in Ledger(plan.folder).failures(name)[-1:]:
            click.echo(f"{name}: {failure.message}", err=True)
    if left:
        raise ConfigError(
            f"{len(left)} of {len(todo)} runs did not finish (first: {left[0]}); what went wrong "
            f"is above and under {plan.folder / 'failures'}"
        )


def _submit_runs(
    plan: StudyPlan, todo: Sequence[StudyRun], profile: str | None, study: Path
) -> None:
    from kvdistill.pipelines.distribute import choose_profile, num_tasks, units_in_queue
    from kvdistill.slurm import client
    from kvdistill.slurm.ledger import Ledger
    from kvdistill.slurm.submit import submit_array
    from kvdistill.studies.runs import ablation_tasks

    client.require()
    chosen = choose_profile(plan.runs[0].experiment, profile, "train")
    queued = units_in_queue(Ledger(plan.folder.absolute()))
    runs = [run for run in todo if run.name not in queued]
    if queued:
        click.echo(f"{len(queued)} runs are queued already")
    if not runs:
        click.echo("nothing to submit")
        return
    tasks = ablation_tasks(plan, runs, num_tasks(chosen), float(chosen.signal_delay_s))
    ids = submit_array(tasks, chosen, f"kv-{plan.config.name}")
    click.echo(f"job {', '.join(ids)}: {len(runs)} runs in {len(tasks)} tasks")
    click.echo(f"next: kvdistill ablate {study}, once they have ended, then kvdistill report")


def _say_plan(plan: StudyPlan, todo: Sequence[StudyRun], as_json: bool) -> None:
    if as_json:
        body = {
            "folder": str(plan.folder),
            "arms": {name: arm.model_dump(mode="json") for name, arm in plan.arms.items()},
            "missing": [run.name for run in todo],
        }
        click.echo(json.dumps(body))
        return
    for name, arm in plan.arms.items():
        settings = ", ".join(f"{k}={v}" for k, v in arm.settings.items()) or "as the experiment"
        teachers = "" if arm.teachers is None else f" · teachers: {', '.join(arm.teachers) or '-'}"
        click.echo(f"{name}: {arm.description or settings}{teachers}")
    seeds = ", ".join(map(str, plan.config.seeds))
    click.echo(
        f"{len(plan.arms)} arms under the seeds {seeds}: {len(plan.runs)} runs, {len(todo)} to do"
    )


def _say_outcome(plan: StudyPlan, as_json: bool) -> None:
    finished = [run for run in plan.runs if run.is_finished]
    if as_json:
        body = {run.name: run.folder.read_record()["metrics"] for run in finished}
        json.dump({"folder": str(plan.folder), "metrics": body}, sys.stdout)
        click.echo()
        return
    click.echo(f"{len(finished)} of {len(plan.runs)} runs are finished, and comparable")
    click.echo(f"next: kvdistill report {plan.folder}")
