"""The report as files: a self-contained HTML page, its tables as Markdown, its numbers as CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from kvdistill.store.commit import replace_file
from kvdistill.studies.plots import svg, swatch
from kvdistill.studies.report import figures, results, tables
from kvdistill.studies.report.comparison import unfair_arms
from kvdistill.studies.report.figures import ReportFigure
from kvdistill.studies.report.reading import Arm, Run, Study, read_run, read_study
from kvdistill.studies.report.results import Row
from kvdistill.text import markdown_text


def write_report(
    paths: Sequence[Path], output: Path, baseline: str | None = None, title: str | None = None
) -> tuple[list[Path], tuple[str, ...]]:
    """Write ``output`` (HTML) and, beside it, its tables as Markdown and CSV.

    Args:
        paths: run folders, folders of runs, ablation folders.
        output: the page, self-contained.
        baseline: the arm that the others are compared with.
        title: the page's heading; by default the ablation's name.

    Returns:
        The files written, and notes such as runs that were left out, with the reason.

    Raises:
        ConfigError: no finished run, or no arm of that name.
    """
    study = read_study(paths, baseline, title)
    rows = results.result_rows(study)
    content = _content(study, rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = markdown_text
    markdown, by_arm = output.with_suffix(".md"), output.with_suffix(".csv")
    by_run = output.with_name(f"{output.stem}-runs.csv")
    for path, template in ((output, "report.html.j2"), (markdown, "report.md.j2")):
        replace_file(path, environment.get_template(template).render(content))
    _write_csv(by_arm, [results.csv_line(row) for row in rows])
    _write_csv(by_run, [_run_line(arm.name, run) for arm in study.arms for run in arm.runs])
    notes = (*content["notes"], *content["missing_stores"])
    return [output, markdown, by_arm, by_run], notes


def write_plots(path: Path, output: Path) -> list[Path]:
    """Write every figure of a run's report as a PNG into the folder ``output``.

    Raises:
        ConfigError: not a finished run.
    """
    run = read_run(path)
    study = Study(run.name, (Arm(run.name, (run,)),), run.name)
    first = figures.headline_figure(study, [])
    drawn = [] if first is None else [first]
    drawn += [figure for found in figures.sections(study, []).values() for figure in found]
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for figure in drawn:
        written.append(output / f"{figure.name.removesuffix(f'-{run.name}')}.png")
        figure.figure.savefig(written[-1], dpi=150)
    return written


def _content(study: Study, rows: Sequence[Row]) -> dict[str, Any]:
    """Variables of the templates."""
    runs = [run for arm in study.arms for run in arm.runs]
    numbers = {id(run): number for number, run in enumerate(runs, 1)}
    savings, missing_stores = tables.savings_table(study)
    first, all_measures = figures.headline_figure(study, rows), tables.result_table(rows, study)
    texts = max((int(run.metrics.get("eval_num_samples", 0)) for run in runs), default=0)
    return {
        "study": study,
        "question": results.question(study),
        "answer": results.answer_of(study, rows),
        "headline": tables.headline_table(rows, study.baseline) if len(rows) > 1 else all_measures,
        "first": first and _page_figure(first, numbers),
        "looks": {label: swatch(look) for label, look in figures.arm_looks(study).items()},
        "num_seeds": len({run.seed for run in runs}),
        "num_texts": texts,
        "limits": results.limits(rows),
        "notes": [*study.notes, *unfair_arms(study)],
        "missing_stores": missing_stores,
        "results": all_measures,
        "significance": tables.significance_table(rows),
        "answers": tables.answer_table(rows),
        "sections": [
            (heading, [_page_figure(figure, numbers) for figure in drawn])
            for heading, drawn in figures.sections(study, rows).items()
        ],
        "costs": tables.cost_table(study),
        "savings": savings,
        "settings": tables.settings_table(study),
        "provenance": tables.provenance_table(study, numbers),
    }


def _page_figure(drawn: ReportFigure, numbers: Mapping[int, int]) -> dict[str, str]:
    """Caption, SVG, the runs' numbers in the table of all runs, and what made them."""
    title = drawn.figure.axes[0].get_title(loc="left") or drawn.figure.axes[0].get_title()
    label = f"{title}. {drawn.caption.partition('.')[0]}."
    configs = sorted({run.config_hash for run in drawn.runs})
    versions = sorted({run.record["attempts"][-1]["versions"]["kvdistill"] for run in drawn.runs})
    made_by = (
        f"{_ranges('seed', [run.seed for run in drawn.runs])}; "
        f"commit {', '.join(sorted({run.commit for run in drawn.runs}))}; "
        f"kvdistill {', '.join(versions)}; "
        f"config {', '.join(configs[:3])}{' …' if len(configs) > 3 else ''}"
    )
    return {
        "caption": drawn.caption,
        "svg": svg(drawn.figure, drawn.name, label),
        "runs": _ranges("Run", [numbers[id(run)] for run in drawn.runs]),
        "made_by": made_by,
    }


def _ranges(noun: str, numbers: Sequence[int]) -> str:
    """``seeds 1–3, 7`` for 1, 2, 3, 7."""
    groups: list[list[int]] = []
    for number in sorted(set(numbers)):
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    listed = ", ".join(f"{g[0]}–{g[-1]}" if len(g) > 1 else str(g[0]) for g in groups)
    return f"{noun}{'s' if len(set(numbers)) > 1 else ''} {listed}"


def _run_line(arm: str, run: Run) -> dict[str, Any]:
    return {
        "arm": arm,
        "run": run.name,
        "seed": run.seed,
        "steps": run.record["steps"],
        "seconds": run.record["seconds"],
        "commit": run.record["attempts"][-1]["git_commit"],
        "config": run.config_hash,
        **run.metrics,
    }


def _write_csv(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for line in lines for key in line))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(lines)
