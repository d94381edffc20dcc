"""The options that spread work over processes, for ``kvdistill extract`` and ``run``."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvdistill.errors import ConfigError, IncompleteStore, Interrupted

if TYPE_CHECKING:
    from kvdistill.config.experiment import Experiment
    from kvdistill.pipelines.distribute import Submitted


@dataclass(frozen=True)
class Spread:
    """How the work is spread; with nothing set it is done in this process."""

    workers: int | None = None
    slurm: bool = False
    profile: str | None = None
    dry_run: bool = False
    write_sbatch: Path | None = None

    @property
    def wanted(self) -> bool:
        """Whether anything but this one process is asked for."""
        return bool(self.workers or self.slurm or self.dry_run or self.write_sbatch)

    @property
    def local(self) -> bool:
        """Whether the work is done on this machine, and done when the command returns."""
        return not (self.slurm or self.dry_run or self.write_sbatch)


def spread_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options and pass them on as one ``spread``."""

    @click.option("--workers", type=click.IntRange(min=1), help="Worker processes, a GPU each.")
    @click.option("--slurm", is_flag=True, help="Submit to Slurm: one array per teacher.")
    @click.option("--profile", help="A profile of the config's slurm.profiles.")
    @click.option("--dry-run", is_flag=True, help="Print the batch scripts, submit nothing.")
    @click.option(
        "--write-sbatch",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Write batch scripts to submit by hand.",
    )
    @functools.wraps(command)
    def wrapped(
        *,
        workers: int | None,
        slurm: bool,
        profile: str | None,
        dry_run: bool,
        write_sbatch: Path | None,
        **others: Any,
    ) -> Any:
        if profile is not None and not (slurm or dry_run or write_sbatch):
            raise ConfigError("--profile needs --slurm, --dry-run or --write-sbatch")
        spread = Spread(workers, slurm, profile, dry_run, write_sbatch)
        return command(spread=spread, **others)

    return wrapped


def spread_extraction(
    experiment: Experiment,
    config: Path,
    teachers: Sequence[str],
    spread: Spread,
    *,
    train: bool = False,
) -> list[str]:
    """Extract (and train, if asked) as ``spread`` says; returns the ids of submitted arrays.

    Raises:
        ConfigError: no such profile or teacher.
        SlurmError: Slurm is asked for and not there, or refused.
        IncompleteStore: workers here left something undone.
        Interrupted: a signal stopped the workers.
    """
    names = list(teachers or experiment.teachers)
    strangers = set(names) - set(experiment.teachers)
    if strangers:
        raise ConfigError(
            f"no teacher {sorted(strangers)}; there are {sorted(experiment.teachers)}"
        )
    if spread.dry_run or spread.write_sbatch is not None:
        _scripts(experiment, config, names, spread, train)
        return []
    if spread.slurm:
        return _submit_arrays(experiment, config, names, spread, train)
    _extract_in_pool(experiment, names, spread.workers or 1)
    return []


def extract_task(
    experiment: Experiment,
    teachers: Sequence[str],
    *,
    task: int,
    num_tasks: int,
    workers: int,
) -> None:
    """One task's share, as written scripts run it; leaves with the worker's exit code."""
    from kvdistill.pipelines.distribute import choose_profile, extract_share
    from kvdistill.slurm.submit import leave

    profiles = experiment.slurm.profiles
    restarts = choose_profile(experiment, None, "extract").max_restarts if profiles else 0
    endings = []
    for name in teachers or experiment.teachers:
        endings.append(extract_share(experiment, name, task, num_tasks, workers))
        click.echo(f"{name}: {endings[-1].message}")
        if endings[-1].outcome == "interrupted":
            break
    leave(max(endings, key=lambda ending: (ending.again, ending.exit_code)), restarts)


def _scripts(
    experiment: Experiment, config: Path, names: Sequence[str], spread: Spread, train: bool
) -> None:
    from kvdistill.pipelines import distribute

    profile = distribute.choose_profile(experiment, spread.profile, "extract")
    scripts = {
        f"extract-{name}.sbatch": distribute.extraction_script(experiment, name, profile, config)
        for name in names
    }
    if train:
        trainer = distribute.choose_profile(experiment, spread.profile, "train")
        scripts["train.sbatch"] = distribute.training_script(experiment, trainer, config)
    folder = spread.write_sbatch
    if folder is None:
        click.echo("\n".join(f"# {name}\n{text}" for name, text in scripts.items()))
        return
    distribute.make_log_folders(experiment, names)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(text, encoding="utf-8")
    click.echo(f"wrote {', '.join(scripts)} to {folder}")
    click.echo(f"next: sbatch {folder / next(iter(scripts))}")


def _submit_arrays(
    experiment: Experiment, config: Path, names: Sequence[str], spread: Spread, train: bool
) -> list[str]:
    from kvdistill.slurm import client

    client.require()
    from kvdistill.pipelines import distribute

    profile = distribute.choose_profile(experiment, spread.profile, "extract")
    submitted = distribute.submit_extraction(experiment, names, profile)
    for each in submitted:
        click.echo(_submitted_line(each))
    ids = [job_id for each in submitted for job_id in each.job_ids]
    if train:
        trainer = distribute.choose_profile(experiment, spread.profile, "train")
        after = sorted({*ids, *distribute.queued_jobs(experiment, names)})
        click.echo(f"training: {distribute.ensure_training(experiment, trainer, after)}")
    click.echo(f"next: kvdistill status {config} --watch")
    return ids


def _submitted_line(each: Submitted) -> str:
    plan = each.plan
    jobs = f"job {', '.join(each.job_ids)}" if each.job_ids else "nothing to submit"
    parts = [f"{len(plan.units)} shards in {each.elements} tasks"] if each.job_ids else []
    parts += [f"{len(plan.queued)} are queued already"] if plan.queued else []
    parts += [f"{len(plan.quarantined)} quarantined (see status)"] if plan.quarantined else []
    return f"{plan.teacher}: {jobs}" + (f": {'; '.join(parts)}" if parts else "")


def _extract_in_pool(experiment: Experiment, names: Sequence[str], workers: int) -> None:
    from kvdistill.pipelines.distribute import extract_pool, pending_shards
    from kvdistill.pipelines.extract_tasks import pool_progress

    left: dict[str, int] = {}
    for name in names:
        began = time.time()
        with pool_progress(experiment, name, sys.stderr) as on_poll:
            ending = extract_pool(experiment, name, workers, on_poll)
        if ending.outcome == "interrupted":
            raise Interrupted(f"{ending.message}; run the same command again to continue")
        plan = pending_shards(experiment, name, ask_slurm=False)
        missing = len(plan.units) + len(plan.quarantined)
        click.echo(f"{name}: {f'{missing} shards missing' if missing else 'complete'}")
        if missing:
            left[name] = missing
            _say_why(experiment, name, began)
    if left:
        raise IncompleteStore(f"{experiment.store}: shards missing: {left}; see kvdistill status")


def _say_why(experiment: Experiment, name: str, began: float) -> None:
    """Messages of workers that could not start, and of what failed, each once."""
    from kvdistill.pipelines.extract_tasks import ledger_of

    ledger = ledger_of(experiment, name)
    failed = [a for a in ledger.attempts() if a.started >= began and a.outcome == "failed"]
    failures = [f for found in ledger.failed_units().values() for f in found if f.time >= began]
    for message in dict.fromkeys([a.message for a in failed] + [f.message for f in failures]):
        click.echo(f"  {message}", err=True)
