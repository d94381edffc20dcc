"""A student on the harness's tasks, offline: a task file over the example data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from kvdistill.commands.train import evaluate_command
from kvdistill.distill.evaluate.harness import run_harness
from kvdistill.errors import ConfigError, MissingExtra, StudentError
from kvdistill.pipelines.evaluate import evaluate_folder
from tests.slurm.experiment import write_models

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder / "llama"


def write_task(folder: Path, name: str, **settings: object) -> str:
    """A task file over GSM8K's test problems, as one would write for a student of one's own."""
    data = {"test": str(ROOT / "examples/data/gsm8k_test.jsonl")}
    body = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": data, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        **settings,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(body))
    return str(path)


def test_figures_of_a_task_file_agree_with_our_own(student: Path, tmp_path: Path) -> None:
    task = write_task(
        tmp_path,
        "whole_text",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{question}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    (found,) = run_harness(student, [task], limit=3, batch_size=2)
    assert (found.task, found.metric) == ("whole_text", "bits_per_byte")
    lines = (ROOT / "examples/data/gsm8k_test.jsonl").read_text().splitlines()[:3]
    texts = [json.loads(line)["question"] for line in lines]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ours = evaluate_folder(student, corpus, max_samples=None, max_length=512, batch_size=1)
    num_bytes = sum(len(text.encode()) for text in texts)
    bits = ours.metrics["bits_per_character"] * ours.metrics["num_chars"] / num_bytes
    assert found.value == pytest.approx(bits, rel=0.01)


def test_the_command_prints_choices_with_their_error(student: Path, tmp_path: Path) -> None:
    task = write_task(
        tmp_path,
        "choice",
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice=[" yes", " no"],
        doc_to_target=0,
        metric_list=[{"metric": "acc"}],
    )
    asked = [str(student), "--harness", task, "--max-samples", "4"]
    done = CliRunner().invoke(evaluate_command, [*asked, "--json"])
    assert done.exit_code == 0, done.output
    (figure,) = json.loads(done.stdout.splitlines()[-1])
    assert figure["metric"] == "acc"
    assert figure["value"] in {0, 0.25, 0.5, 0.75, 1}
    assert figure["standard_error"] >= 0


def test_wrong_requests_name_the_remedy(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="no task file at"):
        run_harness(student, [str(tmp_path / "none.yaml")])
    for broken in (b"task: \xe9: [", b"- 1"):
        (tmp_path / "broken.yaml").write_bytes(broken)
        with pytest.raises(ConfigError, match=r"broken\.yaml: \w+: .*check the task") as caught:
            run_harness(student, [str(tmp_path / "broken.yaml")])
        assert "\n" not in str(caught.value)
    with pytest.raises(StudentError, match="not a model folder"):
        run_harness(tmp_path, ["any.yaml"])
    for asked in ([str(student)], [str(student), "corpus.jsonl", "--harness", "x"]):
        done = CliRunner().invoke(evaluate_command, asked)
        assert done.exit_code == 2
        assert "give either a CORPUS or --harness" in done.output
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r"pip install 'kvdistill\[harness\]'"):
        run_harness(student, ["any.yaml"])
