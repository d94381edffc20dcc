"""``kvdistill extract``, and the distribution of extraction that ``run`` shares."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvdistill.commands.options import (
    Execution,
    config_argument,
    execution_options,
    json_option,
    overrides_option,
    teachers_option,
)
from kvdistill.config.experiment import Experiment
from kvdistill.config.load import load_experiment
from kvdistill.errors import ConfigError, IncompleteStore
from kvdistill.pipelines.extract_tasks import extract_pool, extract_share, submit_extraction
from kvdistill.pipelines.run import batch_scripts, choose_profile, ensure_training, write_scripts
from kvdistill.slurm.retry import exit_task

if TYPE_CHECKING:
    from kvdistill.pipelines.extract import ExtractionReport, TeacherReport


@click.command("extract")
@config_argument
@overrides_option
@json_option
@teachers_option
@click.option("--task", type=int, help="Extract only this share of the shards, counted from 0.")
@click.option("--num-tasks", default=1, show_default=True, help="Number of shares.")
@execution_options
def extract_command(
    *,
    config: Path,
    overrides: tuple[str, ...],
    as_json: bool,
    teachers: tuple[str, ...],
    task: int | None,
    num_tasks: int,
    execution: Execution,
) -> None:
    """Stage 1: read the corpus once with every teacher, into the store.

    Committed shards are skipped, so running again continues, or does nothing.
    """
    experiment = load_experiment(config, overrides)
    if task is not None:
        _extract_share(experiment, teachers, task, num_tasks, execution.workers or 1)
        return
    if not execution.in_this_process:
        distribute(experiment, config, teachers, execution)
        return
    # Not above: it imports torch, which a submission does without.
    from kvdistill.pipelines.extract import extract

    is_first = os.environ.get("RANK", "0") == "0"  # of processes that read a teacher together
    with extraction_progress(quiet=as_json or not is_first) as progress:
        report = extract(experiment, teachers or None, progress=progress)
    if not is_first:
        return
    if as_json:
        body = asdict(report) | {"store": str(report.store), "complete": report.complete}
        click.echo(json.dumps(body))
        return
    print_extraction(report)
    if report.complete:
        click.echo(f"next: kvdistill train {config}")


def print_extraction(report: ExtractionReport) -> None:
    """Print what an extraction did, and what is still missing."""
    for teacher in report.teachers:
        click.echo(_report_line(teacher))
    if report.complete:
        click.echo(f"{report.store} is complete")
    else:
        left = ", ".join(f"{count} of {name}" for name, count in report.missing.items() if count)
        click.echo(f"{report.store}: shards still missing: {left}")


def _report_line(teacher: TeacherReport) -> str:
    if not teacher.shards:
        return f"{teacher.teacher}: nothing to do, all {teacher.already_done} shards are committed"
    rate = teacher.tokens / max(teacher.seconds, 1e-9)
    notes = [f"{teacher.already_done} were committed before"] if teacher.already_done else []
    notes += [f"{teacher.truncated} samples truncated"] if teacher.truncated else []
    notes += [f"{teacher.windowed} samples read in windows"] if teacher.windowed else []
    notes += [f"{teacher.skipped} samples skipped"] if teacher.skipped else []
    extra = f" ({', '.join(notes)})" if notes else ""
    return (
        f"{teacher.teacher}: {teacher.shards} shards, {teacher.tokens:,} tokens in "
        f"{teacher.seconds:.1f} s, {rate:,.0f} tokens/s{extra}"
    )


def _extract_share(
    experiment: Experiment, teachers: Sequence[str], task: int, num_tasks: int, workers: int
) -> None:
    """One task's share, as written scripts run it; exits with the worker's code."""
    profiles = experiment.slurm.profiles
    restarts = choose_profile(experiment, None, "extract").max_restarts if profiles else 0
    endings = []
    for name in teachers or experiment.teachers:
        endings.append(extract_share(experiment, name, task, num_tasks, workers))
        click.echo(f"{name}: {endings[-1].message}")
        if endings[-1].outcome == "interrupted":
            break
    exit_task(max(endings, key=lambda ending: (ending.again, ending.exit_code)), restarts)


def distribute(
    experiment: Experiment,
    config: Path,
    teachers: Sequence[str],
    execution: Execution,
    *,
    train: bool = False,
) -> None:
    """Extract (on Slurm also train, if ``train``) outside this process, as ``execution`` has it.

    Raises:
        ConfigError: no such profile or teacher.
        SlurmError: no Slurm here, or it refused.
        IncompleteStore: local workers left shards undone.
        Interrupted: a signal stopped the local workers.
    """
    names = list(teachers or experiment.teachers)
    if unknown := set(names) - set(experiment.teachers):
        raise ConfigError(f"no teacher {sorted(unknown)}; the config has {[*experiment.teachers]}")
    if execution.on_this_machine:
        _extract_in_pool(experiment, names, execution.workers or 1)
    elif execution.dry_run or execution.write_sbatch is not None:
        _batch_scripts(experiment, config, names, execution, train)
    else:
        _submit(experiment, config, names, execution.profile, train)


def _batch_scripts(
    experiment: Experiment, config: Path, names: Sequence[str], execution: Execution, train: bool
) -> None:
    scripts = batch_scripts(experiment, config, names, execution.profile, train=train)
    folder = execution.write_sbatch
    if folder is None:
        click.echo("\n".join(f"# {name}\n{text}" for name, text in scripts.items()))
        return
    write_scripts(experiment, scripts, names, folder)
    click.echo(f"wrote {', '.join(scripts)} to {folder}")
    click.echo(f"next: sbatch {folder / next(iter(scripts))}")


def _submit(
    experiment: Experiment, config: Path, names: Sequence[str], profile: str | None, train: bool
) -> None:
    chosen = choose_profile(experiment, profile, "extract")
    ids: list[str] = []
    for name, (pending, job_ids, elements) in submit_extraction(experiment, names, chosen).items():
        jobs = f"job {', '.join(job_ids)}" if job_ids else "nothing to submit"
        parts = [f"{len(pending.units)} shards in {elements} tasks"] if job_ids else []
        parts += [f"{len(pending.queued)} already queued"] if pending.queued else []
        failed = len(pending.quarantined)
        parts += [f"{failed} quarantined (see status)"] if failed else []
        click.echo(f"{name}: {jobs}" + (f": {'; '.join(parts)}" if parts else ""))
        ids += job_ids
    if train:
        click.echo(f"training: {ensure_training(experiment, names, profile, ids)}")
    click.echo(f"next: kvdistill status {config} --watch")


def _extract_in_pool(experiment: Experiment, names: Sequence[str], workers: int) -> None:
    left: dict[str, int] = {}
    for name in names:
        missing, messages = extract_pool(experiment, name, workers, _pool_progress(name))
        click.echo(f"{name}: {f'{missing} shards missing' if missing else 'complete'}")
        if missing:
            left[name] = missing
            for message in messages:
                click.echo(f"  {message}", err=True)
    if left:
        raise IncompleteStore(f"{experiment.store}: shards missing: {left}; see `kvdistill status`")


def _pool_progress(teacher: str) -> Callable[[int, int], None]:
    """A callback that prints the number of committed shards whenever it changes."""
    shown = -1
    terminal = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        nonlocal shown
        if done != shown:
            shown = done
            start = "\r" if terminal else ""
            newline = not terminal or done >= total
            click.echo(f"{start}{teacher} {done}/{total} shards", err=True, nl=newline)

    return show


@contextmanager
def extraction_progress(quiet: bool = False) -> Iterator[Callable[[Any], None]]:
    """Yield the ``progress`` of ``pipelines.extract.extract``.

    On a terminal, one bar per teacher; otherwise one line per committed shard. Both show the
    teacher's rate so far: a shard is written while the next one is read, so none has a rate.
    """
    tokens: dict[str, int] = {}
    began: dict[str, float] = {}

    def rate(news: Any) -> str:
        now, name = time.monotonic(), news.teacher
        if name not in began:  # the first batch began before anything was reported
            began[name], tokens[name] = now, 0
            return ""
        tokens[name] += news.tokens
        return f"{tokens[name] / max(now - began[name], 1e-9):,.0f} tokens/s"

    def print_line(news: Any) -> None:
        speed = rate(news)
        if news.committed:
            done = f"{news.teacher} {news.shards_done}/{news.shards_total} shard {news.shard_id}"
            click.echo(f"{done} committed{speed and ', '}{speed}", err=True)

    if quiet:
        yield lambda news: None
    elif sys.stderr.isatty():
        with _bars(rate) as move_bar:
            yield move_bar
    else:
        yield print_line


@contextmanager
def _bars(rate: Callable[[Any], str]) -> Iterator[Callable[[Any], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards  {task.fields[rate]:>18}"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        rows: dict[str, Any] = {}

        def move_bar(news: Any) -> None:
            if news.teacher not in rows:
                rows[news.teacher] = bars.add_task(news.teacher, total=news.shards_total, rate="")
            bars.update(rows[news.teacher], completed=news.shards_done, rate=rate(news))

        yield move_bar
