"""``kvdistill report`` and ``kvdistill plot``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="Where to write the page.",
)
def report(runs: tuple[Path, ...], output: Path) -> None:
    """Write one page that compares finished RUNS; changes are against the last one given."""
    from kvdistill.pipelines.report import write_report

    write_report(list(runs), output)
    click.echo(f"wrote {output}; open it in a browser")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder for the PNGs; RUN/plots if not given."
)
def plot(run: Path, output: Path | None) -> None:
    """Draw a finished RUN: layer map, alignment, errors, weights, spectra."""
    from kvdistill.pipelines.report import write_plots

    for path in write_plots(run, output or run / "plots"):
        click.echo(f"wrote {path}")
