"""The report as files: one page that needs no other, its tables as Markdown, its figures as CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from kvdistill.errors import ConfigError
from kvdistill.studies.plots import svg
from kvdistill.studies.report import rows as results
from kvdistill.studies.report import tables
from kvdistill.studies.report import wording as words
from kvdistill.studies.report.comparison import unequal
from kvdistill.studies.report.costs import arm_costs, teacher_costs
from kvdistill.studies.report.figures import sections
from kvdistill.studies.report.reading import Run, Study, read_run, read_study
from kvdistill.studies.report.run_figures import ReportFigure, run_figures


@dataclass(frozen=True)
class Shown:
    """A figure as the page shows it."""

    words: str
    svg: str
    runs: str
    """Numbers of its runs in the table of all runs."""
    made_by: str
    """Their seeds, commits, versions and configurations."""


def write_report(
    paths: Sequence[Path], output: Path, baseline: str | None = None, title: str | None = None
) -> tuple[list[Path], tuple[str, ...]]:
    """Write ``output`` (HTML) and, beside it, its tables as Markdown and CSV.

    Args:
        paths: run folders, folders of runs, ablation folders.
        output: the page; no other file is needed to read it.
        baseline: the arm that the others are compared with.
        title: the page's heading; by default the ablation's name.

    Returns:
        The files written, and what a reader must know (runs left out, and why).

    Raises:
        ConfigError: no finished run, or no arm of that name.
    """
    study = read_study(paths, baseline, title)
    rows = results.rows(study)
    content = _content(study, rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = []
    for suffix in (".html", ".md"):
        template = environment.get_template(f"report{suffix}.j2")
        written.append(output if suffix == ".html" else output.with_suffix(suffix))
        written[-1].write_text(template.render(content), encoding="utf-8")
    written.append(output.with_suffix(".csv"))
    _write_csv(written[-1], [results.plain(row) for row in rows])
    written.append(output.with_name(f"{output.stem}-runs.csv"))
    _write_csv(written[-1], [_run_line(arm.name, run) for arm in study.arms for run in arm.runs])
    return written, content["notes"]


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
    for name, figure in figures.items():
        written.append(output / f"{name}.png")
        figure.savefig(written[-1], dpi=150)
    return written


def _content(study: Study, rows: Sequence[results.Row]) -> dict[str, Any]:
    """Everything that the templates show."""
    runs = [run for arm in study.arms for run in arm.runs]
    numbers = {id(run): number for number, run in enumerate(runs, 1)}
    saved, gone = teacher_costs(study)
    return {
        "study": study,
        "summary": words.summary(study, rows),
        "notes": (*study.notes, *unequal(study), *gone),
        "arms": [(arm.name, arm.description, arm.placebo) for arm in study.arms],
        "results": tables.results(rows, study.baseline),
        "certainty": tables.certainty(rows),
        "answers": tables.answers(rows),
        "sections": [
            (section.heading, section.folded, [_page_figure(d, numbers) for d in section.figures])
            for section in sections(study, rows)
        ],
        "costs": tables.cost_table(arm_costs(study)),
        "savings": tables.savings(saved),
        "settings": tables.settings(study),
        "provenance": tables.provenance(study, numbers),
    }


def _page_figure(drawn: ReportFigure, numbers: Mapping[int, int]) -> Shown:
    title = drawn.figure.axes[0].get_title(loc="left") or drawn.figure.axes[0].get_title()
    label = f"{title}. {drawn.words.partition('.')[0]}."
    numbered = _ranges([numbers[id(run)] for run in drawn.runs])
    return Shown(drawn.words, svg(drawn.figure, drawn.name, label), numbered, _made_by(drawn.runs))


def _made_by(runs: Sequence[Run]) -> str:
    seeds = sorted({run.seed for run in runs})
    commits = sorted({tables.commit(run) for run in runs})
    configs = sorted({tables.config_hash(run) for run in runs})
    shown = ", ".join(configs[:3]) + (" …" if len(configs) > 3 else "")
    versions = sorted({run.record["attempts"][-1]["versions"]["kvdistill"] for run in runs})
    return (
        f"seeds {_ranges(seeds)}; commit {', '.join(commits)}; kvdistill {', '.join(versions)}; "
        f"config {shown}"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """``1–3, 7`` for 1, 2, 3, 7."""
    groups: list[list[int]] = []
    for number in sorted(set(numbers)):
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(f"{g[0]}–{g[-1]}" if len(g) > 1 else str(g[0]) for g in groups)


def _run_line(arm: str, run: Run) -> dict[str, Any]:
    return {
        "arm": arm,
        "run": run.name,
        "seed": run.seed,
        "steps": run.record["steps"],
        "seconds": run.record["seconds"],
        "commit": run.record["attempts"][-1]["git_commit"],
        "config": tables.config_hash(run),
        **run.metrics,
    }


def _write_csv(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for line in lines for key in line))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(lines)
