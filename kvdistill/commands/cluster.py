"""``kvdistill status``, ``logs``, ``cancel`` and ``retry``: looking after many tasks."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from kvdistill.commands.options import Decorator, config_argument, json_option, overrides_option
from kvdistill.errors import ConfigError, IncompleteStore
from kvdistill.text import format_bytes, format_duration

if TYPE_CHECKING:
    from kvdistill.pipelines.overview import Overview, TeacherOverview
    from kvdistill.slurm.ledger import Failure, Ledger


WATCH_SECONDS: Final = 5.0


SHOWN: Final = 8
"""How many shards are told one by one, so that a bad day still fits a screen."""


target_argument: Decorator = click.argument("target", type=click.Path(path_type=Path))


teacher_option: Decorator = click.option(
    "--teacher", "teachers", multiple=True, help="Only this teacher; repeat for more."
)


@click.command("status")
@target_argument
@overrides_option
@teacher_option
@json_option
@click.option("--watch", is_flag=True, help="Look again every few seconds until all is done.")
@click.option("--check", is_flag=True, help="Exit with 3 if any shard is missing.")
def status_command(
    target: Path,
    overrides: tuple[str, ...],
    teachers: tuple[str, ...],
    as_json: bool,
    watch: bool,
    check: bool,
) -> None:
    """Say what is done and what is missing in TARGET: an experiment file or a store.

    It reads the store's folder; Slurm, where there is one, is asked only why jobs wait.
    """
    while True:
        seen = _overview(target, overrides, teachers)
        if watch and sys.stdout.isatty():
            click.clear()
        click.echo(json.dumps(seen.as_dict()) if as_json else "\n".join(_lines(seen, target)))
        if not watch or seen.is_complete:
            break
        time.sleep(WATCH_SECONDS)
    if check and not seen.is_complete:
        left = ", ".join(f"{count} of {name}" for name, count in seen.missing().items())
        raise IncompleteStore(f"{seen.store}: shards missing: {left}; run `kvdistill extract`")


@click.command("logs")
@target_argument
@click.argument("units", nargs=-1)
@overrides_option
@teacher_option
@click.option("--lines", default=20, show_default=True, help="Lines of each log.")
def logs_command(
    target: Path,
    units: tuple[str, ...],
    overrides: tuple[str, ...],
    teachers: tuple[str, ...],
    lines: int,
) -> None:
    """Show tracebacks and the last log lines of failed shards (or of UNITS) in TARGET."""
    seen = _overview(target, overrides, teachers)
    for each, ledger in _ledgers(seen):
        for attempt in each.status.broken:
            click.echo(f"{each.teacher}: task {attempt.task} {attempt.message}")
            click.echo(attempt.traceback or _tail(attempt.log, lines))
        wanted = units or tuple(each.status.failures)[:SHOWN]
        for failure in [failures[-1] for unit in wanted if (failures := ledger.failures(unit))]:
            click.echo(f"{each.teacher} {_failure_line(failure)}")
            click.echo(failure.traceback or _tail(failure.log, lines))
        if not units and len(each.status.failures) > SHOWN:
            rest = tuple(each.status.failures)[SHOWN:]
            click.echo(f"{each.teacher}: {len(rest)} more; name them to see them: {_some(rest)}")
    if seen.training_log is not None and not (units or teachers):
        click.echo(f"training: {seen.training}\n{_tail(str(seen.training_log), lines)}")


@click.command("cancel")
@target_argument
@overrides_option
@teacher_option
def cancel_command(target: Path, overrides: tuple[str, ...], teachers: tuple[str, ...]) -> None:
    """Cancel all jobs of TARGET that are still in Slurm's queue. Published shards stay."""
    from kvdistill.config.load import load_experiment
    from kvdistill.pipelines.distribute import training_ledger
    from kvdistill.slurm import client

    client.require()
    ledgers = [ledger for _, ledger in _ledgers(_overview(target, overrides, teachers))]
    if not target.is_dir() and not teachers:
        ledgers.append(training_ledger(load_experiment(target, overrides)))
    ids = {job.job_id for ledger in ledgers for job in ledger.submissions()}
    living = {job.partition("_")[0] for job in client.queue(ids)}
    client.cancel(living)
    click.echo(f"cancelled {', '.join(sorted(living))}" if living else "nothing is queued")


@click.command("retry")
@target_argument
@click.argument("units", nargs=-1)
@overrides_option
@teacher_option
def retry_command(
    target: Path, units: tuple[str, ...], overrides: tuple[str, ...], teachers: tuple[str, ...]
) -> None:
    """Forget the failures of quarantined shards (or of UNITS), so that they are tried again."""
    total = 0
    for each, ledger in _ledgers(_overview(target, overrides, teachers)):
        for unit in units or each.status.of("quarantined"):
            count = ledger.forgive(unit)
            total += bool(count)
            if count:
                click.echo(f"{each.teacher} {unit}: {count} failures forgotten")
    click.echo(f"{total} shards will be tried again; next: the same `kvdistill extract` command")


def _overview(target: Path, overrides: tuple[str, ...], only: tuple[str, ...]) -> Overview:
    from kvdistill.pipelines.overview import overview

    seen = overview(target, overrides, only)
    strangers = set(only) - {each.teacher for each in seen.teachers}
    if strangers:
        raise ConfigError(f"{target} has no teacher {sorted(strangers)}")
    return seen


def _ledgers(seen: Overview) -> Iterator[tuple[TeacherOverview, Ledger]]:
    from kvdistill.slurm.ledger import Ledger
    from kvdistill.store.format import StorePaths

    paths = StorePaths(seen.store.absolute())
    return ((each, Ledger(paths.teacher(each.teacher))) for each in seen.teachers)


def _lines(seen: Overview, target: Path) -> Iterator[str]:
    for each in seen.teachers:
        yield from _teacher_lines(each)
    if seen.training is not None:
        yield f"training: {seen.training}"
    if seen.is_complete:
        yield f"{seen.store} is complete"
    elif any(each.status.of("quarantined") for each in seen.teachers):
        yield f"next: kvdistill logs {target}, then kvdistill retry {target}"


def _teacher_lines(each: TeacherOverview) -> Iterator[str]:
    from kvdistill.slurm.status import UNIT_STATES

    status = each.status
    done = f"{status.count('done')} of {len(status.units)} shards done"
    others = [f"{status.count(s)} {s}" for s in UNIT_STATES if s != "done" and status.count(s)]
    parts = [", ".join([done, *others]), format_bytes(each.stored_bytes)]
    if status.work_per_second:
        parts.append(f"{status.work_per_second:,.0f} tokens/s")
    if status.eta_seconds:
        parts.append(f"about {format_duration(status.eta_seconds)} to go")
    yield f"{each.teacher}: {' · '.join(parts)}"
    if each.is_another:
        yield "  its shards in the store were extracted by other settings than the config's"
    if status.slurm_error is not None:
        yield f"  why jobs wait is unknown: {status.slurm_error}"
    reasons: dict[str, int] = {}
    for job in status.waiting:
        reasons[job.reason] = reasons.get(job.reason, 0) + 1
    for reason, count in reasons.items():
        held = "held" in reason.lower()
        hint = " (let go with `scontrol release`, or `kvdistill cancel` them)" if held else ""
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
        yield f"  and {len(stale + failed) - SHOWN} more; `--json` has them all"
    # An exception is told above; of a worker that was killed only its log knows more.
    mute = [f[-1] for f in status.failures.values() if f[-1].traceback is None]
    for log in list(dict.fromkeys(failure.log for failure in mute))[:SHOWN]:
        yield from (f"    {line}" for line in _tail(log, 3).splitlines())


def _failure_line(failure: Failure) -> str:
    where = f" in job {failure.job}" if failure.job else ""
    return f"{failure.unit} {failure.kind.replace('_', ' ')}{where}: {failure.message}"


def _some(units: tuple[str, ...]) -> str:
    more = " …" if len(units) > SHOWN else ""
    return " ".join(units[:SHOWN]) + more


def _tail(log: str | None, lines: int) -> str:
    if log is None or not Path(log).exists():
        return ""
    text = Path(log).read_bytes()[-200_000:].decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])


@click.command("dask")
@config_argument
@overrides_option
@click.option("--profile", help="A profile of the config's slurm.profiles.")
@click.option("--jobs", default=4, show_default=True, type=click.IntRange(min=1), help="Workers.")
def dask_command(config: Path, overrides: tuple[str, ...], profile: str | None, jobs: int) -> None:
    """Start Dask workers on Slurm and keep them until interrupted.

    Give the printed address to `kvdistill inspect --scheduler` or `kvdistill verify --scheduler`.
    """
    from kvdistill.config.load import load_experiment
    from kvdistill.pipelines.distribute import choose_profile
    from kvdistill.slurm.dask_cluster import dask_cluster
    from kvdistill.slurm.signals import stop_flag

    experiment = load_experiment(config, overrides)
    chosen = choose_profile(experiment, profile, "extract")
    logs = experiment.output_dir.absolute() / "dask"
    with dask_cluster(chosen, jobs, logs) as address:
        click.echo(f"{address}\nnext: kvdistill verify {experiment.store} --scheduler {address}")
        with stop_flag(0.0) as stop:
            while not stop.requested:
                time.sleep(0.5)


# MERGED-DOC commands.dask
# ``kvdistill dask``: workers on Slurm for ``inspect`` and ``verify``.
