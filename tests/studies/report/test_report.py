"""Reports of made-up ablations: what they say, what they survive, and that nothing is missing."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from kvdistill.commands.report import report_command
from kvdistill.corpus.samples import Sample, cut_into_shards
from kvdistill.errors import ConfigError
from kvdistill.store.writer import create
from kvdistill.studies.report import figures
from kvdistill.studies.report.comparison import Comparison, unfair_arms
from kvdistill.studies.report.page import write_plots, write_report
from kvdistill.studies.report.reading import read_study
from kvdistill.studies.report.results import (
    Row,
    answer_of,
    limits,
    question,
    result_rows,
)
from kvdistill.studies.report.tables import headline_table, savings_table
from tests.studies.report.fabricate import ARMS, MadeUp, rewrite, write_ablation, write_run

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that elements close, and keeps what tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.labels: list[str] = []
        self.figures = 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.figures += tag == "figure"
        self.links += [
            value or "" for name, value in attrs if name in {"href", "src", "xlink:href"}
        ]
        if tag == "svg" and given.get("aria-hidden") != "true":  # a swatch stands beside its name
            assert given["role"] == "img"
            self.labels.append(given["aria-label"] or "")
        if tag == "th":
            assert given["scope"] in {"row", "col"}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three arms, three seeds, reported once."""
    folder = tmp_path_factory.mktemp("report")
    write_ablation(folder / "ablation")
    write_report([folder / "ablation"], folder / "report.html")
    return folder


def lines(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {line["arm"]: line for line in csv.DictReader(file)}


def test_the_page_is_whole_and_needs_no_other_file(written: Path) -> None:
    text = (written / "report.html").read_text()
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    for link in page.links:
        assert link.startswith(("#", "data:image/png;base64,"))
        assert not link.startswith("#") or link[1:] in page.ids
    assert not re.search(r'(src|href)="https?:|@import|url\(["\']?http', text)
    assert page.figures == len(page.labels) > 8
    assert all(len(label) > 30 for label in page.labels)
    assert "prefers-color-scheme: dark" in text
    assert len(text) < 400_000


def test_every_figure_says_how_to_read_it_and_where_it_comes_from(written: Path) -> None:
    text = (written / "report.html").read_text()
    figures = re.findall(r"<figure>(.*?)</figure>", text, re.DOTALL)
    for figure in figures:
        words = re.findall(r"<p>(.*?)</p>", figure, re.DOTALL)
        assert len(words) == 1
        assert len(words[0]) > 60
        assert re.search(
            r'<a href="#runs">Runs? [\d–, ]+</a>; seeds? .*; commit 0123456789; ', figure
        )
        assert "config " in figure
    assert 'id="run-9"' in text


def test_the_table_holds_means_intervals_tests_and_effects(written: Path) -> None:
    found = lines(written / "report.csv")
    both, placebo = found["both"], found["shuffled"]
    assert list(found) == [arm.name for arm in ARMS]
    assert float(both["bits_change"]) == pytest.approx(-0.25, abs=0.03)
    low, high = float(both["perplexity_change_low"]), float(both["perplexity_change_high"])
    assert low < float(both["perplexity_change"]) < high < 0
    # 4 characters a token: a change of b bits per character is one of 4 b ln 2 nats per token.
    nats = 4 * math.log(2) * float(both["bits_change"])
    assert math.log1p(float(both["perplexity_change"])) == pytest.approx(nats, rel=0.02)
    assert both["verdict"] == "better"
    assert float(both["p_seeds"]) == 0.25
    assert float(both["p_both"]) < 0.02 < float(placebo["p_both"])
    assert float(both["p_both_holm"]) == pytest.approx(2 * float(both["p_both"]))
    assert float(both["hedges_g_seeds"]) > 0.5
    assert float(both["better_texts"]) == 1.0
    assert placebo["verdict"] == "no significant difference"
    assert float(placebo["placebo"]) == 1
    assert found["cross-entropy"]["verdict"] == "baseline"
    assert len(list(csv.DictReader((written / "report-runs.csv").open()))) == 9


def test_the_page_and_the_markdown_say_it_in_words(written: Path) -> None:
    for name in ("report.html", "report.md"):
        text = (written / name).read_text()
        assert "Yes: both is better than cross-entropy: perplexity −" in text.replace("\xa0", " ")
        assert "No placebo is better." in text
        assert "shuffled (placebo)" in text
        assert "With 3 seeds the test over seeds alone cannot give p" in text
        assert "losses.key" in text
    assert 'aria-label="Reliability' in (written / "report.html").read_text()
    markdown = (written / "report.md").read_text()
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(widths) == 1, table


def test_a_baseline_that_nothing_beats_is_said_to_be_so(written: Path, tmp_path: Path) -> None:
    folder, page = written / "ablation", tmp_path / "report.html"
    write_report([folder], page, baseline="both", title="Which one?")
    text = page.read_text()
    assert "<h1>Which one?</h1>" in text
    assert "No: no arm is better than both; the closest is cross-entropy: perplexity +" in text
    assert "Yes" not in text


def table(*paths: Path) -> dict[str, Row]:
    """The results table, without drawing anything."""
    return {row.arm.name: row for row in result_rows(read_study(paths))}


def said(path: Path) -> str:
    study = read_study([path])
    rows = result_rows(study)
    return "\n".join([question(study), answer_of(study, rows), *limits(rows)])


def test_the_first_page_is_question_answer_one_plot_and_one_table(written: Path) -> None:
    """The rest is folded: a meeting sees, and prints, what is before the first ``<details>``."""
    text = (written / "report.html").read_text()
    first, rest = text.split("<details", 1)
    assert first.count("<figure>") == first.count("<table>") == 1
    assert "Does a student learn more with its teachers than from the text alone?" in first
    assert first.index("Yes: both is better") < first.index("<figure>") < first.index("<table>")
    rows = re.findall(r'<th scope="row">.*?</svg>\s*([^<]*?)<small>(.*?)</small>', first, re.DOTALL)
    assert rows[0] == ("both", "two teachers, equal weights")  # the best first
    assert {name for name, _ in rows} == {"both", "cross-entropy", "shuffled (placebo)"}
    assert "Teachers</em> are other models" in first
    assert "placebo</em> has targets" in first
    assert rest.count("<details") == rest.count("</details>") - 1 > 6
    assert "<details open" not in text
    assert "@media print" in first
    assert "max-width: 40rem" in first  # a phone


def test_one_legend_serves_all_figures(written: Path) -> None:
    text = (written / "report.html").read_text()
    (legend,) = re.findall(r'<ul class="legend".*?</ul>', text, re.DOTALL)
    for name in ("cross-entropy", "both", "shuffled (placebo)"):
        assert f"</svg>{name}</li>" in legend
    dashed = [item for item in legend.split("<li>") if "stroke-dasharray" in item]
    assert len(dashed) == 1
    assert "shuffled" in dashed[0]
    for label in ("Held-out text", "Reliability", "Error of the keys by layer"):
        (figure,) = re.findall(rf'aria-label="{label}.*?</svg>', text, re.DOTALL)
        assert "legend_1" not in figure, label


def test_arms_differ_without_colour_too(tmp_path: Path) -> None:
    """In colour, marker and line together every arm is unlike every other, and unlike the next in
    its marker alone."""
    arms = [ARMS[0], *(MadeUp(f"arm-{i}", 0.01 * i, ("smollm2",)) for i in range(12))]
    looks = list(figures.arm_looks(read_study([write_ablation(tmp_path, arms, (0,))])).values())
    assert len({(look.color, look.marker) for look in looks}) == len(arms)
    assert all(one.marker != two.marker for one, two in itertools.pairwise(looks[1:]))


def test_a_study_asks_in_its_own_words(tmp_path: Path) -> None:
    folder = write_ablation(tmp_path / "a", ARMS[:2])
    body = json.loads((folder / "ablation.json").read_text()) | {"question": "Is it <b>?"}
    (folder / "ablation.json").write_text(json.dumps(body))
    assert said(folder).startswith("Is it <b>?\nYes: both")


def test_one_run_has_a_page_of_its_own(tmp_path: Path) -> None:
    run = write_run(tmp_path / "alone", ARMS[1], 0)
    write_report([run], tmp_path / "report.html")
    first = (tmp_path / "report.html").read_text().split("<details", 1)[0]
    assert re.search(r"After 300 steps the perplexity of alone on held-out text is \d+\.\d", first)
    assert 'aria-label="Held-out text.' in first
    assert re.search(r"bits per\s*character</th>", first)
    assert "verdict" not in first
    assert "an <em>arm</em>" not in first


def test_students_that_only_answer_are_judged_by_their_answers(tmp_path: Path) -> None:
    """A latent student has no likelihood of a text, only answers."""
    arms = (ARMS[0], MadeUp("latent", 0.6), MadeUp("none", 0.0, ("minilm",)))
    folder = write_ablation(tmp_path / "a", arms, (0, 1, 2, 3), num_texts=60)
    for run in folder.glob("*-s*"):
        rows = [json.loads(line) for line in (run / "eval_samples.jsonl").open()]
        lines = [json.dumps({k: row[k] for k in ("sample_id", "correct")}) for row in rows]
        (run / "eval_samples.jsonl").write_text("\n".join(lines))
        metrics = json.loads((run / "run.json").read_text())["metrics"]
        kept = ("eval_exact_match", "eval_num_answers", "eval_num_samples")
        rewrite(run, metrics={key: metrics[key] for key in kept})
    found = table(folder)
    assert found["latent"].verdict == "better"
    assert found["none"].verdict == "no significant difference"
    assert re.search(r"Yes: latent is better .*: exact match \+\d+\.\d points,", said(folder))
    study = read_study([folder])
    first = figures.headline_figure(study, list(found.values()))
    assert first is not None
    assert first.figure.axes[0].get_xlabel() == "change in exact match, points (right is better)"
    headline = headline_table(list(found.values()), study.baseline)
    assert headline is not None
    assert headline.columns == ("arm", "exact match", "change", "verdict")


def test_runs_that_stopped_at_different_steps_have_no_empty_curve(tmp_path: Path) -> None:
    folder = write_ablation(tmp_path / "a", ARMS[:2], (0, 1))
    for seed in (0, 1):
        log = folder / f"both-s{seed}/training_log.jsonl"
        row = {"step": 300 + seed, "eval_bits_per_character": 2.0}
        rows = [line for line in log.read_text().splitlines() if "eval_" not in line]
        log.write_text("\n".join([*rows, json.dumps(row)]))
    drawn = figures.sections(study := read_study([folder]), result_rows(study))["Training curves"]
    (held_out,) = (f.figure for f in drawn if f.name == "eval-bits-per-character")
    assert [line.get_label() for line in held_out.axes[0].get_lines()] == ["cross-entropy"]


def test_a_placebo_that_gains_is_called_regularisation(tmp_path: Path) -> None:
    arms = (ARMS[0], MadeUp("noise", 0.2, placebo=True))
    found = said(write_ablation(tmp_path / "a", arms))
    assert "Open: no arm but placebos" in found  # of placebos alone
    arms = (*arms, MadeUp("real", 0.3))
    found = said(write_ablation(tmp_path / "b", arms))
    assert "Yes: real is better" in found
    assert "so is the placebo noise" in found


def test_leaving_one_teacher_out_and_routing_are_shown(tmp_path: Path) -> None:
    arms = (
        ARMS[0],
        MadeUp("one", 0.1, ("smollm2",), "mlp", description='<script>alert("x")</script>'),
        MadeUp("two", 0.2, ("smollm2", "minilm"), "mlp"),
        MadeUp("other-loss", 0.2, ("minilm",), "mlp", losses=9.0),
    )
    write_ablation(tmp_path / "a", arms)
    write_report([tmp_path / "a"], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text  # names and descriptions are text, not markup
    assert "Teachers of two." in text
    assert "Fusion weights: two." in text
    assert "Fusion weights by layer" in text
    assert "Fusion weights by task" in text
    figure = re.search(r'aria-label="Teachers of two.*?</svg>', text, re.DOTALL)
    assert figure is not None
    assert ">minilm<" in figure[0]
    assert ">smollm2<" not in figure[0]  # that arm differs in its losses as well


def test_markup_in_names_is_text_in_the_markdown_too(tmp_path: Path) -> None:
    """Viewers of Markdown render the HTML, links and columns that it holds."""
    arms = (ARMS[0], MadeUp("<img src=x onerror=y> [a](b) `|", 0.2))
    write_report([write_ablation(tmp_path / "a", arms)], tmp_path / "r.html", title="<b>T")
    markdown = (tmp_path / "r.md").read_text()
    assert markdown.startswith("# &lt;b&gt;T\n")
    assert r"| &lt;img src=x onerror=y&gt; \[a\](b) \`\| |" in markdown
    assert not re.search(r"<\w|(?<!\\)\[a", markdown)


def test_runs_of_a_folder_are_grouped_by_their_settings(tmp_path: Path) -> None:
    write_ablation(tmp_path / "runs", seeds=(0, 1))
    (tmp_path / "runs/ablation.json").unlink()
    study = read_study([tmp_path / "runs"])
    assert {arm.name: [run.seed for run in arm.runs] for arm in study.arms} == {
        "both": [0, 1],
        "cross-entropy": [0, 1],
        "shuffled": [0, 1],
    }
    assert [arm.name for arm in study.arms if arm.placebo] == ["shuffled"]
    assert study.baseline == "cross-entropy"  # the only arm without teachers
    assert read_study([tmp_path / "runs"], "both").baseline == "both"


def test_what_is_missing_unfinished_or_no_number_is_named_and_left_out(tmp_path: Path) -> None:
    folder = write_ablation(tmp_path / "a")
    shutil.rmtree(folder / "both-s1")
    rewrite(folder / "shuffled-s0", finished=False)
    metrics = json.loads((folder / "shuffled-s1/run.json").read_text())["metrics"]
    rewrite(folder / "shuffled-s1", metrics=metrics | {"eval_nll": math.nan})
    notes = "\n".join(read_study([folder]).notes)
    assert "arm 'both', seed 1: has no run.json" in notes
    assert "arm 'shuffled', seed 0: has not finished" in notes
    assert "arm 'shuffled', seed 1: ended with non-finite eval_nll" in notes
    found = table(folder)
    assert compared(found["both"]).num_seeds == 2
    assert compared(found["shuffled"]).num_seeds == 1
    assert found["shuffled"].verdict == "one seed: not tested"
    assert "shares a single seed" in said(folder)


def test_an_arm_without_any_finished_run_is_named(tmp_path: Path) -> None:
    folder = write_ablation(tmp_path / "a", seeds=(0,))
    rewrite(folder / "both-s0", finished=False)
    study = read_study([folder])
    assert [arm.name for arm in study.arms] == ["cross-entropy", "shuffled"]
    (note,) = study.notes
    assert note.startswith("arm 'both', seed 0: has not finished")


def test_one_seed_is_reported_without_a_verdict(tmp_path: Path) -> None:
    both = table(write_ablation(tmp_path / "a", seeds=(7,)))["both"]
    assert both.verdict == "one seed: not tested"
    assert math.isnan(compared(both).effect_seeds)
    assert set(compared(both).p) == {"texts"}
    assert compared(both).p["texts"] < 0.01


def test_without_figures_per_text_pairing_is_by_seed(tmp_path: Path) -> None:
    folder = write_ablation(tmp_path / "a", samples=False)
    both = table(folder)["both"]
    assert compared(both).num_texts == 0
    assert compared(both).p == {"seeds": 0.25}
    assert both.verdict == "no significant difference"
    assert "compared by seed alone" in said(folder)


def test_arms_scored_on_other_texts_are_not_compared(tmp_path: Path) -> None:
    few = write_run(tmp_path / "few-s0", ARMS[1], 0, num_texts=10)
    many = write_run(tmp_path / "many-s0", ARMS[0], 0, num_texts=40)
    assert table(few, many)["few-s0"].verdict == "not comparable"
    assert table(many, few)["few-s0"].verdict == "not comparable"


def compared(row: Row) -> Comparison:
    assert row.comparison is not None
    return row.comparison


def test_runs_without_any_held_out_text_still_have_a_page(tmp_path: Path) -> None:
    write_run(tmp_path / "plain", ARMS[1], 0, samples=False)
    rewrite(tmp_path / "plain", metrics={"epoch": 1.0})
    write_report([tmp_path / "plain"], tmp_path / "report.html")
    assert "Training: key loss" in (tmp_path / "report.html").read_text()


def test_unfair_arms_are_noted(tmp_path: Path) -> None:
    folder = write_ablation(tmp_path / "a")
    rewrite(folder / "cross-entropy-s0", controls={"initial_student": "aa", "steps": 300})
    rewrite(folder / "both-s0", controls={"initial_student": "bb", "steps": 200})
    rewrite(folder / "shuffled-s0", controls={"initial_student": "aa", "steps": 300})
    (unfair,) = unfair_arms(read_study([folder]))
    assert "'both' differs from cross-entropy in the initial student, the number of steps" in unfair
    assert "not a fair comparison" in unfair


def test_a_relative_store_is_looked_for_where_training_began(tmp_path: Path) -> None:
    run = write_run(tmp_path / "moved/runs/a", ARMS[1], 0)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"name": "a", "output_dir": "runs", "store": "stores/x"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    create(
        tmp_path / "moved/stores/x", list(cut_into_shards([Sample("0", (("text", "words"),))], 100))
    )
    savings, notes = savings_table(read_study([run]))
    assert (savings, notes) == (None, [])  # found, and it has no teacher yet
    shutil.rmtree(tmp_path / "moved/stores")
    assert "no store at stores/x" in savings_table(read_study([run]))[1][0]


def test_a_seed_that_comes_twice_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path / "a-s0", ARMS[1], 0)
    write_run(tmp_path / "b-s0", ARMS[1], 0)
    config = (tmp_path / "a-s0/config.yaml").read_text()
    (tmp_path / "b-s0/config.yaml").write_text(config)
    study = read_study([tmp_path / "a-s0", tmp_path / "b-s0"])
    assert [len(arm.runs) for arm in study.arms] == [1]
    assert "has seed 0 twice" in study.notes[0]


def test_arms_of_two_studies_stand_side_by_side(tmp_path: Path) -> None:
    write_ablation(tmp_path / "first", ARMS[:2], seeds=(0,))
    write_ablation(tmp_path / "second", ARMS[:2], seeds=(0,))
    study = read_study([tmp_path / "first", tmp_path / "second"])
    names = ["cross-entropy", "both", "second/cross-entropy", "second/both"]
    assert [arm.name for arm in study.arms] == names
    assert study.baseline == "cross-entropy"


def test_user_errors_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run\.json"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    run = write_run(tmp_path / "run", ARMS[1], 0)
    with pytest.raises(ConfigError, match="no arm 'x' to use as the baseline; the arms are: run"):
        write_report([run], tmp_path / "report.html", baseline="x")
    rewrite(run, finished=False)
    with pytest.raises(ConfigError, match="has not finished; run `kvdistill train`"):
        write_report([run], tmp_path / "report.html")
    (tmp_path / "ablation.json").write_text('{"arms": [{"name": "a"}]}')
    with pytest.raises(ConfigError, match=r"ablation\.json.*runs"):
        write_report([tmp_path], tmp_path / "report.html")


def test_the_command_says_what_it_wrote(tmp_path: Path) -> None:
    write_ablation(tmp_path / "a", ARMS[:1], seeds=(0, 1))
    output = tmp_path / "out" / "page.html"
    done = CliRunner().invoke(report_command, [str(tmp_path / "a"), "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert "note: no store at" in done.output
    assert {path.name for path in output.parent.iterdir()} == {
        "page.html", "page.md", "page.csv", "page-runs.csv",
    }  # fmt: skip


def test_what_fitted_maps_explain_is_drawn_by_layer(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ARMS[1], 0)
    before = figures.sections(study := read_study([folder]), [])
    rewrite(folder, explained_at_start={
        "smollm2": {"key": [0.5, 0.7], "value": [0.2, 0.25]},
        "minilm": {"key": [None, None], "value": [0.1, 0.3]},
    })  # fmt: skip
    after = figures.sections(study := read_study([folder]), [])
    by_layer = "Errors and fusion weights by layer"
    drawn = {figure.name: figure.figure for figure in after[by_layer]}
    assert drawn.keys() - {figure.name for figure in before[by_layer]} == {
        "explained-key", "explained-value",
    }  # fmt: skip
    label = study.arms[0].label
    for name, expected in {
        "explained-key": {f"{label}: smollm2": [0.5, 0.7]},
        "explained-value": {f"{label}: smollm2": [0.2, 0.25], f"{label}: minilm": [0.1, 0.3]},
    }.items():
        lines = drawn[name].axes[0].get_lines()
        assert {line.get_label(): list(line.get_ydata()) for line in lines} == expected


def test_plots_of_one_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", MadeUp("routed", method="mlp"), 0)
    drawn = {path.stem for path in write_plots(run, tmp_path / "plots")}
    assert drawn == {
        "eval-bits-per-character", "loss-cross-entropy", "loss-key", "loss-value", "reliability",
        "error-by-layer-key", "error-by-layer-value", "layer-map", "spectra", "weights",
        "weights-by-layer", "weights-by-task", "alignment-smollm2", "alignment-minilm",
    }  # fmt: skip
    assert all(path.stat().st_size > 3000 for path in (tmp_path / "plots").iterdir())
