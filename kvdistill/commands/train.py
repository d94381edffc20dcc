"""``kvdistill train``, ``run`` and ``evaluate``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from kvdistill.commands.options import config_argument, json_option, overrides_option


@click.command()
@config_argument
@overrides_option
@json_option
def train(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Distil the store that CONFIG names into its student.

    A run that was interrupted goes on from its last checkpoint; a finished one is left alone.
    """
    from kvdistill import config_file
    from kvdistill.pipelines.train import train as run_training

    report = run_training(config_file.load(config, overrides))
    if as_json:
        click.echo(json.dumps({"folder": str(report.folder), "metrics": report.metrics}))
        return
    state = "was finished already" if report.already_finished else "finished"
    click.echo(f"training {state}: {report.folder}")
    for name in ("eval_perplexity", "eval_bits_per_character"):
        if name in report.metrics:
            label = name.removeprefix("eval_").replace("_", " ")
            click.echo(f"  held-out {label}: {report.metrics[name]:.4g}")
    click.echo(f"next: `kvdistill report {report.folder}`, or load {report.folder / 'student'}")


@click.command()
@click.argument("student", type=click.Path(path_type=Path))
@click.argument("corpus", type=click.Path(path_type=Path))
@click.option("--max-samples", type=click.IntRange(min=1), help="Only the first texts.")
@click.option("--max-length", default=512, show_default=True, help="Tokens per text.")
@click.option("--batch-size", default=8, show_default=True, help="Texts per forward pass.")
@json_option
def evaluate(
    student: Path,
    corpus: Path,
    max_samples: int | None,
    max_length: int,
    batch_size: int,
    as_json: bool,
) -> None:
    """Perplexity and bits per character of STUDENT (a folder) on CORPUS (JSONL)."""
    from kvdistill.pipelines.evaluate import evaluate_folder

    metrics = evaluate_folder(student, corpus, max_samples, max_length, batch_size).to_dict()
    if as_json:
        click.echo(json.dumps(metrics))
        return
    for name, value in metrics.items():
        click.echo(f"{name.replace('_', ' ')}: {value:.6g}")
