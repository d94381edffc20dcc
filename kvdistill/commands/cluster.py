"""``kvdistill status``, ``logs``, ``retry``, ``cancel`` and ``dask``: looking after many tasks."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from kvdistill.commands.options import (
    Decorator,
    Location,
    config_argument,
    json_option,
    overrides_option,
    teachers_option,
)
from kvdistill.config.load import load_experiment
from kvdistill.errors import IncompleteStore
from kvdistill.pipelines.cluster import (
    Overview,
    TeacherOverview,
    cancel_jobs,
    clear_failures,
    overview,
)
from kvdistill.pipelines.run import choose_profile
from kvdistill.slurm.ledger import Failure
from kvdistill.slurm.signals import stop_flag
from kvdistill.slurm.status import UNIT_STATES
from kvdistill.slurm.submit import dask_cluster
from kvdistill.text import format_bytes, format_duration

SHOWN: Final = 8
"""Shards that are listed individually, so that many failures still fit a screen."""

target_argument: Decorator = click.argument("target", type=Location())


@click.command("status")
@target_argument
@overrides_option
@teachers_option
@json_option
@click.option("--watch", is_flag=True, help="Refresh every few seconds until all shards are done.")
@click.option("--check", is_flag=True, help="Exit with 3 if any shard is missing.")
def status_command(
    target: Path | str,
    overrides: tuple[str, ...],
    teachers: tuple[str, ...],
    as_json: bool,
    watch: bool,
    check: bool,
) -> None:
    """Show what is done and what is missing in TARGET: an experiment file or a store.

    The store's folder is read; Slurm, where there is one, only adds why jobs are pending.
    """
    while True:
        seen = overview(target, overrides, teachers)
        if watch and sys.stdout.isatty():
            click.clear()
        click.echo(json.dumps(seen.as_dict()) if as_json else "\n".join(_lines(seen, target)))
        if not watch or seen.is_complete:
            break
        time.sleep(5)
    if check and not seen.is_complete:
        left = ", ".join(f"{count} of {name}" for name, count in seen.missing().items())
        raise IncompleteStore(f"{seen.store}: shards missing: {left}; run `kvdistill extract`")


@click.command("logs")
@target_argument
@click.argument("units", metavar="[SHARDS]...", nargs=-1)
@overrides_option
@teachers_option
@click.option("--lines", default=20, show_default=True, help="Lines of each log.")
def logs_command(
    target: Path | str,
    units: tuple[str, ...],
    overrides: tuple[str, ...],
    teachers: tuple[str, ...],
    lines: int,
) -> None:
    """Show tracebacks and the last log lines of failed shards (or of SHARDS) in TARGET."""
    seen = overview(target, overrides, teachers)
    for each in seen.teachers:
        for attempt in each.status.broken:
            click.echo(f"{each.teacher}: task {attempt.task} {attempt.message}")
            click.echo(attempt.traceback or _tail(attempt.log, lines))
        failed = tuple(each.status.failures)
        for unit in units or failed[:SHOWN]:
            for failure in each.ledger.failures(unit)[-1:]:
                click.echo(f"{each.teacher} {_failure_line(failure)}")
                click.echo(failure.traceback or _tail(failure.log, lines))
        if rest := () if units else failed[SHOWN:]:
            names = " ".join(rest[:SHOWN]) + (" …" if len(rest) > SHOWN else "")
            click.echo(f"{each.teacher}: {len(rest)} more; name them to see them: {names}")
    if seen.training_log is not None and not (units or teachers):
        click.echo(f"training: {seen.training}\n{_tail(str(seen.training_log), lines)}")


@click.command("retry")
@target_argument
@click.argument("units", metavar="[SHARDS]...", nargs=-1)
@overrides_option
@teachers_option
def retry_command(
    target: Path | str,
    units: tuple[str, ...],
    overrides: tuple[str, ...],
    teachers: tuple[str, ...],
) -> None:
    """Clear the failures of quarantined shards (or of SHARDS), so that they are retried."""
    cleared = clear_failures(overview(target, overrides, teachers), units)
    for teacher, unit, count in cleared:
        click.echo(f"{teacher} {unit}: {count} failures cleared")
    click.echo(f"{len(cleared)} shards will be retried; next: the same `kvdistill extract` command")


@click.command("cancel")
@target_argument
@overrides_option
@teachers_option
def cancel_command(target: Path, overrides: tuple[str, ...], teachers: tuple[str, ...]) -> None:
    """Cancel the queued and running jobs of TARGET. Committed shards stay."""
    cancelled = cancel_jobs(target, overrides, teachers)
    click.echo(f"cancelled {', '.join(cancelled)}" if cancelled else "nothing is queued")


@click.command("dask")
@config_argument
@overrides_option
@click.option("--profile", help="A profile of the config's slurm.profiles.")
@click.option("--jobs", default=4, show_default=True, type=click.IntRange(min=1), help="Workers.")
def dask_command(config: Path, overrides: tuple[str, ...], profile: str | None, jobs: int) -> None:
    """Start Dask workers on Slurm and keep them until interrupted.

    Give the printed address to `kvdistill inspect --scheduler` or `kvdistill verify --scheduler`.
    """
    experiment = load_experiment(config, overrides)
    chosen = choose_profile(experiment, profile, "extract")
    logs = experiment.output_dir.absolute() / "dask"
    with dask_cluster(chosen, jobs, logs) as address, stop_flag(0.0) as stop:
        click.echo(f"{address}\nnext: kvdistill verify {experiment.store} --scheduler {address}")
        while not stop.requested:
            time.sleep(0.5)


def _lines(seen: Overview, target: Path | str) -> Iterator[str]:
    for each in seen.teachers:
        yield from _teacher_lines(each)
    if seen.training is not None:
        yield f"training: {seen.training}"
    if seen.is_complete:
        yield f"{seen.store} is complete"
    elif any(each.status.of("quarantined") for each in seen.teachers):
        yield f"next: kvdistill logs {target}, then kvdistill retry {target}"


def _teacher_lines(each: TeacherOverview) -> Iterator[str]:
    status = each.status
    done = f"{status.count('done')} of {len(status.units)} shards done"
    others = [f"{status.count(s)} {s}" for s in UNIT_STATES if s != "done" and status.count(s)]
    parts = [", ".join([done, *others]), format_bytes(each.stored_bytes)]
    if status.work_per_second:
        parts.append(f"{status.work_per_second:,.0f} tokens/s")
    if status.eta_seconds:
        parts.append(f"about {format_duration(status.eta_seconds)} to go")
    yield f"{each.teacher}: {' · '.join(parts)}"
    if each.difference is not None:
        yield f"  {each.difference}"
    if status.slurm_error is not None:
        yield f"  reasons of pending jobs unknown: {status.slurm_error}"
    for reason, count in Counter(job.reason for job in status.waiting).items():
        held = "held" in reason.lower()
        hint = " (release with `scontrol release`, or run `kvdistill cancel`)" if held else ""
        yield f"  {count} queued: {reason}{hint}"
    for attempt in status.broken:
        yield f"  task {attempt.task} on {attempt.host}: {attempt.message}"
    stale = [f"{unit} stale: {why}" for unit, why in status.stale.items()]
    failed = [
        f"{_failure_line(failures[-1])} ({len(failures)}×, {status.units[unit]})"
        for unit, failures in status.failures.items()
    ]
    yield from (f"  {line}" for line in (stale + failed)[:SHOWN])
    if len(stale + failed) > SHOWN:
        yield f"  and {len(stale + failed) - SHOWN} more; `--json` lists all"
    # A killed worker left no traceback: show the end of its log.
    newest = [failures[-1] for failures in status.failures.values()]
    for log in list(dict.fromkeys(f.log for f in newest if f.traceback is None))[:SHOWN]:
        yield from (f"    {line}" for line in _tail(log, 3).splitlines())


def _failure_line(failure: Failure) -> str:
    where = f" in job {failure.job}" if failure.job else ""
    return f"{failure.unit} {failure.kind.replace('_', ' ')}{where}: {failure.message}"


def _tail(log: str | None, lines: int) -> str:
    if log is None or not Path(log).exists():
        return ""
    text = Path(log).read_bytes()[-200_000:].decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])
