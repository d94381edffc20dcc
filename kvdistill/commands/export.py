"""``kvdistill export``: a student in another form."""

from __future__ import annotations

import json
from pathlib import Path

import click

from kvdistill.commands.options import json_option


@click.command()
@click.option("--onnx", "form", flag_value="onnx", required=True, help="As ONNX (extra `onnx`).")
@click.argument("student", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@json_option
def export(form: str, student: Path, output: Path, as_json: bool) -> None:
    """Write STUDENT (a folder) to the new folder OUTPUT, and check that it computes the same."""
    from kvdistill.pipelines.export import export_onnx

    done = export_onnx(student, output)
    if as_json:
        click.echo(json.dumps({"path": str(done.path), "error": done.error, "form": form}))
        return
    click.echo(f"wrote {done.path}; its logits differ from torch's by {done.error:.1e} at most")
