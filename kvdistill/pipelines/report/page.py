"""One self-contained page from finished runs: what was compared, and how it went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2

from kvdistill.config_file import flatten
from kvdistill.errors import ConfigError
from kvdistill.pipelines import plots
from kvdistill.pipelines.report.study import Run, read_run


def write_report(paths: list[Path], output: Path) -> None:
    """Write one HTML page that compares the runs; no other file is needed to read it.

    Raises:
        ConfigError: a path is not a finished run.
    """
    runs = [read_run(path) for path in paths]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        runs=[_row(run, runs[-1]) for run in runs],
        figures=_figures(runs),
        differences=_differences(runs),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")


def _figures(runs: list[Run]) -> list[dict[str, str]]:
    found = []
    for key, (label, title, caption) in CURVES.items():
        series = {run.name: run.curve(key) for run in runs if any(key in row for row in run.logs)}
        if series:
            found.append((plots.curves(series, label, title), caption))
    for run in runs:
        drawn = run_figures(run).values()
        found += [(figure, f"{run.name}: {caption}") for figure, caption in drawn]
    return [{"source": plots.data_uri(figure), "caption": caption} for figure, caption in found]


CURVES = {
    "eval_bits_per_character": (
        "bits per character",
        "Held-out text",
        "How well the student predicts text it has not seen; lower is better.",
    ),
    "loss_cross_entropy": (
        "nats per token",
        "Training: cross-entropy",
        "Next-token loss on the training text.",
    ),
    "loss_key": (
        "error (1 = the mean)",
        "Training: key loss",
        "Error of the student's keys, before weighting.",
    ),
    "loss_value": (
        "error (1 = the mean)",
        "Training: value loss",
        "Error of the student's values, before weighting.",
    ),
}


def run_figures(run: Run) -> dict[str, tuple[Any, str]]:
    """Every figure of one run with its caption, by a name that a file can have."""
    found: dict[str, tuple[Any, str]] = {}
    told = run.diagnostics
    if not told:
        return found
    depths = {name: teacher["layer_map"] for name, teacher in told["teachers"].items()}
    found["layer-map"] = (
        plots.layer_map(depths),
        "which teacher layer a student layer learns from.",
    )
    found["error-by-layer"] = (
        plots.error_by_layer(told["error_by_layer"]),
        "error after training; 1 is what predicting the mean of a standardised target scores.",
    )
    weights = {
        name: run.curve(f"weight_{name}") for name in depths if run.curve(f"weight_{name}")[0]
    }
    if weights and run.config["fusion"]["method"] != "fixed":
        found["weights"] = (
            plots.curves(weights, "fusion weight", "Fusion weights over training"),
            "how much each teacher counts, over training.",
        )
        found["weights-by-layer"] = (
            plots.weights_by_layer(told["weights"]["by_layer"]),
            "how much each teacher counts, by student layer.",
        )
        found["weights-by-task"] = (
            plots.weights_by_task(told["weights"]["by_task"]),
            "how much each teacher counts, by the sample's task.",
        )
    found["spectra"] = (
        plots.spectra(told["spectra"]),
        "singular values of the projectors; a steep fall is a map of low rank.",
    )
    for name, teacher in told["teachers"].items():
        found[f"alignment-{name}"] = (
            plots.alignment(teacher["alignment"], name),
            f"the first text, the student's tokens against {name}'s.",
        )
    return found


def write_plots(path: Path, output: Path) -> list[Path]:
    """Write every figure of a run as a PNG into the folder ``output``.

    Raises:
        ConfigError: not a finished run, or one without teachers.
    """
    figures = run_figures(read_run(path))
    if not figures:
        raise ConfigError(f"{path} was trained without teachers; there is nothing to plot")
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (figure, _) in figures.items():
        written.append(output / f"{name}.png")
        figure.savefig(written[-1], dpi=150)
    return written


def _row(run: Run, baseline: Run) -> dict[str, Any]:
    metrics, reference = run.record["metrics"], baseline.record["metrics"]
    last = run.record["attempts"][-1]
    row = {
        "name": run.name,
        "teachers": ", ".join(run.config["teachers"]) if run.diagnostics else "none",
        "perplexity": metrics.get("eval_perplexity"),
        "bits": metrics.get("eval_bits_per_character"),
        "change": None,
        "steps": run.record["steps"],
        "seconds": run.record["seconds"],
        "seed": run.record["seed"],
        "command": last["command"],
        "commit": last["git_commit"] or "not a checkout",
        "started": last["started"],
        "versions": ", ".join(f"{name} {version}" for name, version in last["versions"].items()),
    }
    if row["perplexity"] and reference.get("eval_perplexity") and run is not baseline:
        row["change"] = 100 * (row["perplexity"] / reference["eval_perplexity"] - 1)
    return row


def _differences(runs: list[Run]) -> list[dict[str, Any]]:
    """Settings that are not the same in every run: what the comparison is about."""
    flat = [flatten(run.config) for run in runs]
    keys = sorted({key for settings in flat for key in settings} - {"name"})
    return [
        {"key": key, "values": [settings.get(key) for settings in flat]}
        for key in keys
        if len({json.dumps(settings.get(key)) for settings in flat}) > 1
    ]
