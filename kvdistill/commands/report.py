"""``kvdistill report``, ``plot``, ``export``, ``push-student`` and ``merge-students``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from kvdistill.commands.options import json_option


@click.command("report")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    help="The page; Markdown and CSV go beside it.",
)
@click.option(
    "--baseline",
    metavar="ARM",
    help="Arm to compare with; if not given, the ablation's, else the one without teachers, "
    "else the last.",
)
@click.option("--title", help="The page's heading; if not given, the ablation's name.")
def report_command(
    runs: tuple[Path, ...], output: Path, baseline: str | None, title: str | None
) -> None:
    """Compare finished RUNS: one page, its tables as Markdown, its figures as CSV.

    RUNS are run folders, folders of runs, or an ablation's folder. Runs that differ in nothing but
    the seed are one arm; with several seeds there are intervals and p-values.
    """
    from kvdistill.studies.report.page import write_report

    written, notes = write_report(list(runs), output, baseline, title)
    for note in notes:
        click.echo(f"note: {note}")
    for path in written[1:]:
        click.echo(f"wrote {path}")
    click.echo(f"wrote {output}; open it in a browser")


@click.command("plot")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder for the PNGs; RUN/plots if not given."
)
def plot_command(run: Path, output: Path | None) -> None:
    """Draw the figures of a finished RUN's report."""
    from kvdistill.studies.report.page import write_plots

    for path in write_plots(run, output or run / "plots"):
        click.echo(f"wrote {path}")


@click.command("export")
@click.option("--onnx", "form", flag_value="onnx", required=True, help="As ONNX (extra `onnx`).")
@click.argument("student", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@json_option
def export_command(form: str, student: Path, output: Path, as_json: bool) -> None:
    """Write STUDENT (a folder) to the new folder OUTPUT, and check that it computes the same."""
    from kvdistill.pipelines.export import export_onnx

    path, error = export_onnx(student, output)
    if as_json:
        click.echo(json.dumps({"path": str(path), "error": error, "form": form}))
        return
    click.echo(f"wrote {path}; its logits differ from torch's by {error:.1e} at most")


@click.command("push-student")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("repo", metavar="[USER/]NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--license", "license_id", metavar="ID", help="For the card, such as apache-2.0.")
def push_student_command(run: Path, repo: str, private: bool, license_id: str | None) -> None:
    """Upload the student of a finished RUN, with its card, to the Hugging Face hub."""
    from kvdistill.pipelines.export import push_student

    click.echo(f"pushed {push_student(run, repo, private=private, license_id=license_id)}")


@click.command("merge-students")
@click.argument("students", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--weights", default="", metavar="W,W,…", help="One per student; equal if not given.")
@click.option(
    "--output", "--out", required=True, type=click.Path(path_type=Path), help="The new folder."
)
def merge_students_command(students: tuple[Path, ...], weights: str, output: Path) -> None:
    """Average the weights of STUDENTS (runs, or their `student` folders) of one checkpoint."""
    from kvdistill.pipelines.merge_students import merge_students

    try:
        given = [float(weight) for weight in weights.split(",") if weight]
    except ValueError as error:
        raise click.BadParameter(f"{error}; give numbers such as 0.7,0.3") from None
    click.echo(f"wrote {merge_students(students, given, output)}")
