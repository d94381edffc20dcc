"""``kvdistill train``, ``run`` and ``evaluate``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvdistill.commands.options import config_argument, json_option, overrides_option
from kvdistill.commands.spread import Spread, spread_extraction, spread_options

if TYPE_CHECKING:
    from kvdistill.pipelines.train import TrainingReport


@click.command("train")
@config_argument
@overrides_option
@json_option
def train_command(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Stage 2: distil the store that CONFIG names into its student.

    A run that was interrupted goes on from its last checkpoint; a finished one is left alone.
    """
    from kvdistill.config.load import load_experiment
    from kvdistill.pipelines.train import train as run_training

    report = run_training(load_experiment(config, overrides))
    if as_json:
        click.echo(json.dumps({"folder": str(report.folder), "metrics": report.metrics}))
    else:
        _print(report)


@click.command("run")
@config_argument
@overrides_option
@spread_options
def run_command(*, config: Path, overrides: tuple[str, ...], spread: Spread) -> None:
    """Extract with every teacher, then train: `extract` and `train` in one.

    Both stages skip what is done, so the same command continues what was interrupted.
    With --slurm, arrays extract and a job trains once they have ended.
    """
    from kvdistill.config.load import load_experiment

    experiment = load_experiment(config, overrides)
    if spread.wanted:
        spread_extraction(experiment, config, (), spread, train=True)
        if not spread.local:
            return
    # Not above: these bring torch, and submitting needs none.
    from kvdistill.commands.extract import print_report
    from kvdistill.commands.options import extraction_bars
    from kvdistill.pipelines.extract import extract
    from kvdistill.pipelines.stored import prepare
    from kvdistill.pipelines.train import require_trainable_student
    from kvdistill.pipelines.train import train as run_training

    require_trainable_student(experiment)
    if experiment.teachers:
        with extraction_bars() as progress:
            extraction = extract(experiment, progress=progress)
        print_report(extraction)
    else:
        prepare(experiment)  # the texts alone: cross-entropy needs no teacher
    _print(run_training(experiment))


@click.command("evaluate")
@click.argument("student", type=click.Path(path_type=Path))
@click.argument("corpus", type=click.Path(path_type=Path), required=False)
@click.option("--max-samples", type=click.IntRange(min=1), help="Only the first texts.")
@click.option("--max-length", default=512, show_default=True, help="Tokens per text.")
@click.option("--batch-size", default=8, show_default=True, help="Texts per forward pass.")
@click.option("--generate", is_flag=True, help="Let it answer every prompt; count exact matches.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Room for rationale and answer: 256, or what a latent student was trained with.",
)
@click.option("--diagnose", is_flag=True, help="Look into a latent student's latents.")
@click.option(
    "--samples",
    "rows",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the figures of every sample to this JSONL file.",
)
@click.option(
    "--harness",
    metavar="TASKS",
    help="Instead of CORPUS: tasks of lm-evaluation-harness, or task files (.yaml), by commas.",
)
@json_option
def evaluate_command(
    *,
    student: Path,
    corpus: Path | None,
    harness: str | None,
    rows: Path | None,
    as_json: bool,
    max_samples: int | None,
    max_length: int,
    batch_size: int,
    generate: bool,
    max_new_tokens: int | None,
    diagnose: bool,
) -> None:
    """Perplexity, bits per character and exact match of STUDENT (a folder) on CORPUS (JSONL)."""
    if (corpus is None) == (harness is None):
        raise click.UsageError("give a CORPUS, or --harness with tasks, and not both")
    if corpus is None:
        tasks = [task.strip() for task in str(harness).split(",")]
        _harness(student, tasks, max_samples, batch_size, max_length, as_json=as_json)
        return
    from kvdistill.pipelines.evaluate import evaluate_folder, write_rows

    found = evaluate_folder(
        student,
        corpus,
        max_samples=max_samples,
        max_length=max_length,
        batch_size=batch_size,
        generate=generate,
        max_new_tokens=max_new_tokens,
        diagnose=diagnose,
    )
    if rows is not None:
        write_rows(found, rows)
    if as_json:
        click.echo(json.dumps(found.metrics))
        return
    for name, value in found.metrics.items():
        click.echo(f"{name.replace('_', ' ')}: {value:.6g}")


def _harness(
    student: Path,
    tasks: list[str],
    limit: int | None,
    batch_size: int,
    max_length: int,
    *,
    as_json: bool,
) -> None:
    from kvdistill.distill.evaluate.harness import run_harness

    found = run_harness(student, tasks, limit=limit, batch_size=batch_size, max_length=max_length)
    if as_json:
        click.echo(json.dumps([asdict(figure) for figure in found]))
        return
    for figure in found:
        error = figure.standard_error
        spread = "" if error is None else f" ± {error:.3g}"
        click.echo(f"{figure.task} {figure.metric}: {figure.value:.6g}{spread}")


def _print(report: TrainingReport) -> None:
    state = "was finished already" if report.already_finished else "finished"
    click.echo(f"training {state}: {report.folder}")
    for name in ("eval_perplexity", "eval_bits_per_character", "eval_exact_match"):
        if name in report.metrics:
            label = name.removeprefix("eval_").replace("_", " ")
            click.echo(f"  held-out {label}: {report.metrics[name]:.4g}")
    click.echo(f"next: kvdistill report {report.folder}; the student is in {report.folder}/student")
