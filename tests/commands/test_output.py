"""What a run leaves behind: logs, a model card, and a student that can be exported."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvdistill.cli import cli
from kvdistill.commands.options import end_with_report
from kvdistill.errors import (
    ConfigError,
    KVDistillError,
    MissingExtra,
    NonFiniteError,
    StudentError,
)
from kvdistill.pipelines import export as exporting
from kvdistill.pipelines.export import export_onnx
from kvdistill.pipelines.run_folder import IN_THIS_FOLDER, RunFolder, refuse_other_config
from kvdistill.pipelines.train import train
from tests.hub_server import TOKEN, HubServer
from tests.pipelines.tiny import variant


@pytest.fixture(scope="module")
def finished(extracted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with evaluations, in its folder."""
    folder = tmp_path_factory.mktemp("output")
    logged = {"training__log_steps": 2, "training__eval_steps": 3}
    return train(variant(extracted, folder, **logged)).folder


def test_the_human_log_tells_losses_and_evaluations(finished: Path) -> None:
    lines = RunFolder(finished).human_log.read_text(encoding="utf-8").splitlines()
    assert any("tiny: from step 0 to 6" in line for line in lines[:2])
    told = [line for line in lines if "steps/s" in line]
    assert [line.split("  ")[1] for line in told] == ["step 2/6", "step 4/6", "step 6/6"]
    assert all("key" in line and "cross entropy" in line for line in told)
    assert sum("bits per character" in line for line in lines) == 2


def test_the_human_log_has_the_warnings_of_its_own_run_only(
    extracted: Path, tmp_path: Path
) -> None:
    changes = {"training__spike_factor": 1.000001, "training__max_steps": 14}
    spiky = train(variant(extracted, tmp_path, training__learning_rate=1e-5, **changes))
    log = RunFolder(spiky.folder).human_log
    assert "WARNING: tiny: step" in log.read_text(encoding="utf-8")
    before = log.read_text(encoding="utf-8")
    logging.getLogger("kvdistill.distill").warning("nobody's")
    assert log.read_text(encoding="utf-8") == before


def test_a_run_that_fails_says_so_and_lets_go(extracted: Path, tmp_path: Path) -> None:
    handlers = list(logging.getLogger("kvdistill").handlers)
    wild = {"training__learning_rate": 1e30, "training__max_steps": 50}
    with pytest.raises(NonFiniteError):
        train(variant(extracted, tmp_path, **wild))
    assert "NonFiniteError" in (tmp_path / "tiny" / "training.log").read_text(encoding="utf-8")
    assert logging.getLogger("kvdistill").handlers == handlers


def test_a_run_may_be_resumed_under_another_tracker(extracted: Path, finished: Path) -> None:
    changes = {"training__log_steps": 2, "training__eval_steps": 3, "report_to": []}
    refuse_other_config(RunFolder(finished), variant(extracted, finished.parent, **changes))
    other = variant(extracted, finished.parent, **changes | {"training__log_steps": 1})
    with pytest.raises(ConfigError, match=r"training\.log_steps"):
        refuse_other_config(RunFolder(finished), other)


def test_the_model_card_says_what_it_learned_from_and_runs(finished: Path) -> None:
    card = (finished / "student" / "README.md").read_text(encoding="utf-8")
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "transformers"
    record = RunFolder(finished).read_record()
    corpus = Path(RunFolder(finished).read_config()["corpus"]["path"])
    for words in (
        "models/llama", "models/bert", "3 · key", "student_to_teacher", torch.__version__,
        f"| corpus | {corpus.name} |", "| command |", "## Licence",
        f"{record['metrics']['eval_bits_per_character']:.6g}",
    ):  # fmt: skip
        assert words in body, words
    code = body.split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(code.replace("path/to/this/folder", str(finished / "student")), names)
    assert {"student", "tokenizer"} <= names.keys()


def test_onnx_gives_the_logits_of_torch(finished: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path, error = export_onnx(finished / "student", tmp_path / "onnx")
    assert error < 1e-4
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "onnx")
    text = tokenizer("How many clips did Natalia sell?", return_tensors="pt")
    inputs = {name: text[name].numpy() for name in ("input_ids", "attention_mask")}
    student = AutoModelForCausalLM.from_pretrained(finished / "student")
    with torch.no_grad():
        wanted = student(**{name: text[name] for name in inputs}).logits
    (logits,) = session.run(None, inputs)
    torch.testing.assert_close(torch.from_numpy(logits), wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(StudentError, match="already exists"):
        export_onnx(finished / "student", tmp_path / "onnx")


def test_onnx_that_differs_is_not_kept(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_write_onnx", lambda *_: None)
    monkeypatch.setattr(exporting, "_largest_difference", lambda *_: float("nan"))
    with pytest.raises(StudentError, match="nothing was written"):
        export_onnx(finished / "student", tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_export_needs_its_extra_and_a_student(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StudentError, match=r"config\.json"):
        export_onnx(tmp_path, tmp_path / "onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtra, match=r"kvdistill\[onnx\]"):
        export_onnx(finished / "student", tmp_path / "onnx")


def test_a_run_ends_with_its_report_beside_text_alone(
    extracted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"training__max_steps": 2, "losses__key": 0, "losses__value": 0, "name": "text"}
    text = train(variant(extracted, tmp_path, **changes))
    body = yaml.safe_load((text.folder / "config.yaml").read_text(encoding="utf-8"))
    body["losses"] |= {"key": 3, "value": 3}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(body | {"name": "both"}))
    done = CliRunner().invoke(cli, ["run", str(tmp_path / "both.yaml")])
    assert done.exit_code == 0, done.output
    page = tmp_path / "both/report.html"
    assert f"report: {page}" in done.output.splitlines()[-1]
    assert "<h1>both vs. text</h1>" in page.read_text(encoding="utf-8")
    end_with_report([tmp_path / "nothing"], page)  # no failure, and one line
    *_, last = capsys.readouterr().err.splitlines()
    assert re.match(r"no report was written: .*no run\.json", last)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


def pushed(*arguments: str) -> str:
    done = CliRunner().invoke(cli, ["push-student", *arguments])
    if isinstance(done.exception, KVDistillError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_a_pushed_student_loads_and_its_card_says_how(
    finished: Path, hub: HubServer, tmp_path: Path
) -> None:
    said = pushed(str(finished), "me/small", "--private", "--license", "apache-2.0")
    assert said.strip() == f"pushed {hub.address}/models/me/small"
    (repository,) = hub.repositories.values()
    assert repository.private
    assert len(repository.commits) == 1
    assert {"model.safetensors", "config.json", "tokenizer.json"} < repository.files.keys()
    of_the_run = {"projectors.safetensors", "stream.json", "recent_losses.json", "COMMIT.json"}
    assert not of_the_run & repository.files.keys()
    for name, content in repository.files.items():
        (tmp_path / name).write_bytes(content)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    head, body = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n", 2)[1:]
    assert yaml.safe_load(head)["license"] == "apache-2.0"
    assert 'from_pretrained("me/small")' in body
    assert IN_THIS_FOLDER not in body


def test_a_push_that_cannot_be_is_one_line(
    finished: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StudentError, match="not a finished run"):
        pushed(str(tmp_path), "me/small")
    with pytest.raises(StudentError, match="me/a b"):
        pushed(str(finished), "me/a b")
    for name, value, remedy in (
        ("HF_TOKEN", "hf_wrong", "me/small: no such model, or no right to it .* `hf auth login`"),
        ("HF_ENDPOINT", "http://127.0.0.1:9", "me/small: .*; check HF_ENDPOINT and the network"),
    ):
        monkeypatch.setenv(name, value)
        with pytest.raises(StudentError, match=remedy) as caught:
            pushed(str(finished), "me/small")
        assert len(str(caught.value)) <= 500
        assert "\n" not in str(caught.value)
    assert not hub.repositories
