"""``kvdistill dask``: workers on Slurm for ``inspect`` and ``verify``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from kvdistill.commands.options import config_argument, overrides_option


@click.command()
@config_argument
@overrides_option
@click.option("--profile", help="A profile of the config's slurm.profiles.")
@click.option("--jobs", default=4, show_default=True, type=click.IntRange(min=1), help="Workers.")
def dask(config: Path, overrides: tuple[str, ...], profile: str | None, jobs: int) -> None:
    """Start Dask workers on Slurm and keep them until interrupted.

    Give the printed address to `kvdistill inspect --scheduler` or `kvdistill verify --scheduler`.
    """
    from kvdistill import config_file
    from kvdistill.commands.distribute import choose_profile
    from kvdistill.slurm.dask_cluster import dask_cluster
    from kvdistill.slurm.signals import stop_flag

    experiment = config_file.load(config, overrides)
    chosen = choose_profile(experiment, profile, "extract")
    logs = experiment.output_dir.absolute() / "dask"
    with dask_cluster(chosen, jobs, logs) as address:
        click.echo(f"{address}\nnext: kvdistill verify {experiment.store} --scheduler {address}")
        with stop_flag(0.0) as stop:
            while not stop.requested:
                time.sleep(0.5)
