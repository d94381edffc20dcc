"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from kvdistill.errors import ConfigError, KVDistillError

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

config_argument: Decorator = click.argument("config", type=click.Path(path_type=Path))
overrides_option: Decorator = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one setting, such as training.epochs=2; repeatable.",
)
json_option: Decorator = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON instead of text."
)
ignore_option: Decorator = click.option(
    "--ignore", multiple=True, metavar="COLUMN", help="A column of text not to read; repeatable."
)
teachers_option: Decorator = click.option(
    "--teacher", "teachers", multiple=True, help="Only this teacher; repeatable."
)


class Location(click.Path):
    """A path, or the URL of a store in a bucket, which stays text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A ``Path``, or the URL."""
        return str(value) if "://" in str(value) else Path(str(super().convert(value, param, ctx)))


def end_with_report(runs: Sequence[Path], output: Path) -> None:
    """Write the report of finished runs and name it; one that cannot be written fails no run."""
    from kvdistill.studies.report.page import write_report

    try:
        write_report(runs, output)
    except (KVDistillError, OSError) as error:
        click.echo(f"no report was written: {error}", err=True)
    else:
        click.echo(f"report: {output}; open it in a browser")


store_argument: Decorator = click.argument("store", type=Location())


@dataclass(frozen=True)
class Execution:
    """Where work runs; with nothing set, in this process."""

    workers: int | None = None
    slurm: bool = False
    profile: str | None = None
    dry_run: bool = False
    write_sbatch: Path | None = None

    @property
    def in_this_process(self) -> bool:
        """Whether no option asks for anything else."""
        return not self.workers and self.on_this_machine

    @property
    def on_this_machine(self) -> bool:
        """Whether the work is done when the command returns."""
        return not (self.slurm or self.dry_run or self.write_sbatch)


def execution_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of ``Execution``, passed on as one ``execution``."""

    @click.option("--workers", type=click.IntRange(min=1), help="Worker processes, one GPU each.")
    @click.option("--slurm", is_flag=True, help="Submit to Slurm, one array per teacher.")
    @click.option("--profile", help="A profile of the config's slurm.profiles.")
    @click.option("--dry-run", is_flag=True, help="Print the batch scripts and submit nothing.")
    @click.option(
        "--write-sbatch",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Write batch scripts to DIR, to be submitted by hand.",
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
        execution = Execution(workers, slurm, profile, dry_run, write_sbatch)
        if profile is not None and execution.on_this_machine:
            raise ConfigError("--profile needs --slurm, --dry-run or --write-sbatch")
        return command(execution=execution, **others)

    return wrapped
