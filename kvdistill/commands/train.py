"""``kvdistill train``, ``run`` and ``evaluate``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from kvdistill.commands.extract import distribute, extraction_progress, print_extraction
from kvdistill.commands.options import (
    Execution,
    config_argument,
    end_with_report,
    execution_options,
    ignore_option,
    json_option,
    overrides_option,
)
from kvdistill.config.load import load_experiment
from kvdistill.pipelines.run import run
from kvdistill.pipelines.run_folder import RunFolder, learned, text_alone
from kvdistill.pipelines.train import TrainingReport, train


@click.command("train")
@config_argument
@overrides_option
@json_option
def train_command(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Stage 2: distil the store that CONFIG names into its student.

    An interrupted run resumes from its last checkpoint; a finished one is left as it is.
    """
    report = train(load_experiment(config, overrides))
    if as_json:
        click.echo(json.dumps({"folder": str(report.folder), "metrics": report.metrics}))
    else:
        _print_training(report)
        click.echo(f"next: kvdistill report {report.folder}")


@click.command("run")
@config_argument
@overrides_option
@execution_options
def run_command(*, config: Path, overrides: tuple[str, ...], execution: Execution) -> None:
    """Extract with every teacher, then train: `extract` and `train` in one.

    Begins with what it is about to do, and ends with what was learned and a report. Both stages
    skip what is done, so the same command resumes what was interrupted. With --slurm, arrays
    extract, and a job trains once they have ended.
    """
    experiment = load_experiment(config, overrides)
    if execution.on_this_machine:
        # Not above: it imports torch, which a submission does without.
        from kvdistill.pipelines.outlook import outlook

        for line in outlook(experiment):
            click.echo(line)
    if not execution.in_this_process:
        distribute(experiment, config, (), execution, train=True)
        if not execution.on_this_machine:
            return
    report = run(experiment, extraction_progress(), print_extraction)
    _print_training(report)
    if (folder := RunFolder(report.folder)).read_record().get("finished"):  # rank 0 has written it
        alone = text_alone(folder)
        compared = [folder.path] if alone is None else [folder.path, alone.path]
        end_with_report(compared, folder.path / "report.html")


@click.command("evaluate")
@click.argument("student", type=click.Path(path_type=Path))
@click.argument("corpus", type=click.Path(path_type=Path), required=False)
@click.option("--max-samples", type=click.IntRange(min=1), help="Only the first samples.")
@click.option("--max-length", default=512, show_default=True, help="Tokens per sample.")
@click.option("--batch-size", default=8, show_default=True, help="Samples per forward pass.")
@click.option("--generate", is_flag=True, help="Also answer every prompt, scored by exact match.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Token budget of rationale and answer; by default 256, or a latent student's own.",
)
@click.option("--diagnose", is_flag=True, help="Probe a latent student's latents.")
@click.option(
    "--samples",
    "rows",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the metrics of every sample to this JSONL file.",
)
@click.option(
    "--harness",
    metavar="TASKS",
    help="Instead of CORPUS: lm-evaluation-harness tasks or task files (.yaml), comma-separated.",
)
@ignore_option
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
    ignore: tuple[str, ...],
) -> None:
    """Perplexity, bits per character and exact match of STUDENT (a folder) on CORPUS (a file)."""
    if (corpus is None) == (harness is None):
        raise click.UsageError("give either a CORPUS or --harness with tasks")
    if corpus is None:
        from kvdistill.distill.evaluate.harness import run_harness

        tasks = [task.strip() for task in str(harness).split(",")]
        figures = run_harness(
            student, tasks, limit=max_samples, batch_size=batch_size, max_length=max_length
        )
        if as_json:
            click.echo(json.dumps([asdict(figure) for figure in figures]))
            return
        for figure in figures:
            error = figure.standard_error
            margin = "" if error is None else f" ± {error:.3g}"
            click.echo(f"{figure.task} {figure.metric}: {figure.value:.6g}{margin}")
        return
    from kvdistill.pipelines.evaluate import evaluate_folder

    found = evaluate_folder(
        student,
        corpus,
        max_samples=max_samples,
        max_length=max_length,
        batch_size=batch_size,
        generate=generate,
        max_new_tokens=max_new_tokens,
        diagnose=diagnose,
        ignore=ignore,
    )
    if rows is not None:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows)
        rows.write_text("".join(lines), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(found.metrics))
        return
    for name, value in found.metrics.items():
        click.echo(f"{name.replace('_', ' ')}: {value:.6g}")


def _print_training(report: TrainingReport) -> None:
    state = "was already finished" if report.already_finished else "finished"
    click.echo(f"training {state}: {report.folder}")
    for name, figure in learned(RunFolder(report.folder)).items():
        click.echo(f"  held-out {name}: {figure}")
    click.echo(f"the student is in {report.folder}/student")
