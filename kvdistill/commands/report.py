"""``kvdistill report``."""

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
